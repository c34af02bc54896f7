"""An aggregator as a process: the broker's deliveries wait in a queue for the one thread that does what is ordered; one
beside it publishes, and one writes snapshots."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from common.clock import SYSTEM, Clock
from common.errors import BrokerUnavailable
from common.wire.broker import Broker, Delivery
from common.wire.topology import Topology
from common.workers import Worker
from master_service.log.deadly import Attempts, FileMark
from master_service.shards.shard import ORDERS_PREFETCH, Shard
from master_service.shards.store import ShardStore

log = structlog.get_logger()

#: Between two snapshots, in times of what it took to write the one before: they take a fiftieth of the time at most.
_APART = 50.0
#: How long the end waits for a thread that has done its work, seconds.
_JOIN_SECONDS = 5.0


@dataclass
class ShardService:
    """Runs aggregator `number` (from 0 on) of `shards` until stopped.

    Made: the state directory is locked and read. Raises LockHeld, UserError for the directory of another aggregator, or
    Damaged. `on_change` is called in the service's thread, again and again while it serves.
    """

    number: int
    shards: int
    state_dir: Path
    broker: Broker
    topology: Topology
    threads: int = 1
    snapshot_every_seconds: float = 60.0
    on_change: Callable[[ShardService], None] = lambda service: None
    clock: Clock = SYSTEM

    def __post_init__(self) -> None:
        torch.set_num_threads(self.threads)
        self._events: queue.SimpleQueue[Delivery | BaseException] = queue.SimpleQueue()
        self._to_publish: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._lost = threading.Event()
        self._snapshot: Worker | None = None
        #: Whether this process is the one that is this aggregator.
        self.has_lock = False
        self._snapshot_at, self._snapshot_took = self.clock.monotonic(), 0.0
        self._store = ShardStore(self.state_dir, self.number, self.shards)
        try:
            self.shard = Shard(
                self.number,
                self.shards,
                self.broker,
                self.topology,
                self._store,
                Attempts(FileMark(self.state_dir / "handling"), self._store),
                clock=self.clock,
                ending=self._ending,
                on_delivery=self._events.put,
                beside=self._to_publish.put,
            )
        except BaseException:
            self._store.close()
            raise

    @property
    def encoders(self) -> str:
        """What it holds, in words."""
        held = self.shard.holding.versions
        return ", ".join(f"{name} at version {version}" for name, version in held.items()) or "none yet"

    def waiting(self) -> dict[str, int]:
        """How much waits in this process, by where: deliveries for the thread that does them, orders for room on the
        disk."""
        return {"arrived": self._events.qsize(), "held": self.shard.without_room}

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set. Raises LockHeld if this aggregator runs already, BrokerUnavailable once its lock
        is lost, AccessRefused, UserError for a master of another number of shards, and whatever ended one of its
        threads."""
        self._ending = self.shard.ending = stop
        publishing = Worker("publishing", self._publish, self._events.put)
        try:
            self.broker.lock(self.topology.shard_lock(self.number), self._lost.set)
            self.has_lock = True
            self.shard.start()
            self._serve(stop)
        finally:
            self.shard.close()
            self._to_publish.put(None)
            publishing.join(_JOIN_SECONDS)
            if self._snapshot is not None:
                self._snapshot.join(_JOIN_SECONDS)
        # only here: after an error the memory may be half of a step
        self.shard.holding.snapshot()
        self._store.close()

    def _serve(self, stop: threading.Event) -> None:
        queue_ = self.topology.shard_queue(self.number)
        subscription = self.broker.consume(queue_, self._events.put, prefetch=ORDERS_PREFETCH)
        try:
            while not stop.is_set():
                with contextlib.suppress(queue.Empty):
                    event = self._events.get(timeout=max(0.001, self.shard.look()))
                    if isinstance(event, BaseException):
                        raise event
                    self.shard.hear(event)
                self._snapshot_in_time()
                self.on_change(self)
                if self._lost.is_set():
                    raise BrokerUnavailable("the lock of this aggregator was lost; another may have taken its place")
                self.broker.status().check()
        finally:
            subscription.close()

    def _publish(self) -> None:
        while (work := self._to_publish.get()) is not None:
            work()

    def _snapshot_in_time(self) -> None:
        if self._snapshot is not None and self._snapshot.join(0.0):
            self._snapshot = None
            self._store.sweep()
        wait = max(self.snapshot_every_seconds, _APART * self._snapshot_took)
        if self.clock.monotonic() - self._snapshot_at < wait or not self.shard.holding.changed:
            return
        if self._snapshot is None:
            self._snapshot_at = self.clock.monotonic()
            self._snapshot = Worker("snapshot", self._write_snapshot, self._events.put)

    def _write_snapshot(self) -> None:
        begun = self.clock.monotonic()
        try:
            self.shard.holding.snapshot()
        except OSError as error:
            log.warning("a snapshot cannot be written; a start computes more steps again", problem=str(error))
        self._snapshot_took = self.clock.monotonic() - begun
