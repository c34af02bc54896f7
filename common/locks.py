"""Who holds a lock, in words, and the lock on a state directory. The broker's locks are in `brokers/`."""

from __future__ import annotations

import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from common.clock import SYSTEM
from common.errors import LockHeld, UserError


def this_process() -> str:
    """What a refused second one is told of the holder: process, host, and since when (UTC)."""
    since = datetime.fromtimestamp(SYSTEM.now(), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


class DirectoryLock:
    """One process at a time works in a directory. Held until `close` or until the process ends, however it ends."""

    def __init__(self, directory: Path, option: str = "--state") -> None:
        """`option` is the one that names the directory. Raises LockHeld, which names the holder, or UserError if
        nothing can be written there."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{directory}: {error.strerror}; give another directory with {option} DIR") from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._handle, 500).decode(errors="replace").strip() or "another process"
            os.close(self._handle)
            raise LockHeld(
                f"{directory} is in use by {holder}; stop that one, or use another directory with {option}"
            ) from None
        except OSError as error:  # a file system without locks, such as Lustre mounted so: ENOSYS, ENOTSUP, ENOLCK
            os.close(self._handle)
            raise UserError(
                f"{directory}: its file system has no file locks ({error.strerror}), so two processes could work there "
                f"at once; use a directory on another one with {option}, or mount it with them (Lustre: -o flock)"
            ) from None
        os.ftruncate(self._handle, 0)
        os.write(self._handle, this_process().encode())

    def close(self) -> None:
        """Release the lock; a second call has no effect."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
