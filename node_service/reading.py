"""Versions are read from the stream on a thread of their own; what was read comes back as an event."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from common.broker import Broker
from common.errors import SharedEncoderError
from common.topology import Topology
from common.transfer import CompleteVersion
from common.versions import VersionReader


@dataclass(frozen=True, slots=True)
class VersionRead:
    """A version that was read, or why it could not be."""

    encoder: str
    final: bool
    version: CompleteVersion | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Wanted:
    encoder: str
    layout_digest: str
    at_least: int
    published_at: float
    final: bool


class VersionThread:
    """Reads one version at a time; of several wanted ones only the last."""

    def __init__(self, broker: Broker, topology: Topology, done: Callable[[VersionRead], None]) -> None:
        self._broker = broker
        self._topology = topology
        self._done = done
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="version-reader", daemon=True)
        self._thread.start()

    def read(self, encoder: str, layout_digest: str, at_least: int, published_at: float, final: bool) -> None:
        """Read the newest version ≥ `at_least`; the outcome is passed to `done`."""
        self._wanted.put(_Wanted(encoder, layout_digest, at_least, published_at, final))

    def close(self) -> None:
        self._wanted.put(None)

    def _work(self) -> None:
        while (wanted := self._newest()) is not None:
            reader = VersionReader(self._broker, self._topology, wanted.encoder, wanted.layout_digest)
            try:
                version = reader.read(wanted.at_least, wanted.published_at)
                self._done(VersionRead(wanted.encoder, wanted.final, version))
            except SharedEncoderError as error:
                self._done(VersionRead(wanted.encoder, wanted.final, None, str(error)))

    def _newest(self) -> _Wanted | None:
        wanted = self._wanted.get()
        while wanted is not None and not self._wanted.empty():
            wanted = self._wanted.get()
        return wanted
