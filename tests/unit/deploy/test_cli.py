"""What ends a command, as a person and a supervisor see it: one line, and an exit code that says what kind it was."""

from __future__ import annotations

import errno

import pytest

from common.errors import AccessRefused, BrokerUnavailable, Damaged, LockHeld, StorageFull, UserError
from deploy.cli import guarded


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


def test_a_bug_is_loud() -> None:
    def action() -> None:
        raise OSError(errno.EBADF, "a descriptor that is not one")

    with pytest.raises(OSError, match="descriptor"):
        guarded(action)
