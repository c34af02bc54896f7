"""Master and node as they are shipped, stepped by hand: a virtual clock, stores in memory, no thread, no sleep.

The training is a count of steps, and the shared encoder 32 numbers.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from common.brokers.memory import MemoryBroker, MemoryServer, MemorySubscription
from common.clock import VirtualClock
from common.numbers.encodings import encode_vector
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.wire.assets import asset_entry
from common.wire.base import Message
from common.wire.broker import Delivery, OnDelivery, Publication, StreamPosition
from common.wire.codec import decode, encode
from common.wire.fields import AssetEntry
from common.wire.to_master import UpdateChunk, UpdateManifest
from common.wire.to_node import Instruction, Pulse, Receipt, Rule
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion, payload_digest
from common.wire.update_rule import FinishRule, ReturnWhen, UpdateRule
from common.wire.versions import publish_version
from master_service.arithmetic.aggregator import Aggregator
from master_service.arithmetic.arithmetic import Outcome
from master_service.config import MasterConfig
from master_service.decisions.effects import Generate
from master_service.decisions.records import Generated, Provided
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.history.fold import Fold
from master_service.history.snapshot import Manifest, Taken
from master_service.history.state_directory import Background, Journal, inline
from master_service.log.deadly import MemoryMark
from master_service.log.message_log import MessageLog
from master_service.log.payloads import MemoryPayloads, Payloads
from master_service.log.room import Room
from master_service.master import Master
from master_service.wire.shards import Shards
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.handover.local_state import LocalState
from node_service.handover.outbox import Outbox
from node_service.handover.receipt_book import Ledger
from node_service.handover.store import MemoryStore, Store
from node_service.node import Node
from node_service.training.looks import HeldOut, Looks, must_evaluate
from node_service.training.training import Training
from node_service.training.update_rule import SinceReturn, must_return
from node_service.trials import Build

M = TypeVar("M", bound=Message)
TOPOLOGY = Topology("stepped")
LAYOUT = Layout([("w", (4, 8))])
#: That of every version that a HandMaster publishes.
DIGEST = payload_digest(encode_vector(torch.zeros(LAYOUT.size), "float32"))


#: The same with an account for each party.
ACCOUNTS = Topology("stepped", own_accounts=True)


def connection(server: MemoryServer, user: str) -> MemoryBroker:
    return MemoryBroker(server, user=user, dead_letters=TOPOLOGY.dead_letters, threaded=False)


def account(server: MemoryServer, party: str) -> MemoryBroker:
    """A connection by the account of a party."""
    return connection(server, ACCOUNTS.account(party))


class SlowBroker(MemoryBroker):
    """A connection over a line of so many bytes a second: what comes has come once the line has carried it."""

    def __init__(self, server: MemoryServer, user: str, rate: float) -> None:
        super().__init__(server, user=user, dead_letters=TOPOLOGY.dead_letters, threaded=False)
        self._rate = rate
        self._carried = 0.0
        self._line: deque[tuple[Delivery, OnDelivery]] = deque()

    def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> MemorySubscription:
        return super().consume(queue, self._slowly(on_delivery), prefetch=prefetch)

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, start: StreamPosition, prefetch: int = 16
    ) -> MemorySubscription:
        return super().read_stream(stream, self._slowly(on_delivery), start=start, prefetch=prefetch)

    def deliver(self) -> bool:
        """Nothing comes but by `carry`."""
        return False

    def carry(self, seconds: float) -> None:
        """The line works for so long."""
        while super().deliver():
            pass
        self._carried += self._rate * seconds
        while self._line and len(self._line[0][0].body) <= self._carried:
            delivery, on_delivery = self._line.popleft()
            self._carried -= len(delivery.body)
            on_delivery(delivery)
        if not self._line:
            self._carried = 0.0

    def _slowly(self, on_delivery: OnDelivery) -> OnDelivery:
        return lambda delivery: self._line.append((delivery, on_delivery))


def instruction(encoder: str = "text-1", layout: Layout = LAYOUT, assets: Sequence[AssetEntry] = ()) -> Instruction:
    return Instruction(
        encoder=encoder,
        encoder_type="text",
        architecture={},
        layout=layout.plain(),
        layout_digest=layout.digest,
        assets=list(assets),
    )


class CountingTraining:
    """Training that counts. `seconds`: how long a step takes; `fails_at`: the step that raises; `saved`: the count of
    steps at each checkpoint, which outlives this object. `finishing`: the steps of its finishing phase, whose looks see
    a loss that falls by one each time; `losses`: what a version is measured to be worth, where it is."""

    def __init__(
        self,
        instruction: Instruction,
        *,
        seconds: float = 0.5,
        fails_at: int | None = None,
        saved: list[int],
        finishing: int = 0,
        losses: Mapping[int, float] | None = None,
    ) -> None:
        self.instruction, self.rule, self.since = instruction, UpdateRule(), SinceReturn()
        self.version, self.steps = -1, 0
        self.held_out: HeldOut | None = None
        self.finishing: Looks | None = None
        self.saved = saved
        self._finishing = finishing
        self._losses = losses or {}
        self._seconds = seconds
        self._fails_at = fails_at

    @property
    def must_return(self) -> bool:
        return must_return(self.rule.when, self.since)

    def retune(self, rule: UpdateRule, progress: float) -> None:
        self.rule = rule

    def adopt(self, read: CompleteVersion) -> None:
        self.version = read.version
        every = self.rule.evaluate_every
        if self.version in self._losses and must_evaluate(every, self.held_out, self.version, self.steps):
            self.held_out = HeldOut(self.version, self._losses[self.version], self.steps)

    def step(self) -> float:
        if self.steps == self._fails_at:
            raise ArithmeticError("a training step failed")
        self.steps += 1
        self.since.step(1, 1.0)
        if self.finishing is not None:
            self.finishing.steps += 1
            if self.finishing.due:
                self.finishing.look(-float(self.finishing.steps))
        return self._seconds

    def settle(self) -> None:
        """Every step is taken at once."""

    def hand_in(self, sequence: int) -> tuple[SinceReturn, list[bytes]]:
        since, self.since = self.since, self.since.returned()
        bodies = encode_vector(torch.full((LAYOUT.size,), float(since.steps + sequence)), "float32")
        return since, bodies

    def answered(self, receipt: Receipt) -> None:
        """There is no path of parameters to mend."""

    def save(self, incarnation: str, next_sequence: int) -> None:
        self.saved.append(self.steps)

    def finish(self, read: CompleteVersion, export: Path | None) -> Path | None:
        self.version, self.since = read.version, SinceReturn()
        if self.version in self._losses:
            self.held_out = HeldOut(self.version, self._losses[self.version], self.steps)
        return None if self.finish_on() else Path("nowhere")

    def finish_on(self) -> bool:
        """A phase that a process began is counted from its beginning by the next."""
        self.finishing = Looks.planned(FinishRule(steps=self._finishing), 0)
        if self.finishing is not None:
            self.finishing.first(0.0)
        return self.finishing is not None

    def conclude(self, export: Path | None) -> Path:
        self.finishing, self.since = None, SinceReturn()
        return Path("nowhere")


class SteppedNode:
    """A Node and what a service does around it, one turn after the other."""

    def __init__(
        self,
        server: MemoryServer,
        clock: VirtualClock,
        name: str = "a",
        *,
        store: Store | None = None,
        training: Mapping[str, Any] | None = None,
        topology: Topology = TOPOLOGY,
        incarnation: str = "first",
        **config: Any,
    ) -> None:
        self.clock = clock
        self.broker = account(server, name) if topology.own_accounts else connection(server, name)
        self.saved: list[int] = []
        #: Every training that was built: of which encoder, and with which assets.
        self.built: list[tuple[str, dict[str, bytes]]] = []
        #: Builds instead of this, while it is set.
        self.build: Build | None = None
        self._training = dict(training or {})
        self._came: deque[Delivery] = deque()
        # the first by its name, those after it numbered
        incarnations = (f"{name}-{incarnation}{f'-{number}' if number else ''}" for number in itertools.count())
        state = LocalState(store or MemoryStore(), name, new_incarnation=lambda: next(incarnations))
        ids = itertools.count()
        made = NodeConfig(**config)
        outbox = Outbox(
            self.broker,
            TOPOLOGY,
            name,
            state.chunk,
            inline_bytes=made.inline_bytes,
            new_id=lambda: f"{name}{next(ids)}",
        )
        corpora = {"text": Corpus("text", ["one", "two"], None, [], None)}
        self.node = Node(name, made, corpora, self.broker, topology, state, self._build, outbox, clock=clock)

    def start(self) -> SteppedNode:
        self.node.start()
        for queue in TOPOLOGY.node_inbox(self.node.name), TOPOLOGY.pulse_queue(self.node.name):
            self.broker.consume(queue, self._came.append, prefetch=32)
        return self

    def turn(self) -> float:
        """Hear, read, do what is to be done now, and send; the seconds until the next turn."""
        self._hear()
        while True:
            read = self.node.reading.read_one()
            if read is not None:
                self.node.was_read(read)
            if not self._hear() and read is None:
                break
        wait = self.node.work()
        self.flush()
        return wait

    def _hear(self) -> bool:
        """Everything that has come, for the node itself or for its reading; whether anything had."""
        any_came = False
        while self.broker.deliver() or self._came:
            any_came = True
            while self._came:
                self.node.hear(self._came.popleft())
        return any_came

    def flush(self) -> None:
        while self.node.outbox.flush_one():
            pass

    def run(self, seconds: float) -> None:
        """Let so much time pass for this node alone."""
        until = self.clock.monotonic() + seconds
        while self.clock.monotonic() < until:
            self.clock.wait(self.turn())

    @property
    def training(self) -> CountingTraining:
        assert isinstance(self.node.training, CountingTraining)
        return self.node.training

    def _build(self, instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]) -> Training:
        if self.build is not None:
            return self.build(instruction, corpus, ledger, assets)
        self.built.append((instruction.encoder, dict(assets)))
        return CountingTraining(instruction, **self._training, saved=self.saved)


class HandMaster:
    """Speaks the master's side, one message at a time, and keeps what came to it."""

    def __init__(self, server: MemoryServer, clock: VirtualClock, broker: MemoryBroker | None = None) -> None:
        self.clock = clock
        self.broker = broker or connection(server, "master")
        self.broker.declare(TOPOLOGY.master())
        self.came: list[Message] = []
        for queue in TOPOLOGY.master_inbox, TOPOLOGY.master_updates:
            self.broker.consume(queue, self._take, prefetch=1000)

    def heard(self, kind: type[M]) -> list[M]:
        """Everything of this kind that has come so far."""
        while self.broker.deliver():
            pass
        return [message for message in self.came if isinstance(message, kind)]

    def say(self, message: Message, node: str = "a") -> None:
        exchange = TOPOLOGY.rule if isinstance(message, Rule) else TOPOLOGY.receipt
        self.broker.publish(Publication(exchange, node, encode(message)))

    def pulse(self) -> None:
        pulse = Pulse(at=self.clock.now(), epoch=1)
        self.broker.publish(Publication(TOPOLOGY.instruction, TOPOLOGY.pulse_key, encode(pulse)))

    def let_in(self, rule: UpdateRule | None = None, encoder: str = "text-1", version: int = 0) -> None:
        """Instruct, and answer with the rule and a version."""
        self.say(instruction(encoder))
        self.publish(version, encoder)
        rule = rule or UpdateRule(when=ReturnWhen(steps=4))
        self.say(Rule(encoder=encoder, node="a", update_rule=rule, version=version, published_at=0.0))

    def publish(self, version: int, encoder: str = "text-1") -> None:
        publish_version(
            self.broker,
            TOPOLOGY,
            encoder=encoder,
            epoch=1,
            version=version,
            encoding="float32",
            layout_digest=LAYOUT.digest,
            bodies=encode_vector(torch.zeros(LAYOUT.size), "float32"),
            progress=0.0,
            clock=self.clock,
        )

    def answer(self, update: UpdateManifest, version: int = 1, reason: str = "") -> None:
        receipt = Receipt(
            encoder=update.encoder,
            node=update.node,
            incarnation=update.incarnation,
            sequence=update.sequence,
            digest=update.digest,
            accepted=not reason,
            reason=reason,
            version=version,
        )
        self.say(receipt, update.node)

    def _take(self, delivery: Delivery) -> None:
        self.came.append(decode(delivery.body))
        self.broker.ack(delivery)


