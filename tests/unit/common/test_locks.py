"""The lock on a state directory: one process at a time, and one line where there can be no lock."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import LockHeld, UserError
from common.locks import DirectoryLock


def test_a_second_one_is_told_who_has_it(tmp_path: Path) -> None:
    with closing(DirectoryLock(tmp_path)), pytest.raises(LockHeld, match=f"in use by process {os.getpid()} on"):
        DirectoryLock(tmp_path)
    DirectoryLock(tmp_path).close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def lacking(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", lacking)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=rf"has no file locks \({os.strerror(code)}\).*--state") as error:
        DirectoryLock(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert len(os.listdir("/proc/self/fd")) == open_before
