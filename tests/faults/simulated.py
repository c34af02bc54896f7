"""The shipped Master and Node without threads, disks, sleeps or tensors, over the memory broker: every step is taken by
hand, and anybody may die at any labelled one.

What is not shipped: the broker's faults, disks that outlive a kill, and a workbench of tokens in the place of tensors,
where a version is the hash of its predecessor and of the updates that were counted in it, with coefficients.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import structlog

import common.numbers.slicing
from common import crash_points
from common.brokers.memory import MemoryBroker, MemorySubscription
from common.clock import VirtualClock
from common.errors import BrokerUnavailable
from common.wire.base import update_id
from common.wire.broker import BrokerStatus, Delivery, OnDelivery, Publication, StreamPosition
from common.wire.codec import decode
from common.wire.to_master import UpdateManifest, Words
from common.wire.to_node import Instruction, ParameterChunk, Receipt, Resend
from common.wire.topology import Declarations, Topology
from master_service.config import MasterConfig
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Effect
from master_service.decisions.records import Entry
from master_service.decisions.settings import Settings
from master_service.decisions.state import State
from master_service.history.fold import Fold
from master_service.history.snapshot import Manifest, Taken
from master_service.history.state_directory import Journal
from master_service.log.deadly import MemoryMark
from master_service.log.message_log import MessageLog
from master_service.log.payloads import MemoryPayloads
from master_service.log.room import Room
from master_service.master import Master
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.handover.local_state import LocalState
from node_service.handover.outbox import Outbox
from node_service.handover.reading import AssetRead
from node_service.handover.receipt_book import RECEIPTS, Ledger
from node_service.handover.store import MemoryStore
from node_service.node import Node
from tests.faults.tiny import sends_whole
from tests.faults.workbench import ASSETS, EVERYBODYS, SLICE, WORDS, Tokens, TokenTraining, demand

if TYPE_CHECKING:
    from tests.faults.interleavings import World

TOPOLOGY = Topology("sim")
TYPES = ("text", "image")
#: Snapshots are written when a plan says so.
CONFIG = MasterConfig(
    state_dir=Path("nowhere"),
    presence_timeout_seconds=45.0,
    snapshot_every_seconds=1e12,
    messages_per_second=1e9,  # time stands still while a plan says much at once
)
#: What a node does of itself it does when a plan says so; as a node has it, an update is sent again after 180 s.
QUIET = NodeConfig(
    alive_every_seconds=1e12,
    ask_after_seconds=1e12,
    checkpoint_every_seconds=1e12,
    private={"contribute_words": True, "min_documents": WORDS},
)
ALIVE = QUIET.model_copy(update={"alive_every_seconds": 1e-9, "resend_after_seconds": 1e-9})
ASK = QUIET.model_copy(update={"ask_after_seconds": 1e-9})


class Killed(BaseException):
    """kill -9: nothing catches it, nothing is tidied up."""


class StandingClock(VirtualClock):
    """The world's time, which stands still for whoever waits. `ahead`: how far one party's deadlines are."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world, self.ahead = world, 0.0

    def now(self) -> float:
        return self._world.now

    def monotonic(self) -> float:
        return self._world.now + self.ahead

    def wait(self, seconds: float, event: Any = None) -> bool:
        return False


# --- the broker, with faults -----------------------------------------------------------------------------------------