class SmallArithmetic(Aggregator):
    """The real one; but version 0 is zeros of a small layout, with these assets, and nothing is exported."""

    def __init__(self, payloads: Payloads, layout: Layout, assets: Mapping[str, bytes]) -> None:
        super().__init__(payloads)
        self._layout = layout
        self._assets = assets

    def generated(self, effect: Generate) -> list[Outcome]:
        layout = self._layout
        start = ParameterSet(layout, torch.zeros(layout.size))
        plain: dict[str, Any] = {"layout": layout.plain(), "layout_digest": layout.digest, "digest": start.digest()}
        plain["assets"] = list(self._assets)
        provided = [
            Outcome(Provided(encoder=effect.encoder, **asset_entry(name, content).model_dump()), content)
            for name, content in self._assets.items()
        ]
        return [*provided, Outcome(Generated(encoder=effect.encoder, architecture={}, **plain), start.to_bytes())]

    def export(self, directory: Path, encoder: object, settings: object) -> None:
        """Where nothing is written."""


class MemorySnapshots:
    """Says what was kept, and is always read as if nothing was."""

    def __init__(self, payloads: Payloads, layout: Layout, assets: Mapping[str, bytes]) -> None:
        self._layout, self._assets = layout, assets
        self.manifests: list[Manifest] = []
        self._payloads = payloads

    def read(self) -> Fold[Any]:
        return Fold(SmallArithmetic(self._payloads, self._layout, self._assets))

    def take(self, fold: Fold[Any], checksum: str) -> Taken:
        encoders = fold.coordinator.state.encoders.values()
        buffered = tuple(update.payload for encoder in encoders for update in encoder.buffer)
        manifest = Manifest(fold.offset, checksum, buffered, {})

        def write() -> None:
            self.manifests = [*self.manifests, manifest][-2:]

        return Taken(write)

    def kept(self) -> list[Manifest]:
        return self.manifests


