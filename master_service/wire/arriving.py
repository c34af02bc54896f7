"""An update on its way into the log: each slice goes into its payload and is measured as it comes, while it is in the
processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from master_service.arithmetic.arithmetic import Measuring
from master_service.decisions.records import UpdateFacts
from master_service.log.payloads import Incoming


class Arriving(Protocol):
    """`add` the slices in order; then `kept`, or `discard` at any time before."""

    def add(self, body: bytes) -> None:
        """The slice that comes next."""

    def kept(self) -> UpdateFacts:
        """All has come: it has a name now. Raises StorageBlocked; then it may be tried again."""

    def discard(self) -> None:
        """It is not wanted any more."""


class Arrived:
    """What arrives here as a whole.

    `add` the slices in order; then `kept`, or `discard` at any time before."""

    def __init__(
        self,
        incoming: Incoming,
        measuring: Measuring,
        *,
        keep: Callable[[Incoming], str],
        marked: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`keep` gives a payload its name. Inside `marked` it is known what kills the master, if it does."""
        self._incoming = incoming
        self._measuring = measuring
        self._keep = keep
        self._marked = marked
        self._size = 0

    def add(self, body: bytes) -> None:
        """The slice that comes next."""
        self._incoming.add(body)
        self._size += len(body)
        with self._marked():
            self._measuring.add(body)

    def kept(self) -> UpdateFacts:
        """All has come: it has a name now. Raises StorageBlocked; then it may be tried again."""
        digest = self._keep(self._incoming)
        with self._marked():
            finite, norm = self._measuring.result()
        return UpdateFacts(digest=digest, size=self._size, finite=finite, norm=norm)

    def discard(self) -> None:
        """It is not wanted any more."""
        self._incoming.discard()