class Wire(MemoryBroker):
    """One party's connection. `faults` are used up, one a publish: `lost`, `half` and `unconfirmed` fail with nothing,
    half or all of it stored; `twice` stores everything twice and succeeds."""

    def __init__(self, world: World, user: str) -> None:
        super().__init__(world.server, user=user, dead_letters=TOPOLOGY.dead_letters, threaded=False)
        self.world = world
        self.faults: deque[str] = deque()
        self.consumers: list[MemorySubscription] = []
        self.readers: list[MemorySubscription] = []
        self.reopened = 0
        self._declared: list[Declarations] = []

    def declare(self, declarations: Declarations) -> None:
        super().declare(declarations)
        self._declared.append(declarations)

    def delete_queue(self, name: str) -> None:
        self.world.loses(name)
        super().delete_queue(name)

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        if self._user == "master":
            self._check(publications)
        fault = self.faults.popleft() if self.faults else ""
        if fault:
            self.world.seen[f"publish {fault}"] += 1
        stored = {"lost": (), "half": publications[: (len(publications) + 1) // 2]}.get(fault, publications)
        for publication in stored:
            super().publish(*[publication] * (2 if fault == "twice" else 1))
        if fault not in ("", "twice"):
            raise BrokerUnavailable("no confirm came")
        self.world.confirmed += publications

    def _check(self, publications: tuple[Publication, ...]) -> None:
        """What the master says must be in its log."""
        for publication in publications:
            if publication.exchange == TOPOLOGY.dead_letters:
                self.world.asked_again.add(publication.message_id or "")
                continue
            match decode(publication.body):
                case Receipt(accepted=True) as receipt:
                    logged = self.world.disk.has_version(receipt.encoder, receipt.version)
                    demand(logged, "a receipt leaves before its version is in the log")
                case Resend() as again:
                    self.world.asked_again.add(f"{update_id(again)}/{again.attempt - 1}")
                case ParameterChunk() as chunk if chunk.version > 0:
                    logged = self.world.disk.has_version(chunk.encoder, chunk.version)
                    demand(logged, "a version leaves before its digest is in the log")

    def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> MemorySubscription:
        self.consumers = [each for each in self.consumers if not each.closed]
        self.consumers.append(super().consume(queue, on_delivery, prefetch=prefetch))
        return self.consumers[-1]

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, start: StreamPosition, prefetch: int = 16
    ) -> MemorySubscription:
        self.readers = [each for each in self.readers if not each.closed]
        self.readers.append(super().read_stream(stream, on_delivery, start=start, prefetch=1 << 30))
        return self.readers[-1]

    def status(self) -> BrokerStatus:
        return replace(super().status(), reconnects=self.reopened)

    def pump(self) -> None:
        """Hand over all that streams hold for their readers."""
        for reader in self.readers:
            while (delivery := reader.take()) is not None:
                reader.on_delivery(delivery)

    def ack(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            subscription, tag = cast(tuple[MemorySubscription, int], delivery.handle)
            if (message := subscription.unacked.get(tag)) is not None:
                if delivery.queue == TOPOLOGY.master_updates:
                    name = delivery.message_id or ""
                    others = [m.publication.message_id or "" for t, m in subscription.unacked.items() if t != tag]
                    done = self.world.disk.has(name) or name in self.world.asked_again
                    demand(done or any(map(partial(_stands_for, name), others)), f"{name} is acked, and not in the log")
                self.world.acked.setdefault(delivery.queue, deque(maxlen=3)).append(message)
        super().ack(*deliveries)

    def reopen(self) -> None:
        """The channels break: what was not acked goes back to its queues."""
        self.reopened += 1
        for each in (*self.consumers, *self.readers):
            each.reopen()

    def move(self) -> None:
        """To a broker with an empty disk: what was unacked is gone, and what is ours is declared again."""
        self.reopened += 1
        self._server = self.world.server
        for declarations in self._declared:
            super().declare(declarations)
        for each in self.consumers:
            each.move(self._server)
        for reader in self.readers:
            reader.close()

    def close(self) -> None:
        super().close()
        self.consumers, self.readers, self.faults = [], [], deque()


def _stands_for(name: str, other: str) -> bool:
    """Whether a delivery is of the same update as that of `name`, and no older an attempt: then that one may go."""
    (update, _, attempt), (others, _, newer) = name.rpartition("/"), other.rpartition("/")
    return update == others and int(newer) >= int(attempt)


# --- the master ------------------------------------------------------------------------------------------------------


@dataclass
class MasterDisk:
    """What a master's kill leaves."""

    db: sqlite3.Connection = field(
        default_factory=lambda: sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    )
    payloads: dict[str, bytes] = field(default_factory=dict)
    #: (offset, state, what the tokens were), the newest two.
    snapshots: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    mark: MemoryMark = field(default_factory=MemoryMark)

    def log(self) -> MessageLog:
        return MessageLog(self.db, MemoryPayloads(self.payloads))

    def has(self, message_id: str) -> bool:
        return self.db.execute("SELECT 1 FROM entries WHERE message_id = ?", (message_id,)).fetchone() is not None

    def newest(self) -> tuple[int, str, str]:
        """Offset, kind and message id of the last row. An update that is refused for want of its payload has another
        kind: it is not folded as the same."""
        kind = "CASE WHEN kind = 'update' AND payload IS NULL THEN 'refused' ELSE kind END"
        found = self.db.execute(
            f"SELECT offset, {kind}, message_id FROM entries ORDER BY offset DESC LIMIT 1"
        ).fetchone()
        return (int(found[0]), str(found[1]), str(found[2])) if found else (-1, "", "")

    def has_version(self, encoder: str, version: int) -> bool:
        rows = "SELECT 1 FROM entries WHERE kind = 'versioned' AND json_extract(body, '$.encoder') = ? "
        found = self.db.execute(rows + "AND json_extract(body, '$.version') = ?", (encoder, version))
        return found.fetchone() is not None


class LiveFold(Fold[Tokens]):
    """The fold of a running master, which some messages kill."""

    world: World

    def apply(self, entry: Entry) -> list[Effect]:
        world = self.world
        without = isinstance(entry.body, UpdateManifest) and entry.payload is None
        if entry.message_id in world.deadly and not entry.skipped and not without:
            world.seen["killed: deadly message"] += 1
            raise Killed
        return super().apply(entry)


class MemorySnapshots:
    """Snapshots on a MasterDisk."""

    def __init__(self, world: World) -> None:
        self._world = world

    def read(self) -> Fold[Any]:
        disk = self._world.disk
        plan = self._world.plan
        tokens, state, offset = Tokens(disk.payloads, plan.assets, words=plan.words), None, -1
        if disk.snapshots:
            offset, plain, targets = disk.snapshots[-1]
            state = State.model_validate_json(plain)
            for name, (digest, steps) in targets.items():
                tokens.targets[name] = SimpleNamespace(digest=digest, steps=steps, digests={})
        fold = LiveFold(tokens, state, offset)
        fold.world = self._world
        return fold

    def take(self, fold: Fold[Any], checksum: str) -> Taken:
        taken = (fold.offset, fold.coordinator.state.model_dump_json(), fold.arithmetic.saved())

        def write() -> None:
            crash_points.reached("during snapshot")
            self._world.disk.snapshots = [*self._world.disk.snapshots[-1:], taken]
            crash_points.reached("after snapshot")

        return Taken(write)

    def kept(self) -> list[Manifest]:
        return []


class SimMaster:
    """The shipped Master on a disk that outlives it; deliveries come to it when they are fetched."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world = world
        self.wire = Wire(world, "master")
        self.clock = StandingClock(world)
        self.arrived: deque[Delivery] = deque()
        room = Room(Path("memory"), lambda: 1 << 40, 0)
        snapshots, ids = MemorySnapshots(world), world.message_id
        journal = Journal(world.disk.log(), snapshots, world.disk.mark, room, CONFIG, clock=self.clock, new_id=ids)
        self.journal = journal
        self.master = Master(
            CONFIG,
            lambda logged: settings,
            self.wire,
            TOPOLOGY,
            journal,
            get="text",
            clock=self.clock,
            ending=threading.Event(),
            on_delivery=self.arrived.append,
            new_id=ids,
        )

    def start(self) -> None:
        self.master.start()
        self.queues = {
            "inbox": self.wire.consume(TOPOLOGY.master_inbox, self.arrived.append, prefetch=64),
            "updates": self.wire.consume(TOPOLOGY.master_updates, self.arrived.append, prefetch=4),
        }

    def prefetch(self, name: str) -> bool:
        """Take a delivery from a queue; it waits in memory."""
        if name == "chunks":
            chunks = [each for each in self.wire.consumers if each not in self.queues.values() and not each.closed]
            consumer = next((each for each in chunks if each.has_ready()), None)
        else:
            consumer = self.queues[name]
        delivery = consumer.take() if consumer is not None else None
        if delivery is not None:
            self.arrived.append(delivery)
        return delivery is not None

    def turn(self) -> None:
        """As the service's loop does, which takes together what has come together."""
        together = [self.arrived.popleft() for _ in range(min(2, len(self.arrived)))]
        for number, delivery in enumerate(together, start=1):
            if delivery.routing_key.endswith(".words") and self._is_idle(delivery):
                self.world.idle_words.add(f"{delivery.routing_key}:{delivery.message_id}")
            self.master.hear(delivery, more=number < len(together))
        self.master.look()

    def _is_idle(self, delivery: Delivery) -> bool:
        """Whether words would change nothing if they were a row."""
        message, state = decode(delivery.body), self.master.state
        assert isinstance(message, Words)
        tried = Coordinator(state.model_copy(deep=True))
        tried.handle(Entry(state.epoch, "tried", self.world.now, message))
        return tried.state == state

    def chunks_missing(self) -> None:
        """The time for an update's chunks is over."""
        self.clock.ahead += 16.0
        self.turn()

    def snapshot(self) -> None:
        self.master.snapshot()

    def stop(self) -> None:
        """As the service ends when it is told to."""
        self.wire.close()
        self.master.snapshot()


# --- a node ----------------------------------------------------------------------------------------------------------


class SimNode:
    """The shipped Node on files that outlive it."""

    def __init__(self, world: World, name: str, files: dict[str, bytes]) -> None:
        self.world, self.name, self.files = world, name, files
        self.wire = Wire(world, name)
        self.alive, self.kill_in = True, -1
        state = LocalState(MemoryStore(files), name, new_incarnation=lambda: world.incarnation(name))
        inline_bytes = NodeConfig().inline_bytes if sends_whole(name) else 0
        outbox = Outbox(self.wire, TOPOLOGY, name, state.chunk, inline_bytes=inline_bytes, new_id=world.message_id)
        samples = [f"{EVERYBODYS} {name} {number}" for number in range(WORDS)] + ["sample"] * (100 - WORDS)
        corpora = {kind: Corpus(kind, samples, None, [], None) for kind in TYPES}
        clock = StandingClock(world)
        self.node = Node(name, QUIET, corpora, self.wire, TOPOLOGY, state, self._build, outbox, clock=clock)

    def _build(
        self, instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]
    ) -> TokenTraining:
        wanted = dict(list(ASSETS.items())[: self.world.plan.assets])
        demand(dict(assets) == wanted, f"{self.name} builds {instruction.encoder} with the assets {dict(assets)}")
        return TokenTraining(self.world, instruction)

    def start(self) -> None:
        self.node.start()
        self.inbox = self.wire.consume(TOPOLOGY.node_inbox(self.name), lambda delivery: None, prefetch=32)

    def kill(self) -> None:
        self.alive = False
        self.wire.close()

    @property
    def incarnation(self) -> str:
        return incarnation_of(self.files)

    def receipts(self) -> list[Receipt]:
        """What its state directory remembers."""
        return [Receipt.model_validate_json(line) for line in self.files.get(RECEIPTS, b"").splitlines()]

    def hear(self) -> bool:
        """Take one message."""
        delivery = self.inbox.take()
        if delivery is None:
            return False
        message, before = decode(delivery.body), dict(self.node.state.owed)
        if isinstance(message, Receipt):
            self.world.heard.append(message)
        self.node.hear(delivery)
        if isinstance(message, Receipt) and message.sequence not in self.node.state.owed:
            owed = before.get(message.sequence)
            settled = owed is not None and owed.incarnation == self.node.state.identity.incarnation
            demand(not settled or owed.digest == message.digest, "an update is answered by another's receipt")  # type: ignore[union-attr]
        return True

    def flush(self) -> bool:
        """Publish what waits first."""
        return self.node.outbox.flush_one()

    def read(self) -> bool:
        """Go on with the version that was wanted last."""
        self.wire.pump()
        read = self.node.reading.read_one()
        if read is None:
            return False
        if isinstance(read, AssetRead):
            missed = read.entry is None and read.encoder not in self.world.lost_assets
            demand(not missed, f"{self.name} was told of assets of {read.encoder}, and the stream does not hold them")
        elif read.version is None:
            told = (read.encoder, read.wanted)
            demand(told in self.world.lost, f"{self.name} was told of {told}, and the stream does not hold it")
        self.node.was_read(read)
        return True

    def train(self) -> UpdateManifest | None:
        """Train, and hand in, if it may; gives the update."""
        if not self.node.ready:
            return None
        before, self.world.trains = set(self.node.state.owed), True
        self.node.work()
        if len(before) == len(self.node.state.owed):
            self.node.work()
        self.world.trains = False
        new = set(self.node.state.owed) - before
        return self.node.state.owed[max(new)] if new else None

    def say_alive(self, config: NodeConfig = ALIVE) -> None:
        """A sign of life; what is unanswered for long is sent again."""
        self._work(config)

    def ask(self) -> None:
        """Nothing was heard for long."""
        self._work(ASK)

    def _work(self, config: NodeConfig) -> None:
        self.world.now += 1e-6
        self.node.config = config
        self.node.work()
        self.node.config = QUIET

    def leave(self) -> None:
        """Train, say goodbye and end; what cannot be sent stays owed."""
        if self.node.ready:
            self.world.trains = True
            self.node.work()
            self.world.trains = False
        self.node.goodbye()
        while not self.wire.faults and self.flush():
            pass
        self.kill()


def incarnation_of(files: dict[str, bytes]) -> str:
    return str(json.loads(files["identity.json"])["incarnation"]) if "identity.json" in files else ""


# --- labelled steps ---------------------------------------------------------------------------------------------------

#: The world that is being simulated, for the audit hook, which cannot be taken away again.
WORLD: list[World] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == crash_points.EVENT and WORLD:
        WORLD[-1].reached(arguments[0])


sys.addaudithook(_audit)


@contextmanager
def simulated() -> Iterator[None]:
    """Small slices, and nothing is logged."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with patch.object(common.numbers.slicing, "SLICE", SLICE):
        yield
    WORLD.clear()
    structlog.configure(**before)
