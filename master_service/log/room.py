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


def free_bytes(directory: Path) -> Callable[[], int]:
    """How many bytes are free on the disk of a directory, whenever it is asked."""
    return lambda: shutil.disk_usage(directory).free


class Room:
    """The room where a log is kept. `short`: the last attempt to write found too little of it."""

    def __init__(self, place: Path, free: Callable[[], int], needed_bytes: int) -> None:
        self._place = place
        self._free = free
        self._needed = needed_bytes
        self.short = False

    def write(self, action: Callable[[], T]) -> T:
        """Do something that writes. Raises StorageFull if there is no room; then nothing of it is durable."""
        free = self._free()
        if free < self._needed:
            self.short = True
            raise StorageFull(f"{self._place}: {free} bytes are free, {self._needed} are wanted")
        try:
            done = action()
        except (OSError, sqlite3.OperationalError) as error:
            if not is_full(error):
                raise
            self.short = True
            raise StorageFull(f"{self._place}: {error}") from None
        self.short = False
        return done

    def report(self) -> DiskReport:
        """What `status` shows."""
        return DiskReport(short=self.short, free_bytes=self._free(), needed_bytes=self._needed)


def is_full(error: OSError | sqlite3.OperationalError) -> bool:
    """Whether an error says that the disk, or what of it is ours, is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "full" in str(error)
