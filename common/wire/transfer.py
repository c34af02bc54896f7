"""Large payloads as chunks beside small messages: cut up, checked, put together again.

Up: a node's update travels as `UpdateChunk`s through its own chunk queue, then as one manifest. Down: a target
parameter set travels as `ParameterChunk`s on the encoder's stream, written once and read by any number of nodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import xxhash

from common.errors import Poison
from common.numbers.slicing import encoded_size, payload_size, slice_bytes, slice_count, slice_length
from common.wire.to_master import UpdateChunk, UpdateManifest
from common.wire.to_node import AssetChunk, ParameterChunk


def checksum(data: bytes) -> str:
    """xxh3-64 of a chunk's payload, hexadecimal: finds damage, proves nothing against malice (the digest does)."""
    return str(xxhash.xxh3_64_hexdigest(data))


def payload_digest(bodies: Iterable[bytes]) -> str:
    """sha256 over the concatenated slices, hexadecimal."""
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


class UpdateAssembly:
    """Collects the chunks of one manifest. What belongs to an older attempt is discarded, what is newer is not ours."""

    def __init__(self, manifest: UpdateManifest, *, keep: bool = True) -> None:
        """Without `keep` the chunks are counted and not stored."""
        self.manifest = manifest
        self._keep = keep
        self._bodies: dict[int, bytes] = {}

    def add(self, chunk: UpdateChunk) -> bool:
        """Take a chunk if it belongs here; False if it belongs to another update or attempt. Raises Poison."""
        verify(chunk)
        wanted = self.manifest
        if (chunk.node, chunk.encoder, chunk.incarnation, chunk.sequence, chunk.attempt) != (
            wanted.node,
            wanted.encoder,
            wanted.incarnation,
            wanted.sequence,
            wanted.attempt,
        ):
            return False
        if len(chunk.data) > slice_bytes(wanted.encoding):
            raise Poison("oversize", f"chunk {chunk.index} of {wanted.update_id} has {len(chunk.data)} bytes")
        if chunk.index < wanted.chunks:
            self._bodies[chunk.index] = chunk.data if self._keep else b""
        return True

    @property
    def complete(self) -> bool:
        return len(self._bodies) == self.manifest.chunks

    def payload(self) -> bytes:
        """The whole encoded update; only when complete."""
        return b"".join(self._bodies[index] for index in range(self.manifest.chunks))


#: Unfinished versions that are kept: two that masters left, and one that is being written.
_UNFINISHED = 3


class VersionAssembly:
    """Puts versions together from a stream in which masters may have written twice, or died in between.

    Chunks are gathered by epoch, version and digest; duplicates are dropped; a set counts when every index is there and
    the digest holds. A few unfinished versions are kept, so that memory does not grow: those that most chunks have come
    of, because anybody can begin versions that nobody ends. `elements`: how many numbers a version has, if that is
    known: then a chunk must be as long as a slice of it. `counts`: whether a chunk's version counts at all.
    """

    def __init__(
        self,
        encoder: str,
        layout_digest: str,
        *,
        elements: int | None = None,
        counts: Callable[[ParameterChunk], bool] = lambda chunk: True,
    ) -> None:
        self.encoder = encoder
        self.layout_digest = layout_digest
        self._elements = elements
        self._counts = counts
        #: By epoch, version and digest: two that claim one number do not mix.
        self._parts: dict[tuple[int, int, str], dict[int, ParameterChunk]] = {}

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
        key = (chunk.epoch, chunk.version, chunk.digest)
        parts = self._parts.setdefault(key, {})
        parts[chunk.index] = chunk
        while len(self._parts) > _UNFINISHED:
            others = [other for other in reversed(self._parts) if other != key]  # what was begun last goes first
            del self._parts[min(others, key=lambda other: len(self._parts[other]))]
        if len(parts) < chunk.chunks:
            return None
        del self._parts[key]
        if any(index not in parts for index in range(chunk.chunks)):
            raise Poison("invalid", f"the chunks of version {chunk.version} do not agree on how many they are")
        payload = b"".join(parts[index].data for index in range(chunk.chunks))
        if len(payload) != chunk.size or payload_digest([payload]) != chunk.digest:
            raise Poison("digest", f"version {chunk.version} of {chunk.encoder} does not match its digest")
        return CompleteVersion(chunk, payload)


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

    def __init__(self, head: ParameterChunk, payload: bytes) -> None:
        self.encoder = head.encoder
        self.epoch = head.epoch
        self.version = head.version
        self.encoding = head.encoding
        self.progress = head.progress
        self.digest = head.digest
        self.payload = payload
