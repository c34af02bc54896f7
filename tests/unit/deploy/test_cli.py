"""What ends a command, as a person and a supervisor see it: one line, and an exit code that says what kind it was."""

from __future__ import annotations

import errno
import os
import sqlite3
import sysconfig
from pathlib import Path

import pytest

import deploy.cli
from common.errors import AccessRefused, BrokerUnavailable, Damaged, LockHeld, StorageFull, UserError
from deploy.cli import guarded
from tests.unit.deploy.conftest import Command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such file"), 2),
        (AccessRefused("wrong password"), 2),
        (LockHeld("in use by process 7 on box"), 2),
        (BrokerUnavailable("no broker answers"), 3),
        (Damaged("row 7 is not what was written"), 1),
        (StorageFull("5 bytes are free"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
    ],
)
def test_what_can_go_wrong_is_one_line_and_a_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def action() -> None:
        raise error

    assert guarded(action) == code
    said = capsys.readouterr().err
    assert said.startswith("shared-encoder: ") and said.count("\n") == 1
    assert (str(error) if error.args[0] != errno.ENOSPC else "make room and start again") in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EPERM])
def test_f18_an_error_of_a_path_is_one_line_that_names_it(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise OSError(number, os.strerror(number), "/some/where/else")

    assert guarded(action) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"shared-encoder: /some/where/else: {os.strerror(number)}; ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBADF, "a descriptor that is not one"),
        OSError(errno.ENOENT, "a path that nobody gave"),
        OSError(errno.EIO, "a broken disk", "/some/where"),
        FileNotFoundError(errno.ENOENT, "a file of the program", str(Path(deploy.cli.__file__).parent / "none.toml")),
        FileNotFoundError(errno.ENOENT, "a file of a library", sysconfig.get_path("purelib") + "/none.so"),
        sqlite3.OperationalError("no such column: offfset"),
        ValueError("a descriptor that is not one"),
    ],
    ids=repr,
)
def test_a_bug_is_loud(error: Exception) -> None:
    """F18: only what names a path of the user's is theirs."""

    def action() -> None:
        raise error

    with pytest.raises(type(error)) as loud:
        guarded(action)
    assert loud.value is error


@pytest.mark.parametrize(
    "arguments",
    [["replay"], ["log", "list"], ["log", "verify"], ["log", "prune", "--keep", "1GiB"], ["log", "repair"]],
    ids=" ".join,
)
def test_a_command_that_finds_no_message_log_says_where_it_looked(
    command: Command, tmp_path: Path, arguments: list[str]
) -> None:
    code, _, said = command(*arguments, "--state", tmp_path / "none")
    assert (code, said.count("\n")) == (2, 1), said
    assert f"no message log in {tmp_path / 'none'}" in said and "--state" in said


def test_evaluate_without_a_configuration_says_what_to_give(command: Command) -> None:
    code, _, said = command("evaluate")
    assert (code, said.count("\n")) == (2, 1) and "give --config FILE" in said, said
