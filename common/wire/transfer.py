"""Large payloads as chunks beside small messages: cut up, checked, put together again.

Up: a node's update travels as `UpdateChunk`s through its own chunk queue, then as one manifest. Down: a target
parameter set travels as `ParameterChunk`s on the encoder's stream, written once and read by any number of nodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import xxhash

from common.errors import Poison
from common.numbers.memory import Bytes, fresh
from common.numbers.slicing import encoded_size, payload_size, shard_slices, slice_bytes, slice_count, slice_length
from common.wire.to_master import UpdateChunk, UpdateManifest
from common.wire.to_node import AssetChunk, ParameterChunk


def checksum(data: bytes) -> str:
    """xxh3-64 of a chunk's payload, hexadecimal: finds damage, proves nothing against malice (the digest does)."""
    return str(xxhash.xxh3_64_hexdigest(data))


def payload_digest(bodies: Sequence[bytes], shards: int = 1) -> str:
    """The digest of concatenated slices, hexadecimal; see `combined` for several shards."""
    return combined([_sha256(bodies[part.start : part.stop]) for part in shard_slices(len(bodies), shards)])


def combined(parts: Sequence[str]) -> str:
    """The digest of a whole of which each shard has hashed its part: sha256 over the parts' digests as bytes, one after
    the other; with a single part, its own. Hexadecimal all."""
    return parts[0] if len(parts) == 1 else hashlib.sha256(bytes.fromhex("".join(parts))).hexdigest()


