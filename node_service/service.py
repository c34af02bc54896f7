"""A node as a process: the broker's deliveries and what was read of versions wait in a queue for the main thread, which
trains in between; one thread sends, one reads, and one puts a checkpoint in place. Nothing is decided here."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import structlog
import torch

from common.clock import SYSTEM, Clock
from common.errors import BrokerUnavailable
from common.wire.broker import Broker, Delivery
from common.wire.to_node import Instruction
from common.wire.topology import Topology
from common.workers import OneBeside, Worker
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.figures import NodeFigures
from node_service.handover.local_state import LocalState, open_local_state
from node_service.handover.outbox import Outbox
from node_service.handover.reading import AssetRead, VersionRead
from node_service.handover.receipt_book import Ledger
from node_service.handover.sent import noting
from node_service.node import Node
from node_service.training.ranks import Ranks
from node_service.training.session import Session
from node_service.training.trainer import choose_device
from node_service.trials import Build

log = structlog.get_logger()

#: Between two attempts to send what cannot leave now, and the longest time that a thread waits for work, seconds.
_RETRY_SECONDS = 1.0
#: How long a node that ends may go on sending, seconds: `docker stop` kills after ten, and what is owed is on disk.
_FLUSH_SECONDS = 5.0


class NodeService:
    """Runs until stopped, or until an encoder is finished if so configured. `on_change` is called between steps.

    `build` makes the training; by default a real one in the state directory, with the other processes of `ranks`.
    """

    def __init__(
        self,
        node: str,
        config: NodeConfig,
        corpora: dict[str, Corpus],
        broker: Broker,
        topology: Topology,
        on_change: Callable[[NodeService], None] = lambda service: None,
        *,
        clock: Clock = SYSTEM,
        build: Build | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.name = node
        self.config = config
        self.broker = broker
        self.topology = topology
        self.figures = NodeFigures()
        self.node: Node | None = None
        #: Whether this process is the one that is this node.
        self.has_lock = False
        #: Spent in publishing what is to leave, waiting for confirms included.
        self.sending_seconds = 0.0
        self._corpora = corpora
        self._on_change = on_change
        self._clock = clock
        self._build = build
        self._ranks = ranks
        self._events: queue.SimpleQueue[Delivery | VersionRead | AssetRead | BaseException] = queue.SimpleQueue()
        self._lost = threading.Event()
        self._closing = threading.Event()
        self._beside = OneBeside(f"checkpoint-{node}", self._events.put)

    @property
    def samples(self) -> dict[str, int]:
        """How many training samples it has, by encoder type."""
        return {name: len(corpus.train) for name, corpus in self._corpora.items()}

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set. A clean end hands in what was trained and saves it; an error does neither.

        Raises LockHeld if this node id or its state directory is in use, UserError for a device that is not there,
        AccessRefused, BrokerUnavailable once its lock is lost, and whatever ended one of its threads.
        """
        torch.set_num_threads(self.config.threads)
        directory = self.config.state_dir or Path("node-state") / self.name
        device = self._ranks.device if self._ranks is not None else choose_device(self.config.device)
        build = self._build or partial(self._session, directory, device)
        with contextlib.closing(open_local_state(directory, self.name)) as state:
            self.broker.lock(self.topology.node_lock(self.name), self._lost.set)
            self.has_lock = True
            self._serve(stop, state, build)

    def _serve(self, stop: threading.Event, state: LocalState, build: Build) -> None:
        outbox = Outbox(
            self.broker,
            self.topology,
            self.name,
            state.chunk,
            inline_bytes=self.config.inline_bytes,
            on_leaving=noting(self.config.sent_file, self._clock),
        )
        node = Node(
            self.name,
            self.config,
            self._corpora,
            self.broker,
            self.topology,
            state,
            build,
            outbox,
            clock=self._clock,
            beside=self._beside,
        )
        self.node, self.figures = node, node.figures
        node.start()
        inboxes = (self.topology.node_inbox(self.name), self.topology.pulse_queue(self.name))
        subscriptions = [self.broker.consume(queue, self._events.put, prefetch=32) for queue in inboxes]
        workers = [
            Worker(f"outbox-{self.name}", partial(self._send, outbox), self._events.put),
            Worker(f"reading-{self.name}", partial(self._read, node), self._events.put),
        ]
        try:
            self._loop(node, stop)
            self._check()
            node.goodbye()
            self._flush(outbox)
        finally:
            self._closing.set()
            for subscription in subscriptions:
                subscription.close()
            for worker in workers:
                worker.join(_RETRY_SECONDS)
            node.reading.close()
            self._beside.join()  # the next process in this directory may write a checkpoint of its own

    def _loop(self, node: Node, stop: threading.Event) -> None:
        while not stop.is_set() and not (node.finished and self.config.exit_when_finished):
            if self._lost.is_set():
                raise BrokerUnavailable(f"the lock of node {self.name!r} was lost; is it running somewhere else?")
            self.broker.status().check()
            self._handle_events(node, wait=node.work())
            self._on_change(self)

    def _handle_events(self, node: Node, wait: float) -> None:
        """Handle everything that has come, waiting up to `wait` seconds for the first. Raises what ended a thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._next(wait)
                wait = 0.0
                if isinstance(event, Delivery):
                    node.hear(event)
                else:
                    node.was_read(event)

    def _next(self, wait: float = 0.0) -> Delivery | VersionRead | AssetRead:
        """What has come first. Raises queue.Empty, and what ended a thread."""
        event = self._events.get(timeout=wait) if wait > 0 else self._events.get_nowait()
        if isinstance(event, BaseException):
            raise event
        return event

    def _check(self) -> None:
        """Nothing is heard any more: what still waits goes back to its queue. Raises what ended a thread."""
        self.broker.status().check()
        with contextlib.suppress(queue.Empty):
            while True:
                self._next()

    def _flush(self, outbox: Outbox) -> None:
        """Wait until everything has left, but not for ever, nor for a broker that is away. Raises what ended a thread,
        whatever has left by then."""
        until = self._clock.monotonic() + _FLUSH_SECONDS
        while not outbox.empty and self._clock.monotonic() < until and not self._is_cut_off(outbox):
            with contextlib.suppress(queue.Empty):
                self._next(wait=0.05)
        self._check()
        if not outbox.empty:
            log.warning("not everything could be sent; it is kept and sent at the next start", node=self.name)

    def _is_cut_off(self, outbox: Outbox) -> bool:
        return bool(outbox.problem) and not self.broker.status().connected

    def _send(self, outbox: Outbox) -> None:
        while not self._closing.is_set():
            begun = self._clock.monotonic()
            if outbox.flush_one():
                self.sending_seconds += self._clock.monotonic() - begun
            elif outbox.problem:
                self._clock.wait(_RETRY_SECONDS, self._closing)
            else:
                outbox.wait(_RETRY_SECONDS)

    def _read(self, node: Node) -> None:
        while not self._closing.is_set():
            read = node.reading.read_one(wait=0.25)
            if read is not None:
                self._events.put(read)

    def _session(
        self,
        directory: Path,
        device: str,
        instruction: Instruction,
        corpus: Corpus,
        ledger: Ledger,
        assets: Mapping[str, bytes],
    ) -> Session:
        return Session(
            instruction,
            corpus.train,
            directory / "encoders" / instruction.encoder,
            private=self.config.private,
            seed=self.config.seed,
            device=device,
            precision=self.config.precision,
            compiled=self.config.compile,
            micro_batch=self.config.micro_batch,
            ranks=self._ranks,
            ledger=ledger,
            assets=assets,
            validation=corpus.validation,
            beside=self._beside,
        )
