"""A declared queue as RabbitMQ's arguments; a routing of client errors to ours. Knows AMQP's words, not the driver."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from common.wire.broker import StreamPosition, Timestamp
from common.wire.topology import Queue


def queue_arguments(queue: Queue, server_version: tuple[int, ...]) -> dict[str, Any]:
    """The `x-` arguments of a queue.

    Quorum queues must not drop what consumers that died had prefetched. RabbitMQ 4 does so after 20 deliveries unless
    `x-delivery-limit` is -1; before 4 there is no limit by default.
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
