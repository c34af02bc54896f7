"""One way to say what is well formed: tests take it from here, and change what they are about."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

from common.numbers.layout import Layout
from common.numbers.slicing import payload_size, slice_count
from common.wire.to_master import UpdateChunk, UpdateManifest
from common.wire.transfer import payload_digest, update_chunk
from master_service.arithmetic.arithmetic import Encoded

LAYOUT = Layout([("layer.weight", (4, 8)), ("layer.bias", (4,))])


def update_manifest(
    node: str, sequence: int, *, of: Layout = LAYOUT, bodies: Sequence[bytes] | None = None, **changes: Any
) -> UpdateManifest:
    """An update of the parameters that `of` lays out against version 0 of `text-1`, in int8, but for `changes`.

    Size, chunks and digest are those of `bodies`; without them what the layout demands, and a digest of its own.
    """
    encoding = changes.get("encoding", "int8")
    plain: dict[str, Any] = {
        "node": node,
        "incarnation": "first",
        "encoder": "text-1",
        "sequence": sequence,
        "base_version": 0,
        "steps": 10,
        "samples": 320,
        "seconds": 1.0,
        "loss": 5.0,
        "encoding": encoding,
        "layout_digest": of.digest,
    }
    if bodies is None:
        plain |= {"size": payload_size(of.size, encoding), "chunks": slice_count(of.size)}
        plain["digest"] = hashlib.sha256(f"{node}/{sequence}".encode()).hexdigest()
    else:
        plain |= {"size": sum(map(len, bodies)), "chunks": len(bodies), "digest": payload_digest(bodies)}
    return UpdateManifest(**{**plain, **changes})


def encoded(bodies: Sequence[bytes]) -> Encoded:
    """A version of these slices, as it is published."""
    return Encoded(list(bodies), payload_digest(bodies))


def update_chunks(manifest: UpdateManifest, bodies: Sequence[bytes]) -> list[UpdateChunk]:
    """All chunks of an update."""
    return [update_chunk(manifest, index, body) for index, body in enumerate(bodies)]


def header_table(*fields: bytes) -> bytes:
    """A header table of AMQP: a name of one letter before each value."""
    content = b"".join(b"\x01" + bytes([ord("a") + index]) + field for index, field in enumerate(fields))
    return struct.pack(">I", len(content)) + content


def _levels(count: int) -> bytes:
    inner = header_table()
    for _ in range(count):
        inner = header_table(b"F" + inner)
    return b"F" + inner


#: Values of headers that the driver fails on. RabbitMQ carries all but the numbers, whose publisher it cuts off.
ODD_FIELDS = {
    "a time out of range": b"T" + struct.pack(">Q", 2**63),
    "the year 36812": b"T" + struct.pack(">Q", 1 << 40),
    "a number that is none": b"f" + struct.pack(">f", float("nan")),
    "infinity in a list": b"A" + struct.pack(">I", 9) + b"d" + struct.pack(">d", float("inf")),
    "1,500 levels": _levels(1_500),
}
