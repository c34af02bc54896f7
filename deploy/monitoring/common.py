"""What every party's metrics say: pure, from what its monitor knows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from common.wire.broker import BrokerStatus
from deploy.monitoring.health import OK, Parts
from deploy.monitoring.table import Role, Sample


@dataclass(frozen=True, slots=True)
class Disk:
    """The state directory and its disk. `free_bytes`: None if it cannot be read; `parts`: bytes of its parts, None
    before they were measured; `growth`: of ledger and payloads, bytes a day; `seconds_left`: until `needed_bytes`."""

    free_bytes: int | None = None
    needed_bytes: int = 0
    parts: Mapping[str, int] | None = None
    growth: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A party as its monitor sees it. `loop_age`: seconds, None before it serves; `problems`: logged lines by level;
    `error_at`: seconds since 1970; `queues`: what waits in the process."""

    role: Role
    name: str
    version: str
    parts: Parts
    broker: BrokerStatus | None = None
    disk: Disk = Disk()
    loop_age: float | None = None
    problems: Mapping[str, int] = field(default_factory=dict)
    error_at: float | None = None
    queues: Mapping[str, int] = field(default_factory=dict)


def samples(seen: Seen) -> Iterator[Sample]:
    """What is the same for all, whether it serves already or not."""
    role = {"role": seen.role}
    yield Sample("build_info", 1, {**role, "name": seen.name, "version": seen.version})
    for part, words in seen.parts.items():
        yield Sample("ready", words == OK, {**role, "part": part})
    if seen.loop_age is not None:
        yield Sample("loop_age_seconds", seen.loop_age, role)
    for level, count in seen.problems.items():
        yield Sample("logged_problems_total", count, {**role, "level": level})
    if seen.error_at is not None:
        yield Sample("last_error_timestamp_seconds", seen.error_at, role)
    for queue, waiting in seen.queues.items():
        yield Sample("queue_messages", waiting, {**role, "queue": queue})
    yield from _broker(seen.broker, role)
    yield from _disk(seen.disk, role)


def _broker(status: BrokerStatus | None, role: Mapping[str, str]) -> Iterator[Sample]:
    yield Sample("broker_connected", status is not None and status.connected, role)
    yield Sample("broker_blocked", status is not None and bool(status.blocked), role)
    # one that is away now is not counted as made again yet
    lost = 0 if status is None else status.reconnects + (not status.connected)
    yield Sample("broker_disconnects_total", lost, role)
    yield Sample("broker_sent_bytes_total", status.bytes_out if status else 0, role)
    yield Sample("broker_received_bytes_total", status.bytes_in if status else 0, role)


def _disk(disk: Disk, role: Mapping[str, str]) -> Iterator[Sample]:
    if disk.free_bytes is not None:
        yield Sample("disk_free_bytes", disk.free_bytes, role)
    for part, size in (disk.parts or {}).items():
        yield Sample("state_bytes", size, {**role, "part": part})
    if disk.growth is not None:
        yield Sample("state_growth_bytes_per_day", disk.growth, role)
    if disk.seconds_left is not None:
        yield Sample("disk_remaining_seconds", disk.seconds_left, role)
