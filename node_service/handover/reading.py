"""Versions and assets that a node wants to read from streams: asked for here, and read by `read_one`, which a thread of
the service calls."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass

from common.clock import Clock
from common.errors import BrokerUnavailable
from common.numbers.encodings import is_finite
from common.numbers.layout import Layout
from common.numbers.slicing import encoded_size, slice_length
from common.wire.accounts import Door
from common.wire.assets import AssetReader
from common.wire.broker import Broker
from common.wire.fields import AssetEntry
from common.wire.to_node import Instruction
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion
from common.wire.versions import VersionReader

#: A version that the master told of is on the stream, or lost: after so long without getting further it is asked for.
PATIENCE_SECONDS = 15.0
#: Versions whose digests are remembered, of each encoder.
_NAMED = 64


@dataclass(frozen=True, slots=True)
class VersionRead:
    """A version ≥ `wanted` that was read, or why none could be. `exact`: that very one, which the master named."""

    encoder: str
    wanted: int
    exact: bool
    version: CompleteVersion | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class AssetRead:
    """An asset of an encoder that was read whole, or why those that were wanted could not be."""

    encoder: str
    entry: AssetEntry | None
    content: bytes = b""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Gather:
    """Assets of an encoder."""

    encoder: str
    entries: tuple[AssetEntry, ...]


@dataclass(frozen=True, slots=True)
class _Wanted:
    instruction: Instruction
    at_least: int
    published_at: float = 0.0
    offset: int | None = None
    exact: bool = False
    look: bool = False

    @property
    def encoder(self) -> str:
        return self.instruction.encoder


def _is_look(asked: _Wanted | _Gather) -> bool:
    return isinstance(asked, _Wanted) and asked.look


class Reading:
    """Reads one version, or the assets of one encoder, at a time; of several wanted ones only the last. A look gives
    way to what is wanted, and so do assets: whoever asks for anything else has turned away from their encoder."""

    def __init__(self, broker: Broker, topology: Topology, clock: Clock, door: Door | None = None) -> None:
        self._broker = broker
        self._door = door or Door(topology)
        self._topology = topology
        self._clock = clock
        self._readers: dict[str, VersionReader] = {}
        #: The digests of versions that the master has named, by encoder.
        self._named: dict[str, dict[int, str]] = {}
        #: Readers of encoders that are trained no more, to be closed by whoever reads.
        self._forgotten: queue.SimpleQueue[VersionReader] = queue.SimpleQueue()
        self._assets: AssetReader | None = None
        self._asked: queue.SimpleQueue[_Wanted | _Gather] = queue.SimpleQueue()
        self._wanted: _Wanted | _Gather | None = None

    def read(
        self,
        instruction: Instruction,
        at_least: int,
        published_at: float,
        *,
        exact: bool,
        digest: str | None = None,
        offset: int | None = None,
    ) -> None:
        """Read the newest version ≥ `at_least` (`exact`: that one), which has this digest and begins at this offset of
        the stream, if the master said so."""
        named = self._named.setdefault(instruction.encoder, {})
        # where nothing was said of it, what was said of another of this number does not hold for it
        named.pop(at_least, None)
        if digest:
            named[at_least] = digest
        for old in list(named)[:-_NAMED]:
            named.pop(old, None)
        self._asked.put(_Wanted(instruction, at_least, published_at, offset, exact))

    def look(self, instruction: Instruction, at_least: int) -> None:
        """See whether the stream holds a version ≥ `at_least`; if not, `read_one` gives nothing."""
        self._asked.put(_Wanted(instruction, at_least, look=True))

    def gather(self, encoder: str, entries: Sequence[AssetEntry]) -> None:
        """Read these assets of an encoder; `read_one` gives each as soon as it is whole, until it gives a problem."""
        self._asked.put(_Gather(encoder, tuple(entries)))

    def read_one(self, wait: float = 0.0) -> VersionRead | AssetRead | None:
        """Go on with what is wanted, for about `wait` seconds; what came of it, once that is known."""
        self._close_idle()
        try:
            if self._begin(wait):
                wanted = self._wanted
                assert wanted is not None
                if isinstance(wanted, _Gather):
                    return self._gather(wanted, wait)
                return self._step(wanted, self._reader(wanted), wait)
        except BrokerUnavailable as error:
            failed, self._wanted = self._wanted, None
            self._close_assets()
            if isinstance(failed, _Gather):
                return AssetRead(failed.encoder, None, problem=str(error))
            if failed is not None and not failed.look:
                return VersionRead(failed.encoder, failed.at_least, failed.exact, None, str(error))
        return None

    @property
    def busy(self) -> bool:
        """Whether `read_one` has something to do."""
        return self._wanted is not None or not self._asked.empty()

    def forget(self, encoder: str) -> None:
        """The training of an encoder has ended: should it go on, its stream may be a new one."""
        if (reader := self._readers.pop(encoder, None)) is not None:
            self._forgotten.put(reader)
        self._named.pop(encoder, None)

    def close(self) -> None:
        """Stop reading."""
        self._close_assets()
        self._close_idle()
        for reader in self._readers.values():
            reader.close()

    def _close_idle(self) -> None:
        """Readers that rest keep a consumer each: not of what nobody reads any more."""
        for reader in tuple(self._readers.values()):
            reader.tire()
        while not self._forgotten.empty():
            self._forgotten.get().close()

    def _begin(self, wait: float) -> bool:
        """Turn to what was asked for last, if nothing but a look is going on; whether anything is wanted.

        A read that has begun goes on: on a slow line newer versions may be made faster than one is read. Raises
        BrokerUnavailable.
        """
        if isinstance(self._wanted, _Wanted) and not self._wanted.look:
            return True
        asked = self._newest(wait if self._wanted is None else 0.0)
        if asked is None or (self._wanted is not None and _is_look(asked)):
            return self._wanted is not None
        self._wanted = asked
        self._close_assets()
        if isinstance(asked, _Gather):
            return True  # its reader is made by its first step
        reader = self._reader(asked)
        if asked.look:
            reader.look(asked.at_least)
        else:
            reader.seek(
                asked.at_least, asked.published_at, offset=asked.offset, exact=asked.exact, timeout=PATIENCE_SECONDS
            )
        return True

    def _newest(self, wait: float) -> _Wanted | _Gather | None:
        """The last that was asked for; a look only if nothing else was."""
        newest: _Wanted | _Gather | None = None
        while True:
            try:
                asked = self._asked.get(timeout=wait) if wait > 0 and newest is None else self._asked.get_nowait()
            except queue.Empty:
                return newest
            if newest is None or _is_look(newest) or not _is_look(asked):
                newest = asked

    def _step(self, wanted: _Wanted, reader: VersionReader, wait: float) -> VersionRead | None:
        found = reader.step(wait)
        if found is None and reader.searching:
            return None
        self._wanted = None
        if found is None:
            return None
        if not is_finite(found.payload, Layout(wanted.instruction.layout).size, found.encoding):
            problem = f"version {found.version} of {wanted.encoder} holds numbers that are not finite"
            return VersionRead(wanted.encoder, wanted.at_least, wanted.exact, None, problem)
        return VersionRead(wanted.encoder, wanted.at_least, wanted.exact, found)

    def _gather(self, wanted: _Gather, wait: float) -> AssetRead | None:
        """Raises BrokerUnavailable."""
        if self._assets is None:
            self._assets = AssetReader(
                self._broker,
                self._topology,
                wanted.encoder,
                wanted.entries,
                patience=PATIENCE_SECONDS,
                takes=self._door.takes,
                clock=self._clock,
            )
        found = self._assets.step(wait)
        if self._assets.done:
            self._wanted = None
            self._close_assets()
        return None if found is None else AssetRead(wanted.encoder, *found)

    def _close_assets(self) -> None:
        if self._assets is not None:
            self._assets.close()
            self._assets = None

    def _reader(self, wanted: _Wanted) -> VersionReader:
        reader = self._readers.get(wanted.encoder)
        if reader is None:
            size = Layout(wanted.instruction.layout).size
            reader = VersionReader(
                self._broker,
                self._topology,
                wanted.encoder,
                wanted.instruction.layout_digest,
                slice_bytes=encoded_size(slice_length(size, 0), "float32"),
                elements=size,
                named=self._named.setdefault(wanted.encoder, {}),
                takes=self._door.takes,
                shards=wanted.instruction.shards,
                clock=self._clock,
            )
            self._readers[wanted.encoder] = reader
        return reader
