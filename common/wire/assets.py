"""Assets on their stream: what nodes need of an encoder beside its architecture, such as a tokenizer.

The master writes each once, in small chunks, and again when a node asks; whoever needs one reads the stream from its
beginning until it has it whole. What an asset is, its digest says: the instruction names it, the log knows it.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from common.clock import SYSTEM, Clock
from common.errors import BrokerUnavailable, Poison
from common.wire.broker import Broker, Delivery, Publication, Subscription
from common.wire.codec import encode, received
from common.wire.fields import ASSET_CHUNK_BYTES, AssetEntry
from common.wire.to_node import AssetChunk
from common.wire.topology import Topology
from common.wire.transfer import checksum, verify

#: How long a stream may be silent before its reader gives up, seconds; one chunk on the slowest line takes 11.
_PATIENCE_SECONDS = 15.0


def asset_entry(name: str, content: bytes) -> AssetEntry:
    """What is said of an asset. Raises ValidationError for a name that is no file name, or for too many bytes."""
    return AssetEntry(name=name, digest=hashlib.sha256(content).hexdigest(), size=len(content))


def is_asset(entry: AssetEntry, content: bytes) -> bool:
    """Whether these are the bytes of the asset."""
    return len(content) == entry.size and hashlib.sha256(content).hexdigest() == entry.digest


def chunk_count(entry: AssetEntry) -> int:
    """How many chunks an asset travels in; an empty one in one."""
    return max(1, -(-entry.size // ASSET_CHUNK_BYTES))


def asset_chunks(encoder: str, entry: AssetEntry, content: bytes) -> Iterator[AssetChunk]:
    """An asset as it travels."""
    chunks = chunk_count(entry)
    for index in range(chunks):
        data = content[index * ASSET_CHUNK_BYTES : (index + 1) * ASSET_CHUNK_BYTES]
        yield AssetChunk(
            encoder=encoder,
            name=entry.name,
            digest=entry.digest,
            size=entry.size,
            index=index,
            chunks=chunks,
            checksum=checksum(data),
            data=data,
        )


def publish_asset(broker: Broker, topology: Topology, encoder: str, entry: AssetEntry, content: bytes) -> None:
    """Write an asset to its encoder's stream, confirmed. Raises Unroutable if the stream is not there."""
    chunks = asset_chunks(encoder, entry, content)
    broker.publish(*(Publication(topology.asset, encoder, encode(chunk)) for chunk in chunks))


class AssetAssembly:
    """Puts the wanted assets together from a stream in which they may stand several times, in part, or damaged.

    Of each index the newest chunk counts, so that a whole copy makes an asset whole, whatever came before it. Only
    chunks of wanted assets are kept, of each as many bytes as it has: memory is bounded by what is wanted.
    """

    def __init__(self, encoder: str, wanted: Iterable[AssetEntry]) -> None:
        self._encoder = encoder
        #: By digest; two names of the same bytes are one asset here.
        self._wanted = {entry.digest: entry for entry in wanted}
        self._parts: dict[str, dict[int, bytes]] = {}

    @property
    def missing(self) -> list[AssetEntry]:
        """The assets that are not whole yet."""
        return list(self._wanted.values())

    def add(self, chunk: AssetChunk) -> tuple[AssetEntry, bytes] | None:
        """The asset that this chunk makes whole, if any; it is given once. Raises Poison for a damaged chunk."""
        entry = self._wanted.get(chunk.digest)
        if entry is None:
            return None
        verify(chunk)
        start = chunk.index * ASSET_CHUNK_BYTES
        length = min(ASSET_CHUNK_BYTES, entry.size - start)
        if chunk.encoder != self._encoder or chunk.index >= chunk_count(entry) or len(chunk.data) != length:
            raise Poison("invalid", f"chunk {chunk.index} of asset {entry.name} is none of its chunks")
        parts = self._parts.setdefault(entry.digest, {})
        if parts.get(chunk.index) == chunk.data:
            return None  # of another copy: nothing that was not whole becomes so
        parts[chunk.index] = chunk.data
        if len(parts) < chunk_count(entry):
            return None
        content = b"".join(parts[index] for index in range(len(parts)))
        if not is_asset(entry, content):
            return None  # a chunk is wrong, and its checksum too: the next copy has the right one
        del self._wanted[entry.digest], self._parts[entry.digest]
        return entry, content


class AssetReader:
    """Reads assets from an encoder's stream; stepped by whoever owns it. The stream need not be there yet."""

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        encoder: str,
        wanted: Iterable[AssetEntry],
        *,
        patience: float = _PATIENCE_SECONDS,
        takes: Callable[[Delivery], bool] = lambda delivery: True,
        clock: Clock = SYSTEM,
    ) -> None:
        """`patience`: `step` raises after so many seconds in which nothing came over the stream. What `takes` says no
        to is as if it were not there."""
        self._encoder = encoder
        self._stream = topology.asset_stream(encoder)
        self._assembly = AssetAssembly(encoder, wanted)
        self._clock = clock
        self._patience = patience
        self._takes = takes
        self._heard_at = clock.monotonic()
        self._broker = broker
        self._arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._subscription: Subscription | None = None

    @property
    def done(self) -> bool:
        """Whether everything that was wanted has been given."""
        return not self._assembly.missing

    def step(self, wait: float = 0.0) -> tuple[AssetEntry, bytes] | None:
        """Take what has come, waiting up to `wait` seconds for more; an asset, as soon as it is whole. Raises
        BrokerUnavailable when nothing came for too long."""
        if self._subscription is None:
            with suppress(BrokerUnavailable):  # tried again at the next step
                self._subscription = self._broker.read_stream(self._stream, self._arrived.put, start="first")
        while not self.done:
            try:
                delivery = self._arrived.get(timeout=wait) if wait > 0 else self._arrived.get_nowait()
            except queue.Empty:
                if self._clock.monotonic() - self._heard_at >= self._patience:
                    names = ", ".join(entry.name for entry in self._assembly.missing)
                    raise BrokerUnavailable(
                        f"{names} of {self._encoder} did not come over the stream in {self._patience:.0f} s"
                    ) from None
                return None
            wait = 0.0
            self._broker.ack(delivery)
            if not self._takes(delivery):
                continue
            self._heard_at = self._clock.monotonic()
            if (found := self._taken(delivery)) is not None:
                return found
        return None

    def close(self) -> None:
        """Stop reading."""
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def _taken(self, delivery: Delivery) -> tuple[AssetEntry, bytes] | None:
        try:
            chunk = received(delivery)
            return self._assembly.add(chunk) if isinstance(chunk, AssetChunk) else None
        except Poison:
            return None  # not on the stream for this reader; another copy will be


def read_assets(
    broker: Broker,
    topology: Topology,
    encoder: str,
    wanted: Iterable[AssetEntry],
    *,
    takes: Callable[[Delivery], bool] = lambda delivery: True,
    clock: Clock = SYSTEM,
) -> dict[str, bytes]:
    """All of these assets by name, once they are here. Raises BrokerUnavailable if they do not come."""
    entries = list(wanted)
    if not entries:
        return {}
    found: dict[str, bytes] = {}
    reader = AssetReader(broker, topology, encoder, entries, takes=takes, clock=clock)
    try:
        while not reader.done:
            if (read := reader.step(wait=0.25)) is not None:
                found[read[0].digest] = read[1]
    finally:
        reader.close()
    return {entry.name: found[entry.digest] for entry in entries}