class SteppedMaster:
    """A Master over SQLite and payloads in memory, one turn after the other."""

    def __init__(
        self,
        server: MemoryServer,
        clock: VirtualClock,
        *,
        payloads: Payloads | None = None,
        background: Background = inline,
        db: sqlite3.Connection | None = None,
        settings: Settings | None = None,
        broker: MemoryBroker | None = None,
        layout: Layout = LAYOUT,
        assets: Mapping[str, bytes] | None = None,
        topology: Topology = TOPOLOGY,
        shards: int = 1,
        **config: Any,
    ) -> None:
        """`shards`: so many aggregators are ordered, of which none is there."""
        self.clock = clock
        self.broker = broker or connection(server, "master")
        self._came: deque[Delivery] = deque()
        payloads = MemoryPayloads() if payloads is None else payloads
        self.db = db or sqlite3.connect(":memory:", isolation_level=None)
        ids = itertools.count()
        master_config = MasterConfig(state_dir=Path("nowhere"), **config)

        def new_id() -> str:
            return f"master{clock.now()}-{next(ids)}"

        self.journal = Journal(
            MessageLog(self.db, payloads),
            MemorySnapshots(payloads, layout, assets or {}),
            MemoryMark(),
            Room(Path("nowhere"), lambda: 1 << 60, 0),
            master_config,
            clock=clock,
            new_id=new_id,
            background=background,
        )
        decided = settings or Settings(
            rule=aggregation_rule("fedasync"),
            update_rule=UpdateRule(when=ReturnWhen(steps=4), encoding="float32"),
            stop=StopRule(versions=1000),
        )
        self.master = Master(
            master_config,
            lambda logged: decided,
            self.broker,
            topology,
            self.journal,
            get="text",
            clock=clock,
            ending=Never(),
            on_delivery=self._came.append,
            new_id=new_id,
            shards=self._shards(shards, topology, new_id) if shards > 1 else None,
        )

    def _shards(self, count: int, topology: Topology, new_id: Callable[[], str]) -> Shards:
        return Shards(
            count,
            self.broker,
            topology,
            clock=self.clock,
            ending=Never(),
            new_id=new_id,
            on_report=self._came.append,
        )

    def start(self) -> SteppedMaster:
        self.master.start()
        for queue in TOPOLOGY.master_inbox, TOPOLOGY.master_updates:
            self.broker.consume(queue, self._came.append, prefetch=1 << 14)
        return self

    def turn(self) -> float:
        """Hear everything, then look; the seconds until the next turn."""
        while self.broker.deliver() or self._came:
            while self._came:
                self.master.hear(self._came.popleft())
        return self.master.look()

    def run(self, seconds: float) -> None:
        """Let so much time pass for the master alone."""
        until = self.clock.monotonic() + seconds
        while self.clock.monotonic() < until:
            self.clock.wait(self.turn())


