"""Where commands write: over nothing of the user's (F7), and one line where nothing can be written (F18)."""

from __future__ import annotations

import os
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


#: Every command that writes somewhere or keeps its state there, up to the path.
WRITERS = [
    ["demo", "--out"],
    ["log", "export", "--state", RECORDED],
    ["replay", "--state", RECORDED, "--out"],
    ["replay", "--state", RECORDED, "--rule", "fedasync", "--out"],
    ["export", "text-1", "--state", RECORDED, "--out"],
    ["evaluate", "--out"],
    ["request", "get", "text", *NOBODY, "--out"],
    ["request", "update", "text-1", *NOBODY, "--out"],
    ["master", *NOBODY, "--state"],
    ["master", *NOBODY, "--export"],
    ["node", "a", *NOBODY, "--state"],
    ["node", "a", *NOBODY, "--export"],
    ["log", "prune", "--keep", "1GiB", "--state"],
    ["log", "repair", "--state"],
]


@pytest.mark.parametrize("arguments", WRITERS, ids=lambda arguments: " ".join(map(str, arguments[:3])))
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none", "/proc/none/below"])
def test_f18_where_nothing_can_be_written_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], place: str
) -> None:
    """A file where a folder should be, below a file, and /proc: root is held up by these too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    code, _, err = command(*arguments, place)
    assert (code, err.count("\n")) == (2, 1) and place in err, err
    assert (tmp_path / "file").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [["log", "list"], ["log", "verify"], ["replay"], ["log", "prune", "--keep", "1"]])
def test_f18_a_ledger_that_cannot_be_opened_is_one_line(command: Command, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "ledger.sqlite").mkdir()
    code, _, err = command(*arguments, "--state", tmp_path)
    assert code == 2 and "the message log cannot be used" in err.splitlines()[-1] and "Traceback" not in err


def test_f18_a_file_of_another_kind_is_not_written_over(command: Command, tmp_path: Path) -> None:
    mine, exported, figures = tmp_path / "mine.txt", tmp_path / "log.jsonl", tmp_path / "figures.json"
    mine.write_text("mine")
    for arguments in (["log", "export", mine, "--state", RECORDED], ["evaluate", "--out", mine]):
        code, _, err = command(*arguments)
        assert code == 2 and f"{mine} is there and is no " in err and mine.read_text() == "mine"
    for _ in range(2):  # an earlier one is replaced, and so is an empty file
        code, _, err = command("log", "export", exported, "--state", RECORDED)
        assert code == 0, err
    figures.write_text('{"domains": {}}')
    code, _, err = command("evaluate", "--out", figures)
    assert code == 2 and "give --config FILE" in err, "the path is fine, and so the next thing is looked at"


def test_f7_a_demo_removes_nothing_but_what_a_demo_has_made(command: Command, tmp_path: Path) -> None:
    """Its configuration is for copying; a folder that it was copied into is no demo's."""
    (tmp_path / "demo.toml").write_text("[master]\n")
    (tmp_path / "thesis.tex").write_text("mine")
    code, _, err = command("demo", "--quick", "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1) and f"{tmp_path} is there and not from a demo: it holds thesis.tex" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.toml", "thesis.tex"]


@pytest.mark.parametrize(("given", "words"), [("", "Is a directory"), ("none.toml", "no such file")])
def test_f18_a_configuration_that_is_no_file_is_not_passed_over(
    command: Command, tmp_path: Path, given: str, words: str
) -> None:
    code, _, err = command("master", *NOBODY, "--config", tmp_path / given)
    assert (code, err.count("\n")) == (2, 1) and words in err and "--config FILE" in err


def test_f18_a_configuration_may_come_through_a_pipe(command: Command) -> None:
    """As from `--config <(…)` of a shell: what is in it counts."""
    reading, writing = os.pipe()
    os.write(writing, b"[stop]\nvers = 3\n")
    os.close(writing)
    code, _, err = command("master", *NOBODY, "--config", f"/dev/fd/{reading}")
    os.close(reading)
    assert code == 2 and "there is no setting 'stop.vers'; did you mean 'versions'?" in err
