"""A master as a process: the broker's deliveries wait in a queue for the one thread that decides. Nothing is decided
here."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from common.clock import SYSTEM, Clock
from common.errors import BrokerUnavailable, ShardsAway
from common.events import BrokerWatch
from common.wire.broker import Broker, Delivery
from common.wire.topology import Topology
from common.workers import Worker
from master_service.arithmetic.export import check_export_directory
from master_service.config import MasterConfig
from master_service.counts import Counts
from master_service.decisions.changes import Logged, changed
from master_service.decisions.settings import Settings, settings_of_start
from master_service.history.retention import said_of
from master_service.history.snapshot import SnapshotDirectory, Snapshots
from master_service.history.state_directory import open_journal, random_id
from master_service.log.message_log import MessageLog, logged_shards
from master_service.master import INBOX_PREFETCH, UPDATES_PREFETCH, Master
from master_service.shards.remote import RemoteSnapshots
from master_service.status import Report
from master_service.wire import orders
from master_service.wire.pace import bounded
from master_service.wire.shards import Shards

log = structlog.get_logger()

#: What comes within so many seconds of each other is made durable together.
_GROUP_SECONDS = 0.02
#: How long the end waits for a thread that has done its work, seconds.
_JOIN_SECONDS = 1.0


@dataclass
class MasterService:
    """Runs until stopped, or until all encoders are finished if so configured.

    Made: the state directory is locked and the newest snapshot read. Raises LockHeld, which names the holder, Damaged,
    or UserError for an export directory that holds something else. `given`: what of `settings` was said explicitly; the
    rest is taken from the log, and where that has other values, `run` raises UserError unless `change` is set. None:
    all of `settings` is meant. `on_change` is called in the service's thread whenever something happened that is worth
    showing.
    """

    config: MasterConfig
    settings: Settings
    broker: Broker
    topology: Topology
    get: str | None = None
    given: Mapping[str, Any] | None = None
    change: bool = False
    on_change: Callable[[MasterService], None] = lambda service: None
    clock: Clock = SYSTEM

    def __post_init__(self) -> None:
        self._events: queue.SimpleQueue[Delivery | BaseException] = queue.SimpleQueue()
        self._ending = _Ending()
        self._connection = BrokerWatch(self.clock, party="master")
        self._beside_it: list[Worker] = []
        #: Whether this process is the one that serves its namespace.
        self.has_lock = False
        if self.config.export_dir is not None:
            check_export_directory(self.config.export_dir)
        self._shards: Shards | None = None
        journal = open_journal(
            self.config,
            clock=self.clock,
            background=self._beside,
            snapshots=self._snapshots,
            on_removed=self._removed,
        )
        log.info(said_of(journal.retention, self.config.retention))
        self.master = Master(
            self.config,
            self._chosen,
            self.broker,
            self.topology,
            journal,
            get=self.get,
            clock=self.clock,
            ending=self._ending,
            on_delivery=self._events.put,
            shards=self._shards,
        )

    def _chosen(self, logged: Logged | None) -> Settings:
        if logged is None:
            return settings_of_start(None, self.settings, self.given)
        now = changed(logged.configured, logged.live)
        return settings_of_start(logged.configured, self.settings, self.given, change=self.change, now=now)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set.

        Raises LockHeld if another master serves this namespace, BrokerUnavailable once its lock is lost, AccessRefused,
        Damaged if the state directory cannot be recovered from, UserError for settings that the log contradicts,
        StorageBlocked if it is stopped while nothing can be written, and whatever ended one of its threads.
        """
        torch.set_num_threads(self.config.threads)
        self._ending.stop = stop
        try:
            self.broker.lock(self.topology.master_lock, self._ending.lost.set)
            self.has_lock = True
            self.master.start()
            self.master.outbox.beside()
            self._beside("outbox", self._send)
            self._serve(stop)
            # only here: after an error the state in memory may be half of an entry, and the log is the truth
            with contextlib.suppress(ShardsAway):  # all that was decided is in the log
                self.master.snapshot()
        finally:
            self.master.outbox.close()
            self.master.journal.close()
        self._check()

    def report(self) -> Report:
        """What `status` shows."""
        return self.master.report()

    @property
    def counts(self) -> Counts:
        """What it has answered to updates since it started."""
        return self.master.recorder.counts

    @property
    def missing(self) -> str:
        """The aggregators that a start waits for, in words; empty if for none."""
        return self._shards.missing if self._shards is not None else ""

    def waiting(self) -> dict[str, int]:
        """How much waits in this process, by where: deliveries for the thread that decides, and what the master has."""
        return {"arrived": self._events.qsize(), **self.master.waiting()}

    def _snapshots(self, log: MessageLog) -> Snapshots:
        """Those of a log, and where it is of several aggregators, or is to be, these."""
        count = logged_shards(log) or self.settings.shards
        if count == 1:
            return SnapshotDirectory(log)
        self._shards = Shards(
            count,
            self.broker,
            self.topology,
            clock=self.clock,
            ending=self._ending,
            new_id=random_id,
            on_report=self._events.put,
        )
        return RemoteSnapshots(log, self._shards)

    def _removed(self, payload: str) -> None:
        if self._shards is not None:
            self._shards.tell(orders.Drop, digest=payload)

    def _serve(self, stop: threading.Event) -> None:
        subscriptions = [
            self.broker.consume(self.topology.master_inbox, self._arrived, prefetch=INBOX_PREFETCH),
            self.broker.consume(self.topology.master_updates, self._arrived, prefetch=UPDATES_PREFETCH),
        ]
        try:
            while not stop.is_set() and not (self.config.exit_when_finished and self.master.done):
                self._take_some(wait=self.master.look())
                self.on_change(self)
                if self._ending.lost.is_set():
                    raise BrokerUnavailable("the lock of this namespace was lost; another master may be serving it now")
                status = self.broker.status()
                self._connection.look(status)
                status.check()
        finally:
            for subscription in subscriptions:
                subscription.close()
            self.master.close()

    def _arrived(self, delivery: Delivery) -> None:
        self._events.put(bounded(delivery))

    def _take_some(self, wait: float) -> None:
        """Wait for a delivery up to `wait` seconds and handle it, and with it what has come meanwhile. Raises what
        ended a thread."""
        with contextlib.suppress(queue.Empty):
            delivery, until = self._next(wait), self.clock.monotonic() + _GROUP_SECONDS
            while self.clock.monotonic() < until and not self._events.empty():
                following = self._next()
                self.master.hear(delivery, more=True)
                delivery = following
            self.master.hear(delivery)

    def _send(self) -> None:
        try:
            self.master.outbox.serve()
        except BrokerUnavailable:
            if not self._ending.is_set():
                raise
            # who waits for what is to leave is told

    def _next(self, wait: float = 0.0) -> Delivery:
        """What has come first. Raises queue.Empty, and what ended a thread."""
        event = self._events.get(timeout=wait) if wait > 0 else self._events.get_nowait()
        if isinstance(event, BaseException):
            raise event
        return event

    def _check(self) -> None:
        """All is done: raises what ended a thread meanwhile."""
        for worker in self._beside_it:
            worker.join(_JOIN_SECONDS)
        with contextlib.suppress(queue.Empty):
            while True:
                self._next()

    def _beside(self, name: str, work: Callable[[], None]) -> None:
        self._beside_it = [worker for worker in self._beside_it if not worker.join(0.0)]
        self._beside_it.append(Worker(name, work, self._events.put))


class _Ending:
    """Set once the service is to end: it was stopped, or its lock is lost."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.lost = threading.Event()

    def is_set(self) -> bool:
        return self.stop.is_set() or self.lost.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self.stop.wait(timeout) or self.lost.is_set()
