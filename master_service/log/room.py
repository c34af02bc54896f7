"""Room on the disk: what must be durable waits until there is some, and nothing is acked meanwhile."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.errors import StorageFull
from master_service.status import DiskReport

T = TypeVar("T")


class Storage:
    """The disk of a state directory. `short`: the last attempt to write found too little room."""

    def __init__(self, directory: Path, needed_bytes: int) -> None:
        self._directory = directory
        self._needed = needed_bytes
        self.short = False

    def write(self, action: Callable[[], T]) -> T:
        """Do something that writes. Raises StorageFull if there is no room; then nothing of it is durable."""
        free = self.free_bytes()
        if free < self._needed:
            self.short = True
            raise StorageFull(f"{self._directory}: {free} bytes are free, {self._needed} are wanted")
        try:
            done = action()
        except (OSError, sqlite3.OperationalError) as error:
            if not is_full(error):
                raise
            self.short = True
            raise StorageFull(f"{self._directory}: {error}") from None
        self.short = False
        return done

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._directory).free

    def report(self) -> DiskReport:
        """What `status` shows."""
        return DiskReport(short=self.short, free_bytes=self.free_bytes(), needed_bytes=self._needed)


def is_full(error: OSError | sqlite3.OperationalError) -> bool:
    """Whether an error says that the disk, or what of it is ours, is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "full" in str(error)
