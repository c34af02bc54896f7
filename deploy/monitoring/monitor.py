"""How one service is seen over HTTP. The thread that serves calls `update` as it turns, and leaves a copy of its
figures there once a second; whoever scrapes reads that copy, and never the service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

from common.clock import SYSTEM, Clock
from common.wire.broker import Broker, BrokerStatus
from deploy.logging import Noticed
from deploy.monitoring import common, master, node
from deploy.monitoring.common import Disk, Seen
from deploy.monitoring.disk import LOG_PARTS, DiskWatch
from deploy.monitoring.health import OK, Heart, Parts, broker_part, disk_part, hung, lock_part, log_part
from deploy.monitoring.table import Role, Sample

if TYPE_CHECKING:
    from master_service.counts import Counts
    from master_service.service import MasterService
    from master_service.shards.service import ShardService
    from master_service.status import Report
    from node_service.service import NodeService

#: Between two copies of the figures, seconds, and at least so many times of what one took: with thousands of nodes they
#: cost a fiftieth of the thread that decides, at most.
_EVERY_SECONDS, _APART = 1.0, 50.0


class Service(Protocol):
    """What every service has."""

    @property
    def has_lock(self) -> bool:
        """Whether this process has taken its name at the broker."""


S = TypeVar("S", bound=Service)
T = TypeVar("T")


class Monitor(ABC, Generic[S, T]):
    """One service from its start on: it is told of the broker and of the service as they come.

    `name`: which node or aggregator; `needed_bytes`: of free disk; `noticed`: what was logged.
    """

    role: ClassVar[Role]
    disk_parts: ClassVar[Mapping[str, str]] = LOG_PARTS

    def __init__(
        self, name: str, state_dir: Path, noticed: Noticed, *, needed_bytes: int = 0, clock: Clock = SYSTEM
    ) -> None:
        self.name = name
        self.version = version("shared-encoder")
        self.noticed = noticed
        self.disk = DiskWatch(state_dir, needed_bytes, clock, parts=self.disk_parts)
        self._clock = clock
        self._broker: Broker | None = None
        self._waiting = ""
        self._service: S | None = None
        self._taken: T | None = None
        self._heart = Heart()
        self._take_at = 0.0

    # --- in the thread that serves -----------------------------------------------------------------------------------

    def waiting(self, problem: str) -> None:
        """There is no broker yet, and this is why."""
        self._waiting = problem

    def connected(self, broker: Broker) -> None:
        """There is one."""
        self._broker = broker

    def made(self, service: S) -> None:
        """The service is about to run."""
        self._service = service

    def update(self, service: S) -> None:
        """The service's loop has come round: its `on_change`."""
        begun = self._clock.monotonic()
        self._heart = self._heart.beaten(begun)
        if begun >= self._take_at:
            self._taken = self.take(service)
            took = self._clock.monotonic() - begun
            self._take_at = begun + max(_EVERY_SECONDS, _APART * took)

    # --- in whatever thread ------------------------------------------------------------------------------------------

    def hung(self) -> str:
        """Why the process is to be killed; empty if it is not."""
        return hung(self._heart, self._clock.monotonic(), self._status(), self.missing())

    def parts(self) -> Parts:
        """What /readyz says."""
        status, taken, disk = self._status(), self._taken, self.disk.look()
        has_lock = self._service is not None and self._service.has_lock
        return {
            "broker": broker_part(status, self._waiting),
            "lock": lock_part(status, has_lock),
            **self.own_parts(taken, disk),
            "loop": self.hung() or OK,
        }

    def samples(self) -> Iterator[Sample]:
        """What /metrics says."""
        parts, taken, beat_at = self.parts(), self._taken, self._heart.beat_at
        seen = Seen(
            self.role,
            self.name,
            self.version,
            parts,
            self._status(),
            self.disk.look(),
            self._clock.monotonic() - beat_at if beat_at is not None else None,
            self.noticed.lines,
            self.noticed.error_at,
            self.queues(taken) if taken is not None else {},
        )
        return chain(common.samples(seen), self.own_samples(taken) if taken is not None else ())

    def _status(self) -> BrokerStatus | None:
        return self._broker.status() if self._broker is not None else None

    # --- what each service has ---------------------------------------------------------------------------------------

    def missing(self) -> str:
        """Other processes that it waits for, in words; empty if for none. In whatever thread."""
        return ""

    @abstractmethod
    def take(self, service: S) -> T:
        """A copy of the service's figures that nobody changes any more; called in the thread that serves."""

    @abstractmethod
    def own_parts(self, taken: T | None, disk: Disk) -> Parts:
        """The parts beside broker and lock."""

    @abstractmethod
    def own_samples(self, taken: T) -> Iterator[Sample]:
        """What this kind of service has."""

    @abstractmethod
    def queues(self, taken: T) -> Mapping[str, int]:
        """What waits in the process, by where."""


