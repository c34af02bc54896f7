"""What goes to the broker as AMQP has it: a declared queue as arguments, a body as frames. Knows no driver."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

from common.wire.broker import StreamPosition, Timestamp
from common.wire.topology import Queue

#: A frame (AMQP 0-9-1, 2.3.5): type, channel and length of the payload, then the payload, then the octet that ends it.
_FRAME_HEAD = struct.Struct(">BHI")
_BODY_FRAME = 3
_FRAME_END = b"\xce"


def body_frames(channel: int, body: bytes, most: int) -> list[bytes]:
    """A message's body as frames of at most `most` bytes of it each; none for an empty one."""
    view = memoryview(body)
    parts = (view[start : start + most] for start in range(0, len(view), most))
    return [b"".join((_FRAME_HEAD.pack(_BODY_FRAME, channel, len(part)), part, _FRAME_END)) for part in parts]


def queue_arguments(queue: Queue, server_version: tuple[int, ...]) -> dict[str, Any]:
    """The `x-` arguments of a queue.

    Quorum queues must not drop what consumers that died had prefetched. RabbitMQ 4 does so after 20 deliveries unless
    `x-delivery-limit` is -1; before 4 there is no limit by default. A queue is made with as many replicas as are
    wanted, or as there are servers; those that join later get none by themselves.
    """
    arguments: dict[str, Any] = {"x-queue-type": queue.kind}
    if queue.kind == "quorum" and server_version >= (4,):
        arguments["x-delivery-limit"] = -1
    if queue.max_bytes is not None:
        arguments["x-max-length-bytes"] = queue.max_bytes
    if queue.max_length is not None:
        arguments["x-max-length"] = queue.max_length
    if queue.overflow is not None:
        arguments["x-overflow"] = queue.overflow
    if queue.expires is not None:
        arguments["x-expires"] = round(queue.expires * 1000)
    if queue.replicas is not None:
        group = "x-initial-cluster-size" if queue.kind == "stream" else "x-quorum-initial-group-size"
        arguments[group] = queue.replicas
    if queue.segment_bytes is not None:
        arguments["x-stream-max-segment-size-bytes"] = queue.segment_bytes
    return arguments


def stream_offset(start: StreamPosition) -> str | int | datetime:
    """The value of `x-stream-offset`."""
    if isinstance(start, Timestamp):
        return datetime.fromtimestamp(start.seconds, UTC)
    return start


def version_of(server: str) -> tuple[int, ...]:
    """ "3.10.8" as (3, 10, 8)."""
    return tuple(int(part) for part in server.split("-")[0].split(".") if part.isdigit())
