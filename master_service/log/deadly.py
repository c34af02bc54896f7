"""Which message the master is working on, in a mark that outlives it: one that kills it twice is not tried again."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from common.errors import SharedEncoderError

_FATAL_DEATHS = 2
_SIZE = 256


class Mark(Protocol):
    """A few words that a killed process leaves behind."""

    def read(self) -> str:
        """What was written last; empty at first."""

    def write(self, words: str) -> None:
        """Replace it."""

    def close(self) -> None:
        """It is not written any more."""


class FileMark:
    """In a file, without a sync: it survives the death of the process, and a power cut is no message's fault. It may be
    closed while another thread still works."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        self._closed = False

    def read(self) -> str:
        return os.pread(self._handle, _SIZE, 0).decode(errors="replace").strip()

    def write(self, words: str) -> None:
        with self._lock:
            if not self._closed:  # the number may be another file's by now
                os.pwrite(self._handle, words.encode()[:_SIZE].ljust(_SIZE), 0)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self._handle)


class MemoryMark:
    """In memory: it lives as long as this object."""

    def __init__(self) -> None:
        self.words = ""

    def read(self) -> str:
        return self.words

    def write(self, words: str) -> None:
        self.words = words

    def close(self) -> None:
        """It stays as it is."""


class Deaths(Protocol):
    """How often a process has died of what, beyond its own death."""

    def count_death(self, what: str) -> None:
        """It died while it handled this."""

    def deaths(self, what: str) -> int:
        """How often it has died of this."""


class Attempts:
    """`at` marks what is being worked on; what a predecessor died of is counted when this is made."""

    def __init__(self, mark: Mark, log: Deaths) -> None:
        self._log = log
        self._mark = mark
        self._working = False
        for what in mark.read().splitlines():
            log.count_death(what)
        mark.write("")

    def at(self, *what: str) -> AbstractContextManager[None]:
        """Mark what is being worked on, by all its names, while it could kill this process or raise what nobody
        expects.

        Do not wait inside: a process that is killed while it waits was not killed by a message.
        """
        return _Work(self, "\n".join(what))

    def begin(self, what: str) -> None:
        self._working = True
        self._mark.write(what)

    def end(self, error: type[BaseException] | None) -> None:
        """It is over; by an error, where it was not raised on purpose, this is what is worked on still."""
        self._working = False
        if error is None or issubclass(error, SharedEncoderError):
            self._mark.write("")

    def fatal(self, what: str) -> bool:
        """Whether this has killed the process often enough."""
        return self._log.deaths(what) >= _FATAL_DEATHS

    def close(self) -> None:
        """What another thread still works on is left, and nobody's death."""
        if self._working:
            self._mark.write("")
        self._mark.close()


class _Work:
    """What is worked on; entered once."""

    def __init__(self, attempts: Attempts, what: str) -> None:
        self._attempts = attempts
        self._what = what

    def __enter__(self) -> None:
        self._attempts.begin(self._what)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._attempts.end(error)
