"""Which message the master is working on, in a file that outlives it: one that kills it twice is not tried again.

The mark is written without a sync: it survives the death of the process, and a power cut is no message's fault.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import SharedEncoderError
from master_service.log.message_log import MessageLog

_FATAL_DEATHS = 2
_SIZE = 256


class Attempts:
    """`at` marks what is being worked on; what a predecessor died of is counted when this is made."""

    def __init__(self, directory: Path, log: MessageLog) -> None:
        self._log = log
        self._handle = os.open(directory / "handling", os.O_RDWR | os.O_CREAT, 0o644)
        died_of = os.read(self._handle, _SIZE).decode(errors="replace").strip()
        for what in died_of.splitlines():
            log.count_death(what)
        self._mark()

    @contextmanager
    def at(self, *what: str) -> Iterator[None]:
        """Work on something (by all names that it has) that could kill this process, or raise what nobody expects. Not
        for waiting."""
        self._mark(*what)
        try:
            yield
        except SharedEncoderError:
            self._mark()  # raised on purpose
            raise
        self._mark()

    def fatal(self, what: str) -> bool:
        """Whether this has killed the master often enough."""
        return self._log.deaths(what) >= _FATAL_DEATHS

    def close(self) -> None:
        os.close(self._handle)

    def _mark(self, *what: str) -> None:
        os.pwrite(self._handle, "\n".join(what).encode()[:_SIZE].ljust(_SIZE), 0)