class Never:
    """The Signal of a service that nobody ends."""

    def is_set(self) -> bool:
        return False

    def wait(self, timeout: float | None = None) -> bool:
        raise AssertionError("the broker takes everything here: nobody waits")


def together(seconds: float, master: SteppedMaster, *nodes: SteppedNode) -> None:
    """Let time pass for all of them, an eighth of a second at a time."""
    clock = master.clock
    until, due = clock.monotonic() + seconds, {node: clock.monotonic() for node in nodes}
    while clock.monotonic() < until:
        master.turn()
        for node in nodes:
            if clock.monotonic() >= due[node]:
                due[node] = clock.monotonic() + node.turn()
        clock.wait(0.125)


def sent_to(server: MemoryServer, node: str) -> Callable[[], list[Message]]:
    """A node that only listens; gives everything that came to its inbox since it was asked last."""
    broker, came = connection(server, node), deque[Delivery]()
    broker.declare(TOPOLOGY.node(node, ("text",)))
    broker.consume(TOPOLOGY.node_inbox(node), came.append, prefetch=1000)

    def messages() -> list[Message]:
        while broker.deliver():
            pass
        found = [decode(delivery.body) for delivery in came]
        broker.ack(*came)
        came.clear()
        return found

    return messages


def chunk_bytes(server: MemoryServer, node: str) -> list[int]:
    """Bytes of payload of each chunk that waits in a node's chunk queue."""
    broker, came = connection(server, "looker"), deque[Delivery]()
    subscription = broker.consume(TOPOLOGY.chunk_queue(node), came.append, prefetch=10_000)
    while broker.deliver():
        pass
    subscription.close()
    chunks = [decode(delivery.body) for delivery in came]
    return [len(chunk.data) for chunk in chunks if isinstance(chunk, UpdateChunk)]
