"""Where commands write: over nothing of the user's (F7), and one line where nothing can be written (F18)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.deploy.conftest import Command

#: The log of a small text encoder that was really trained.
RECORDED = Path(__file__).parents[2] / "logs" / "text-diloco.jsonl.gz"
#: A broker that is not there: whoever comes so far did not look at the path first.
NOBODY = ("--broker", "amqp://127.0.0.1:1/")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of the user's own."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "README.md").write_text("# My project\n")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "text-1", "--out"],
        ["replay", "--out"],
        ["replay", "--rule", "fedasync", "--out"],
        ["request", "get", "text", *NOBODY, "--out"],
        ["request", "update", "text-1", *NOBODY, "--out"],
        ["master", *NOBODY, "--export"],
        ["node", "a", *NOBODY, "--export"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_f7_no_command_writes_over_what_is_not_an_export_and_says_so_first(
    command: Command, project: Path, arguments: list[str]
) -> None:
    """The message log, the corpus and the broker are not there: the path is looked at before them."""
    code, _, err = command(*arguments, project)
    assert (code, err.count("\n")) == (2, 1) and f"{project} holds something else than an exported encoder" in err
    assert [(path.name, path.read_text()) for path in project.iterdir()] == [("README.md", "# My project\n")]


def test_f7_an_earlier_export_is_replaced_whole(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    for version in (1, 2):
        code, printed, err = command("replay", "--state", RECORDED, "--version", version, "--out", out)
        assert code == 0 and f"version {version} of" in printed, err
        assert f"version {version}," in (out / "README.md").read_text()
        assert not (out / "left-over.bin").exists()
        (out / "left-over.bin").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