def _sha256(bodies: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for body in bodies:
        digest.update(body)
    return digest.hexdigest()


def verify(chunk: UpdateChunk | ParameterChunk | AssetChunk) -> None:
    """Raises Poison if the payload is not what was sent."""
    if checksum(chunk.data) != chunk.checksum:
        raise Poison("checksum", f"chunk {chunk.index} of {chunk.encoder} does not match its checksum")


def update_chunk(manifest: UpdateManifest, index: int, body: bytes) -> UpdateChunk:
    """The chunk of a manifest that carries the slice of this index."""
    return UpdateChunk(
        node=manifest.node,
        incarnation=manifest.incarnation,
        encoder=manifest.encoder,
        sequence=manifest.sequence,
        attempt=manifest.attempt,
        order=manifest.order,
        index=index,
        checksum=checksum(body),
        data=body,
    )


class InOrder:
    """Slices that come in any order and any number of times, given on each once and in their order. Those that follow
    each other are not kept."""

    def __init__(self) -> None:
        self.next = 0
        self._early: dict[int, bytes] = {}

    def take(self, index: int, body: bytes) -> Iterator[bytes]:
        """What this slice makes follow, itself first; nothing while one before it is missing, or if it was here."""
        if index < self.next:
            return
        self._early.setdefault(index, body)
        while (following := self._early.pop(self.next, None)) is not None:
            self.next += 1
            yield following

    @property
    def came(self) -> int:
        """How many different ones have come."""
        return self.next + len(self._early)


class UpdateAssembly:
    """Puts the chunks of one manifest into their order. What belongs to an older attempt is discarded, what is newer is
    not ours. `part`: those of its chunks that are to come; all by default."""

    def __init__(self, manifest: UpdateManifest, part: range | None = None) -> None:
        self.manifest = manifest
        self._part = range(manifest.chunks) if part is None else part
        self._slices = InOrder()

    def add(self, chunk: UpdateChunk) -> list[bytes] | None:
        """Take a chunk: the slices whose turn it is by that, each once and in order. None if it belongs to another
        update or attempt. Raises Poison."""
        verify(chunk)
        wanted = self.manifest
        if (chunk.node, chunk.encoder, chunk.incarnation, chunk.sequence, chunk.attempt) != (
            wanted.node,
            wanted.encoder,
            wanted.incarnation,
            wanted.sequence,
            wanted.attempt,
        ):
            return None
        if len(chunk.data) > slice_bytes(wanted.encoding):
            raise Poison("oversize", f"chunk {chunk.index} of {wanted.update_id} has {len(chunk.data)} bytes")
        return list(self._slices.take(chunk.index - self._part.start, chunk.data)) if chunk.index in self._part else []

    @property
    def complete(self) -> bool:
        return self._slices.next == len(self._part)


#: Unfinished versions that are kept: two that masters left, and one that is being written.
_UNFINISHED = 3


class _Part:
    """What one shard writes of a version: these of its chunks, the first of which begins at this byte."""

    def __init__(self, chunks: range, at: int) -> None:
        self.chunks = chunks
        self.at = at
        self.digest = hashlib.sha256()
        self.slices = InOrder()


class _Begun:
    """A version of which chunks have come: as soon as all of its part before it are there, a chunk is put behind them
    and hashed, while it is in the processor's cache; what comes before its turn waits."""

    def __init__(self, first: ParameterChunk, size: int | None, shards: int) -> None:
        """`size`: bytes of all of them, if every chunk is known to be a slice of so long a payload."""
        self._chunks = first.chunks
        self._payload = bytearray() if size is None else fresh(size)
        parts, length = shard_slices(first.chunks, shards), slice_bytes(first.encoding)
        self._parts = [_Part(part, part.start * length) for part in parts]

    def add(self, chunk: ParameterChunk) -> None:
        """Take a chunk, once, however often it comes. Raises Poison if the chunks do not agree on how many they are."""
        if chunk.chunks != self._chunks:
            raise Poison("invalid", f"the chunks of version {chunk.version} do not agree on how many they are")
        part = next(part for part in self._parts if chunk.index in part.chunks)
        for data in part.slices.take(chunk.index - part.chunks.start, chunk.data):
            # a bytearray that is too short grows
            self._payload[part.at : part.at + len(data)] = data
            part.at += len(data)
            part.digest.update(data)

    @property
    def came(self) -> int:
        """How many of its chunks are here."""
        return sum(part.slices.came for part in self._parts)

    @property
    def lacks(self) -> int:
        """How many are not."""
        return self._chunks - self.came

    def complete(self, last: ParameterChunk) -> CompleteVersion:
        """The version, if it is what the chunk that came last says. Raises Poison."""
        digest = combined([part.digest.hexdigest() for part in self._parts])
        if len(self._payload) != last.size or digest != last.digest:
            raise Poison("digest", f"version {last.version} of {last.encoder} does not match its digest")
        return CompleteVersion(last, self._payload)


class VersionAssembly:
    """Puts versions together from a stream in which masters may have written twice, or died in between.

    Chunks are gathered by epoch, version and digest; duplicates are dropped; a set counts when every index is there and
    the digest holds. A few unfinished versions are kept, so that memory does not grow: those that most chunks have come
    of, because anybody can begin versions that nobody ends. `elements`: how many numbers a version has, if that is
    known: then a chunk must be as long as a slice of it. `counts`: whether a chunk's version counts at all. `shards`:
    so many write each their part of a version, at the same time; more than one need `elements`.
    """

    def __init__(
        self,
        encoder: str,
        layout_digest: str,
        *,
        elements: int | None = None,
        counts: Callable[[ParameterChunk], bool] = lambda chunk: True,
        shards: int = 1,
    ) -> None:
        assert shards == 1 or elements is not None, "where a part begins follows from the whole"
        self.encoder = encoder
        self.layout_digest = layout_digest
        self._elements = elements
        self._counts = counts
        self._shards = shards
        #: By epoch, version and digest: two that claim one number do not mix.
        self._begun: dict[tuple[int, int, str], _Begun] = {}

    def add(self, chunk: ParameterChunk) -> CompleteVersion | None:
        """The version that this chunk completes, if any. Raises Poison for a damaged chunk or a foreign layout."""
        verify(chunk)
        if chunk.encoder != self.encoder or chunk.layout_digest != self.layout_digest:
            raise Poison("layout", f"a chunk of {chunk.encoder} with another layout is on the stream of {self.encoder}")
        if chunk.index >= chunk.chunks:
            raise Poison("invalid", f"chunk {chunk.index} of {chunk.chunks}")
        if (elements := self._elements) is not None:
            _check_length(chunk, elements)
        if not self._counts(chunk):
            return None
        key = _key(chunk)
        begun = self._begun.get(key)
        if begun is None:
            size = None if self._elements is None else chunk.size
            begun = self._begun[key] = _Begun(chunk, size, self._shards)
        try:
            begun.add(chunk)
        except Poison:
            del self._begun[key]
            raise
        while len(self._begun) > _UNFINISHED:
            others = [other for other in reversed(self._begun) if other != key]  # what was begun last goes first
            del self._begun[min(others, key=lambda other: self._begun[other].came)]
        if begun.lacks:
            return None
        del self._begun[key]
        return begun.complete(chunk)

    def lacks(self, chunk: ParameterChunk) -> int:
        """How many chunks the version of this one still lacks, if it is one that is being put together; else 0."""
        begun = self._begun.get(_key(chunk))
        return begun.lacks if begun is not None else 0


def _key(chunk: ParameterChunk) -> tuple[int, int, str]:
    return chunk.epoch, chunk.version, chunk.digest


def _check_length(chunk: ParameterChunk, elements: int) -> None:
    """Raises Poison for a chunk that is no slice of a vector of so many elements."""
    count = slice_length(elements, chunk.index)
    if (
        chunk.chunks != slice_count(elements)
        or chunk.size != payload_size(elements, chunk.encoding)
        or len(chunk.data) != encoded_size(count, chunk.encoding)
    ):
        raise Poison("size", f"chunk {chunk.index} of version {chunk.version} of {chunk.encoder} is no slice of it")


class CompleteVersion:
    """An encoded target parameter set as it was read from the stream; `head` is any of its chunks."""

    def __init__(self, head: ParameterChunk, payload: Bytes) -> None:
        self.encoder = head.encoder
        self.epoch = head.epoch
        self.version = head.version
        self.encoding = head.encoding
        self.progress = head.progress
        self.digest = head.digest
        self.payload = payload
