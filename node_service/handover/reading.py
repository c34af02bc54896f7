"""Versions are read from the stream on a thread of their own; what was read comes back as an event."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import SharedEncoderError
from common.wire.broker import Broker
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion
from common.wire.versions import VersionReader

#: A version that the master told of is on the stream, or lost: after so long without getting further it is asked for.
_PATIENCE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class VersionRead:
    """A version ≥ `wanted` that was read, or why none could be. `exact`: that very one, which the master named."""

    encoder: str
    wanted: int
    exact: bool
    version: CompleteVersion | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Wanted:
    encoder: str
    layout_digest: str
    at_least: int
    published_at: float = 0.0
    exact: bool = False
    look: bool = False


class VersionThread:
    """Reads one version at a time; of several wanted ones only the last. A look gives way to what is wanted."""

    def __init__(self, broker: Broker, topology: Topology, done: Callable[[VersionRead], None]) -> None:
        self._broker = broker
        self._topology = topology
        self._done = done
        self._readers: dict[str, VersionReader] = {}
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="version-reader", daemon=True)
        self._thread.start()

    def read(self, encoder: str, layout_digest: str, at_least: int, published_at: float, *, exact: bool) -> None:
        """Read the newest version ≥ `at_least` (`exact`: that one); the outcome is passed to `done`."""
        self._wanted.put(_Wanted(encoder, layout_digest, at_least, published_at, exact))

    def look(self, encoder: str, layout_digest: str, at_least: int) -> None:
        """See whether the stream holds a version ≥ `at_least`; only if so, it is passed to `done`."""
        self._wanted.put(_Wanted(encoder, layout_digest, at_least, look=True))

    def close(self) -> None:
        self._wanted.put(None)

    def _work(self) -> None:
        while (wanted := self._newest()) is not None:
            try:
                version = self._read(wanted)
                if version is not None:
                    self._done(VersionRead(wanted.encoder, wanted.at_least, wanted.exact, version))
            except SharedEncoderError as error:
                if not wanted.look:
                    self._done(VersionRead(wanted.encoder, wanted.at_least, wanted.exact, None, str(error)))

    def _read(self, wanted: _Wanted) -> CompleteVersion | None:
        fresh = VersionReader(self._broker, self._topology, wanted.encoder, wanted.layout_digest)
        reader = self._readers.setdefault(wanted.encoder, fresh)
        if wanted.look:
            return reader.look(wanted.at_least)
        return reader.read(wanted.at_least, wanted.published_at, exact=wanted.exact, timeout=_PATIENCE_SECONDS)

    def _newest(self) -> _Wanted | None:
        wanted = self._wanted.get()
        while wanted is not None and not self._wanted.empty():
            following = self._wanted.get()
            if following is None or wanted.look or not following.look:
                wanted = following
        return wanted