@dataclass(frozen=True, slots=True)
class MasterTaken:
    """Of the master, at a moment."""

    report: Report
    counts: Counts
    queues: Mapping[str, int]


class MasterMonitor(Monitor["MasterService", MasterTaken]):
    """Of a master: it is ready once it decides, and all that it needs for that works."""

    role = "master"

    def take(self, service: MasterService) -> MasterTaken:
        return MasterTaken(service.report(), service.counts.copy(), service.waiting())

    def missing(self) -> str:
        return self._service.missing if self._service is not None else ""

    def own_parts(self, taken: MasterTaken | None, disk: Disk) -> Parts:
        short, blocked = (taken.report.disk.short, taken.report.log.blocked) if taken is not None else (False, "")
        return {
            "disk": disk_part(disk.free_bytes, disk.needed_bytes, short),
            "log": log_part(taken is not None, self.missing(), blocked),
        }

    def own_samples(self, taken: MasterTaken) -> Iterator[Sample]:
        return master.samples(taken.report, taken.counts, taken.report.disk.needed_bytes)

    def queues(self, taken: MasterTaken) -> Mapping[str, int]:
        return taken.queues


class NodeMonitor(Monitor["NodeService", node.NodeSeen]):
    """Of a node: it is ready once it hears the master's queues; whether it trains then, its metrics say."""

    role = "node"
    disk_parts: ClassVar[Mapping[str, str]] = {}

    def take(self, service: NodeService) -> node.NodeSeen:
        figures = replace(service.figures, lost_seconds=dict(service.figures.lost_seconds))
        owed = service.node.state.owed if service.node is not None else {}
        owed_bytes = sum(manifest.size for manifest in owed.values())
        return node.NodeSeen(figures, service.samples, service.sending_seconds, len(owed), owed_bytes)

    def own_parts(self, taken: node.NodeSeen | None, disk: Disk) -> Parts:
        return {"disk": disk_part(disk.free_bytes, disk.needed_bytes)}

    def own_samples(self, taken: node.NodeSeen) -> Iterator[Sample]:
        return node.samples(taken)

    def queues(self, taken: node.NodeSeen) -> Mapping[str, int]:
        return {}


@dataclass(frozen=True, slots=True)
class AggregatorTaken:
    """Of an aggregator, at a moment."""

    versions: Mapping[str, int]
    queues: Mapping[str, int]


class AggregatorMonitor(Monitor["ShardService", AggregatorTaken]):
    """Of one of several aggregators: it is ready once it takes orders."""

    role = "aggregator"

    def take(self, service: ShardService) -> AggregatorTaken:
        return AggregatorTaken(dict(service.shard.holding.versions), service.waiting())

    def own_parts(self, taken: AggregatorTaken | None, disk: Disk) -> Parts:
        held = taken.queues["held"] if taken is not None else 0
        return {"disk": disk_part(disk.free_bytes, disk.needed_bytes, held=held)}

    def own_samples(self, taken: AggregatorTaken) -> Iterator[Sample]:
        newest = list(taken.versions.items())[-master.MOST_ENCODERS :]
        return (Sample("aggregator_version", number, {"encoder": name}) for name, number in newest)

    def queues(self, taken: AggregatorTaken) -> Mapping[str, int]:
        return taken.queues
