"""F7: an export replaces an earlier export or nothing, and a failure leaves what was there."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.exports import TITLE, check_export_directory, check_file, check_writable, replacing

CARD = f"{TITLE}text-1\n"


def export(directory: Path, content: str = "new", card: str = CARD) -> None:
    with replacing(directory, card) as beside:
        (beside / "model").write_text(content)


def test_f7_nothing_an_empty_folder_and_an_earlier_export_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "deep" / "new", tmp_path / "empty"):
        export(directory, "old")
        (directory / "left over").touch()
        export(directory)
        assert {path.name: path.read_text() for path in directory.iterdir()} == {"model": "new", "README.md": CARD}
        assert [path.name for path in directory.parent.iterdir() if path.name.startswith(".")] == []


def test_f7_anything_else_is_refused_and_stays(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# My project\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    (tmp_path / "link").symlink_to(project)
    (tmp_path / "file").write_text("text")
    for name, words in (
        ("project", "something else"),
        ("photos", "something else"),
        ("link", "something else"),
        ("file", "is a file"),
        ("file/below", "Not a directory"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            export(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value) and "\n" not in str(refused.value)
    assert (project / "README.md").read_text() == "# My project\n" and len(list(project.iterdir())) == 1
    assert (tmp_path / "file").read_text() == "text" and (tmp_path / "photos" / "one.png").exists()


def test_f7_a_failure_while_writing_leaves_the_earlier_export(tmp_path: Path) -> None:
    export(tmp_path / "encoder", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "encoder", CARD) as beside:
        (beside / "model").write_text("half")
        raise RuntimeError
    assert (tmp_path / "encoder" / "model").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_f7_folders_of_similar_names_are_not_ours(tmp_path: Path) -> None:
    """The place beside that an export is written into is no folder that a user may have."""
    for name in ("encoder.part", "encoder.old", ".encoder.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    export(tmp_path / "encoder")
    export(tmp_path / "encoder")
    assert all((tmp_path / name / "mine").exists() for name in ("encoder.part", "encoder.old", ".encoder.part"))


def test_f7_what_an_encoder_type_writes_as_its_readme_is_kept_below_the_card(tmp_path: Path) -> None:
    for _ in range(2):
        with replacing(tmp_path / "encoder", CARD) as beside:
            (beside / "README.md").write_text("How to load this\n")
    assert (tmp_path / "encoder" / "README.md").read_text() == f"{CARD}\nHow to load this\n"


def test_f7_a_state_directory_s_own_folder_is_replaced_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with replacing(tmp_path / "model", CARD, ours=True) as beside:
        (beside / "model").touch()
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model", "README.md"}


def test_f18_where_nobody_may_write_is_said_before_anything_is_written() -> None:
    """/proc, because root may write wherever only the permission bits forbid it."""
    for check in (
        check_export_directory,
        lambda path: check_writable(path, path),
        lambda path: check_file(path, "", bool),
    ):
        with pytest.raises(
            UserError, match=r"/proc/none/encoder cannot be written: nothing can be made in /proc "
        ) as refused:
            check(Path("/proc/none/encoder"))
        assert "\n" not in str(refused.value)
