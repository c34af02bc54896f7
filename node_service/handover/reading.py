"""Versions that a node wants to read from the stream: asked for here, and read by `read_one`, which a thread of the
service calls."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from common.clock import Clock
from common.errors import BrokerUnavailable
from common.numbers.layout import Layout
from common.numbers.slicing import SLICE, encoded_size
from common.wire.broker import Broker
from common.wire.messages import Instruction
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion
from common.wire.versions import VersionReader

#: A version that the master told of is on the stream, or lost: after so long without getting further it is asked for.
PATIENCE_SECONDS = 15.0


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
    instruction: Instruction
    at_least: int
    published_at: float = 0.0
    exact: bool = False
    look: bool = False

    @property
    def encoder(self) -> str:
        return self.instruction.encoder


class Reading:
    """Reads one version at a time; of several wanted ones only the last. A look gives way to what is wanted."""

    def __init__(self, broker: Broker, topology: Topology, clock: Clock) -> None:
        self._broker = broker
        self._topology = topology
        self._clock = clock
        self._readers: dict[str, VersionReader] = {}
        self._asked: queue.SimpleQueue[_Wanted] = queue.SimpleQueue()
        self._wanted: _Wanted | None = None

    def read(self, instruction: Instruction, at_least: int, published_at: float, *, exact: bool) -> None:
        """Read the newest version ≥ `at_least` (`exact`: that one)."""
        self._asked.put(_Wanted(instruction, at_least, published_at, exact))

    def look(self, instruction: Instruction, at_least: int) -> None:
        """See whether the stream holds a version ≥ `at_least`; if not, `read_one` gives nothing."""
        self._asked.put(_Wanted(instruction, at_least, look=True))

    def read_one(self, wait: float = 0.0) -> VersionRead | None:
        """Go on with what is wanted, for about `wait` seconds; what came of it, once that is known."""
        try:
            if self._begin(wait):
                wanted = self._wanted
                assert wanted is not None
                return self._step(wanted, self._reader(wanted), wait)
        except BrokerUnavailable as error:
            failed, self._wanted = self._wanted, None
            if failed is not None and not failed.look:
                return VersionRead(failed.encoder, failed.at_least, failed.exact, None, str(error))
        return None

    @property
    def busy(self) -> bool:
        """Whether `read_one` has something to do."""
        return self._wanted is not None or not self._asked.empty()

    def forget(self, encoder: str) -> None:
        """The training of an encoder has ended: should it go on, its stream may be a new one."""
        self._readers.pop(encoder, None)

    def close(self) -> None:
        """Stop reading."""
        for reader in self._readers.values():
            reader.close()

    def _begin(self, wait: float) -> bool:
        """Turn to what was asked for last, if nothing but a look is going on; whether anything is wanted.

        A read that has begun goes on: on a slow line newer versions may be made faster than one is read. Raises
        BrokerUnavailable.
        """
        if self._wanted is not None and not self._wanted.look:
            return True
        asked = self._newest(wait if self._wanted is None else 0.0)
        if asked is None or (self._wanted is not None and asked.look):
            return self._wanted is not None
        self._wanted = asked
        reader = self._reader(asked)
        if asked.look:
            reader.look(asked.at_least)
        else:
            reader.seek(asked.at_least, asked.published_at, exact=asked.exact, timeout=PATIENCE_SECONDS)
        return True

    def _newest(self, wait: float) -> _Wanted | None:
        """The last that was asked for; a look only if nothing else was."""
        newest = None
        while True:
            try:
                asked = self._asked.get(timeout=wait) if wait > 0 and newest is None else self._asked.get_nowait()
            except queue.Empty:
                return newest
            if newest is None or newest.look or not asked.look:
                newest = asked

    def _step(self, wanted: _Wanted, reader: VersionReader, wait: float) -> VersionRead | None:
        found = reader.step(wait)
        if found is None and reader.searching:
            return None
        self._wanted = None
        return None if found is None else VersionRead(wanted.encoder, wanted.at_least, wanted.exact, found)

    def _reader(self, wanted: _Wanted) -> VersionReader:
        reader = self._readers.get(wanted.encoder)
        if reader is None:
            size = Layout(wanted.instruction.layout).size
            reader = VersionReader(
                self._broker,
                self._topology,
                wanted.encoder,
                wanted.instruction.layout_digest,
                slice_bytes=encoded_size(min(SLICE, size), "float32"),
                clock=self._clock,
            )
            self._readers[wanted.encoder] = reader
        return reader
