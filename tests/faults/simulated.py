"""A master and nodes without threads, disks, sleeps or tensors, over the memory broker: every step is taken by hand.

Real: broker server, codec, topology, the whole MasterService with its journal's and publisher's order of things, fold,
coordinator, intake, agent. Simulated: what is on disk (plain objects that outlive a kill), the clock, and the
arithmetic: a version is the hash of its predecessor and of the updates that were counted in it, with coefficients.
"""

from __future__ import annotations

import hashlib
import queue
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import structlog

import common.numbers.slicing
import common.wire.transfer
import common.wire.versions
import master_service.arithmetic.generation
import master_service.history.state_directory
import master_service.service
import master_service.wire.publisher
import master_service.wire.updates
from common.brokers.memory import MemoryServer, MemorySubscription
from common.errors import BrokerUnavailable, SharedEncoderError, Unroutable
from common.numbers.layout import Layout
from common.numbers.slicing import payload_size, slice_count
from common.wire.broker import Delivery, OnDelivery, Publication, dead_letter
from common.wire.codec import decode, encode
from common.wire.messages import (
    Alive,
    Get,
    Instruction,
    InstructionAck,
    Message,
    ParameterChunk,
    Receipt,
    Rule,
    UpdateManifest,
)
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion, VersionAssembly, payload_digest
from master_service.arithmetic.aggregator import PayloadsLost
from master_service.config import MasterConfig
from master_service.decisions.effects import Effect, Publish, Send, Step
from master_service.decisions.records import (
    Entry,
    Loggable,
    Record,
    Skipped,
    UpdateFacts,
    Versioned,
    pack,
    unpack,
)
from master_service.decisions.settings import Settings
from master_service.decisions.state import State
from master_service.history.fold import Fold
from master_service.history.state_directory import Journal
from master_service.service import MasterService
from master_service.wire.updates import Updates
from node_service.agent import (
    Action,
    Agent,
    Answered,
    CheckSamples,
    Drop,
    Look,
    Read,
    Reincarnate,
    Republish,
    Say,
    Train,
)
from tests.builders import update_chunks

TOPOLOGY = Topology("sim")
#: Two chunks to an update and to a version, with `SLICE` made so small.
SLICE = 24
LAYOUT = Layout([("weight", (4, 8)), ("bias", (4,))])
TYPES = ("text", "image")
#: How long a node looks for a version on the stream that it was told of.
READ_SECONDS = 15.0
CONFIG = MasterConfig(state_dir=Path("nowhere"), presence_timeout_seconds=45.0, snapshot_every_seconds=1.0)


class Killed(BaseException):
    """kill -9: nothing catches it, nothing is tidied up."""


class Violation(AssertionError):
    """What must never happen has happened."""


def demand(condition: object, words: str) -> None:
    if not condition:
        raise Violation(words)


# --- the broker, with faults -----------------------------------------------------------------------------------------


class Consumer:
    """A consumer that outlives its channel: what was unacked comes again when that closes."""

    def __init__(self, world: WorldLike, queue_name: str, on_delivery: OnDelivery, prefetch: int) -> None:
        self.queue, self.on_delivery, self.closed = queue_name, on_delivery, False
        self._open = lambda: MemorySubscription(world.server, queue_name, on_delivery, prefetch, None)
        self._channel = self._open()

    def take(self) -> Delivery | None:
        return self._channel.take()

    def reopen(self) -> None:
        self._channel.close()
        self._channel = self._open()

    def move(self) -> None:
        """The broker has lost its disk, and what was unacked with it."""
        self._channel.closed = True
        self._channel.unacked.clear()
        self._channel = self._open()

    def close(self) -> None:
        self.closed = True
        self._channel.close()


class Wire:
    """One party's connection. `faults` are used up, one a publish: `lost`, `half` and `unconfirmed` fail with nothing,
    half or all of it stored; `twice` stores everything twice and succeeds."""

    def __init__(self, world: WorldLike, user: str) -> None:
        self._world, self._user = world, user
        self.faults: deque[str] = deque()
        self.consumers: list[Consumer] = []
        self._declared: list[Any] = []

    def declare(self, declarations: Any) -> None:
        self._world.server.declare(declarations)
        self._declared.append(declarations)

    def move(self) -> None:
        """To a broker with an empty disk."""
        for declarations in self._declared:
            self._world.server.declare(declarations)
        for consumer in self.consumers:
            if not consumer.closed:
                consumer.move()

    def lock(self, name: str, on_lost: Any) -> None:
        pass

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        fault = self.faults.popleft() if self.faults else ""
        if fault:
            self._world.seen[f"publish {fault}"] += 1
        stored = {"lost": (), "half": publications[: (len(publications) + 1) // 2]}.get(fault, publications)
        for publication in stored:
            for _ in range(2 if fault == "twice" else 1):
                self._world.server.publish(publication, self._user)
        if fault not in ("", "twice"):
            raise BrokerUnavailable("no confirm came")
        self._world.confirmed += publications

    def consume(self, queue_name: str, on_delivery: OnDelivery, *, prefetch: int) -> Consumer:
        consumer = Consumer(self._world, queue_name, on_delivery, prefetch)
        self.consumers = [each for each in self.consumers if not each.closed] + [consumer]
        return consumer

    def ack(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            if delivery.queue == TOPOLOGY.master_updates:
                done = delivery.message_id in self._world.disk.ids or delivery.message_id in self._world.asked_again
                demand(done, f"{delivery.message_id} is acked, and not in the log")
            subscription, tag = delivery.handle  # type: ignore[misc]
            message = subscription.unacked.pop(tag, None)
            if message is not None:
                self._world.acked.setdefault(delivery.queue, deque(maxlen=3)).append(message)

    def dead_letter(self, delivery: Delivery, reason: str, detail: str) -> None:
        self.publish(dead_letter(TOPOLOGY.dead_letters, delivery, reason, detail))
        self._world.asked_again.add(delivery.message_id or "")
        self.ack(delivery)

    def status(self) -> Any:
        return SimpleNamespace(bytes_out=0, connected=True, blocked=None, reconnects=0)

    def reopen(self) -> None:
        """The channels break: what was not acked goes back to its queues."""
        for consumer in self.consumers:
            if not consumer.closed:
                consumer.reopen()

    def close(self) -> None:
        for consumer in self.consumers:
            consumer.close()
        self.consumers, self.faults = [], deque()


# --- the master ------------------------------------------------------------------------------------------------------


@dataclass
class Snapshot:
    offset: int
    state: str
    targets: dict[str, tuple[str, tuple[Step, ...]]]


@dataclass
class MasterDisk:
    """What a master's kill leaves. `rows`: (entry without body, body as JSON, carried_out)."""

    rows: list[tuple[Entry, str, int]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    versions: set[tuple[str, int]] = field(default_factory=set)
    skipped: set[int] = field(default_factory=set)
    payloads: dict[str, bytes] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    deaths: Counter[str] = field(default_factory=Counter)
    handling: tuple[str, ...] = ()


class MemoryLog:
    """The ledger's interface over a MasterDisk."""

    def __init__(self, disk: MasterDisk) -> None:
        self._disk = disk
        self.payloads: Any = disk.payloads
        self.carried_out = disk.rows[-1][2] if disk.rows else -1

    @property
    def last_offset(self) -> int:
        return len(self._disk.rows) - 1

    def append(
        self,
        body: Loggable,
        *,
        message_id: str,
        at: float,
        facts: UpdateFacts | None = None,
        payload: str | None = None,
        carried_out: int = -1,
    ) -> Entry | None:
        disk = self._disk
        if message_id in disk.ids:
            return None
        previous = disk.rows[-1][0].at if disk.rows else 0.0
        entry = Entry(len(disk.rows), message_id, max(at, previous), body, facts, payload)
        disk.rows.append((entry, pack(body), carried_out))
        disk.ids.add(message_id)
        self.carried_out = carried_out
        if WORLD[0].deadly_next and not isinstance(body, Record):
            WORLD[0].deadly.add(entry.offset)
            WORLD[0].deadly_next = False
        if isinstance(body, Versioned):
            disk.versions.add((body.encoder, body.version))
        if isinstance(body, Skipped):
            disk.skipped.add(body.offset)
        return entry

    def entries(self, after: int = -1) -> Iterator[Entry]:
        for entry, body, _ in self._disk.rows[after + 1 :]:
            yield replace(entry, body=unpack(body), skipped=entry.offset in self._disk.skipped)

    def entry(self, offset: int) -> Entry:
        return next(self.entries(offset - 1))

    def find(self, message_id: str) -> Entry | None:
        return next((entry for entry in self.entries() if entry.message_id == message_id), None)

    def uses(self, payload: str) -> int:
        return sum(entry.payload == payload for entry, _, _ in self._disk.rows)

    def drop(self, payloads: list[str], reason: str, at: float) -> int:
        for payload in payloads:
            self._disk.dropped[payload] = reason
            self._disk.payloads.pop(payload, None)
        return 0

    def write_payload(self, payload: bytes) -> str:
        digest = hashlib.sha256(payload).hexdigest()
        self._disk.payloads[digest] = payload
        self._disk.dropped.pop(digest, None)
        return digest

    def dropped(self) -> dict[str, str]:
        return self._disk.dropped

    def bodies(self, kind: str) -> list[Loggable]:
        return [unpack(body) for entry, body, _ in self._disk.rows if entry.body.kind == kind]

    def repairs(self) -> list[Any]:
        return []


class MemoryAttempts:
    """Which message the master is working on, as `master_service.log.deadly` keeps it."""

    def __init__(self, disk: MasterDisk) -> None:
        self._disk = disk
        disk.deaths.update(what for what in disk.handling if what)
        disk.handling = ()

    @contextmanager
    def at(self, *what: str) -> Iterator[None]:
        self._disk.handling = what
        try:
            yield
        except SharedEncoderError:
            self._disk.handling = ()
            raise
        self._disk.handling = ()

    def fatal(self, what: str) -> bool:
        return self._disk.deaths[what] >= 2

    def close(self) -> None:
        pass


class Parameters:
    """Parameters that are nothing but their digest."""

    layout = LAYOUT

    def __init__(self, digest: str) -> None:
        self.vector = digest

    def digest(self) -> str:
        return self.vector

    def to_bytes(self) -> bytes:
        return b"fresh"


class Tokens:
    """An aggregator that remembers what it was given: a version is the hash of its predecessor and of that."""

    def __init__(self, payloads: dict[str, bytes]) -> None:
        self._payloads = payloads
        self.targets: dict[str, Any] = {}

    def begin(self, encoder: str, layout: Layout, digest: str) -> None:
        demand(digest in self._payloads, "version 0 is generated without its payload")
        self.targets[encoder] = SimpleNamespace(parameters=Parameters(digest), steps=(), digests={0: digest})

    def step(self, step: Step) -> str:
        lost = [each.payload for each in step.contributions if each.payload not in self._payloads]
        if lost:
            raise PayloadsLost(dict.fromkeys(lost, "missing"))
        target = self.targets[step.encoder]
        plain = (target.parameters.vector, step.version, [(c.payload, c.coefficient) for c in step.contributions])
        target.parameters = Parameters(hashlib.sha256(repr(plain).encode()).hexdigest())
        target.steps += (step,)
        target.digests[step.version] = target.parameters.digest()
        return target.parameters.digest()

    def saved(self) -> dict[str, tuple[str, tuple[Step, ...]]]:
        return {name: (target.parameters.vector, target.steps) for name, target in self.targets.items()}


class LiveFold(Fold):
    """The fold of a running master, which some messages kill."""

    def apply(self, entry: Entry) -> list[Effect]:
        world = WORLD[0]
        if entry.offset in world.deadly and not entry.skipped:
            world.seen["killed: deadly message"] += 1
            raise Killed
        return super().apply(entry)


def token_fold(disk: MasterDisk, snapshot: Snapshot | None = None, kind: type[Fold] = Fold) -> Fold:
    """A real fold around the simulated arithmetic."""
    payloads: Any = disk.payloads
    if snapshot is None:
        fold = kind(payloads)
        fold.aggregator = Tokens(payloads)  # type: ignore[assignment]
        return fold
    fold = kind(payloads, State.model_validate_json(snapshot.state), snapshot.offset)
    tokens = Tokens(payloads)
    for name, (digest, steps) in snapshot.targets.items():
        tokens.targets[name] = SimpleNamespace(parameters=Parameters(digest), steps=steps, digests={})
    fold.aggregator = tokens  # type: ignore[assignment]
    return fold


class MemoryJournal(Journal):
    """The real journal's order of things over a MasterDisk."""

    def __init__(self, config: MasterConfig, clock: Any, wait_for_room: Any) -> None:
        disk = WORLD[0].disk
        self._clock, self._disk = clock, disk
        self.log: Any = MemoryLog(disk)
        self.fold = token_fold(disk, disk.snapshots[-1] if disk.snapshots else None, LiveFold)
        self.attempts: Any = MemoryAttempts(disk)
        self.storage: Any = SimpleNamespace(write=lambda write: write())
        self.carried_out = max(self.log.carried_out, self.fold.offset)
        self.due = False

    def snapshot(self, *, due_after: float = 0.0) -> None:
        if due_after and not self.due:
            return
        self.due = False
        step("before snapshot")
        fold: Any = self.fold
        taken = Snapshot(fold.offset, fold.coordinator.state.model_dump_json(), fold.aggregator.saved())
        step("during snapshot")
        self._disk.snapshots = [*self._disk.snapshots[-1:], taken]
        step("after snapshot")

    def close(self) -> None:
        pass


class Events:
    """The master's queue of deliveries; never waits."""

    def __init__(self) -> None:
        self._ready: deque[Delivery] = deque()

    def put(self, delivery: Delivery) -> None:
        self._ready.append(delivery)

    def get(self, timeout: float) -> Delivery:
        if not self._ready:
            raise queue.Empty
        return self._ready.popleft()

    def __len__(self) -> int:
        return len(self._ready)


class SimMaster(MasterService):
    """The real service; only its loop is turned by hand."""

    def __init__(self, world: WorldLike, settings: Settings) -> None:
        self.world = world
        self.wire = Wire(world, "master")
        super().__init__(CONFIG, settings, self.wire, TOPOLOGY, get="text", clock=world.clock)  # type: ignore[arg-type]
        self._events: Any = Events()
        updates: Any = self._updates
        updates._on_delivery, updates.ask_again = self._events.put, self.ask_again

    def start(self) -> None:
        """As `run` does until its loop."""
        self.wire.declare(TOPOLOGY.master())
        self._recover()
        self.queues = {
            "inbox": self.wire.consume(TOPOLOGY.master_inbox, self._events.put, prefetch=64),
            "updates": self.wire.consume(TOPOLOGY.master_updates, self._events.put, prefetch=4),
        }
        self._record(Get(sender="master", encoder_type="text"))

    def prefetch(self, name: str) -> bool:
        """Take a delivery from a queue; it waits in memory."""
        if name == "chunks":
            intake = self._updates.intake
            consumer: Any = intake._subscription if intake is not None else None
        else:
            consumer = self.queues[name]
        delivery = consumer.take() if consumer is not None else None
        if delivery is not None:
            self._events.put(delivery)
        return delivery is not None

    def turn(self) -> None:
        self._turn()

    def busy(self) -> bool:
        return len(self._events) > 0

    def intake(self) -> bool:
        return self._updates.intake is not None

    def chunks_missing(self) -> None:
        """The time for an update's chunks is over."""
        if self._updates.intake is not None:
            self._updates.intake.deadline = -1.0
            self.turn()

    def snapshot(self) -> None:
        self._journal.due = True  # type: ignore[attr-defined]
        self.turn()

    def stop(self) -> None:
        """As `run` ends when it is told to."""
        self.wire.close()
        self._journal.snapshot()

    @property
    def fold(self) -> Fold:
        return self._fold

    def _ended(self, seconds: float) -> bool:
        return False

    def ask_again(self, intake: Any) -> None:
        manifest = intake.manifest
        self.world.asked_again.add(f"{manifest.update_id}/{manifest.attempt}")
        Updates.ask_again(self._updates, intake)

    def _send_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            receipt = effect.message if isinstance(effect, Send) and isinstance(effect.message, Receipt) else None
            if receipt is not None and receipt.accepted:
                logged = (receipt.encoder, receipt.version) in self.world.disk.versions
                demand(logged, "a receipt leaves before its version is in the log")
            if isinstance(effect, Publish) and effect.version > 0:
                logged = (effect.encoder, effect.version) in self.world.disk.versions
                demand(logged, "a version leaves before its digest is in the log")
        super()._send_out(effects)


# --- a node ----------------------------------------------------------------------------------------------------------

Key = tuple[str, str, int]


@dataclass
class NodeDisk:
    """A node's state directory. `trail`: every update that was ever owed here, by digest, and what became of it."""

    incarnation: str
    next_sequence: int = 0
    owed: dict[int, tuple[UpdateManifest, bytes]] = field(default_factory=dict)
    receipts: dict[Key, Receipt] = field(default_factory=dict)
    current: tuple[Instruction, Rule] | None = None

    def copy(self) -> NodeDisk:
        return NodeDisk(self.incarnation, self.next_sequence, dict(self.owed), dict(self.receipts), self.current)

    def answered(self) -> dict[int, Receipt]:
        return {r.sequence: r for r in self.receipts.values() if r.incarnation == self.incarnation}


class SimNode:
    """The real agent; the shell around it does what `node_service.service` does, in its order."""

    def __init__(self, world: WorldLike, name: str, disk: NodeDisk) -> None:
        self.world, self.name, self.disk = world, name, disk
        self.wire = Wire(world, name)
        self.alive = True
        self.outbox: deque[list[Publication]] = deque()
        self.reads: list[Read | Look] = []
        self.version, self.wait_until = -1, -1
        self.training: Instruction | None = None
        self.kill_in = -1
        self.sent_at: dict[int, float] = {}
        self.searching: Read | None = None
        self.give_up_at = 0.0

    def start(self) -> None:
        self.wire.declare(TOPOLOGY.node(self.name, TYPES))
        self._open()
        self.agent = Agent(self.name, self.disk.incarnation, TYPES)
        self.inbox = self.wire.consume(TOPOLOGY.node_inbox(self.name), lambda delivery: None, prefetch=32)
        self._perform(self.agent.join())
        for sequence in sorted(self.disk.owed):
            self._send_again(sequence)
        self.agent.unanswered = set(self.disk.owed)
        if self.disk.current is not None:
            instruction, rule = self.disk.current
            self._build(instruction)
            self._perform(self.agent.resume(instruction, rule, -1))

    def _open(self) -> None:
        """As LocalState does: drop what is answered, mend the number, begin anew after a conflict."""
        disk, answered = self.disk, self.disk.answered()
        for sequence in [each for each in disk.owed if each in answered]:
            del disk.owed[sequence]
        disk.next_sequence = max(disk.next_sequence, 1 + max((*answered, *disk.owed), default=-1))
        if any(receipt.reason == "conflict" for receipt in answered.values()):
            self._new_incarnation()

    def kill(self) -> None:
        self.alive = False
        self.wire.close()

    def step(self, label: str) -> None:
        """A moment at which this process may die."""
        self.world.seen[f"node: {label}"] += 1
        self.kill_in -= 1
        if self.kill_in == 0:
            self.world.seen[f"killed: node {label}"] += 1
            raise Killed

    # --- what it does of itself --------------------------------------------------------------------------------------

    def hear(self) -> bool:
        """Take one message."""
        delivery = self.inbox.take()
        if delivery is None:
            return False
        message = decode(delivery.body)
        if isinstance(message, Receipt):
            self.world.heard.append(message)
        owed = self.disk.owed.get(message.sequence) if isinstance(message, Receipt) else None
        mistaken = (
            owed is not None
            and isinstance(message, Receipt)
            and owed[0].incarnation == message.incarnation
            and owed[0].digest != message.digest
        )
        self._perform(self.agent.mistaken() if mistaken else self.agent.receive(message))
        self.step("before ack")
        self.wire.ack(delivery)
        self.step("after ack")
        return True

    def flush(self) -> bool:
        """Publish what waits first."""
        if not self.outbox:
            return False
        try:
            self.wire.publish(*self.outbox[0])
        except (BrokerUnavailable, Unroutable):
            return True  # tried again later
        self.outbox.popleft()
        self.step("after send")
        return True

    def may_train(self) -> bool:
        rule = self.agent.rule
        if self.training is None or rule is None or not self.agent.training or self.version < 0:
            return False
        if rule.update_rule.wait and self.version <= self.wait_until:
            return False
        return len(self.agent.unanswered) < rule.update_rule.max_unanswered

    def train(self, *, wants_version: bool = True) -> UpdateManifest | None:
        """Train, and hand in: a payload that no other update has."""
        if not self.may_train():
            return None
        assert self.training is not None
        disk, sequence = self.disk, self.disk.next_sequence
        disk.next_sequence += 1
        self.step("before owe")
        token = f"{self.name}/{sequence}/{next(self.world.tokens)}".encode().ljust(payload_size(LAYOUT.size, "int8"))
        manifest = UpdateManifest(
            node=self.name,
            incarnation=disk.incarnation,
            encoder=self.training.encoder,
            sequence=sequence,
            base_version=self.version,
            steps=10,
            samples=100,
            seconds=1.0,
            loss=5.0,
            wants_version=wants_version,
            encoding="int8",
            layout_digest=LAYOUT.digest,
            size=len(token),
            chunks=slice_count(LAYOUT.size),
            digest=payload_digest([token]),
        )
        disk.owed[sequence] = (manifest, token)
        self.world.trail[manifest.digest] = manifest
        self.step("after owe")
        self._send(manifest, token)
        self.agent.unanswered.add(sequence)
        self.wait_until = self.version
        return manifest

    def read(self) -> bool:
        """Read the version that was wanted last."""
        if not self.reads:
            return False
        named = [each for each in self.reads if isinstance(each, Read)]
        wanted, self.reads = (named or self.reads)[-1], []
        found = self._scan(wanted)
        if found is None and isinstance(wanted, Read):
            told = (wanted.encoder, wanted.at_least)
            demand(told in self.world.lost, f"{self.name} was told of {wanted}, and the stream does not hold it")
            if self.searching != wanted:
                self.searching, self.give_up_at = wanted, self.world.clock() + READ_SECONDS
            if self.world.clock() < self.give_up_at:
                self.reads = [wanted]
                return False
            self._perform(self.agent.read_failed(wanted.encoder, wanted.at_least))
        self.searching = None
        if found is None:
            return True
        if self.training is None or self.training.encoder != wanted.encoder:
            return True
        exact = isinstance(wanted, Read) and wanted.exact
        if self.agent.finishes(wanted.encoder, found.version, exact=exact):
            self.disk.current = None
        elif not self.agent.adopts(wanted.encoder, found.version, exact=exact):
            return True
        self.version = found.version
        self._perform(self.agent.version_read(wanted.encoder, found.version))
        return True

    def say_alive(self, resend_after: float = 0.0) -> None:
        """A sign of life; what has been unanswered for so many seconds is sent again."""
        encoder = self.agent.current.encoder if self.agent.current else None
        self._say(Alive(node=self.name, incarnation=self.disk.incarnation, encoder=encoder))
        for sequence in sorted(self.disk.owed):
            waited = self.world.clock() - self.sent_at.get(sequence, -1e9)
            if waited >= resend_after and len(self.outbox) < 4:
                self._send_again(sequence)

    def ask(self) -> None:
        """Nothing was heard for long."""
        if not self.may_train():
            self._perform(self.agent.ask())
        self._perform(self.agent.look())

    def leave(self) -> None:
        """Say goodbye and end; what cannot be sent stays owed."""
        self.train(wants_version=False)
        self._perform(self.agent.leave())
        while self.outbox and not self.wire.faults:
            left = len(self.outbox)
            self.flush()
            if len(self.outbox) == left:
                break  # no queue takes it
        self.kill()

    # --- what follows ------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Say():
                    self._say(action.message)
                case CheckSamples():
                    if self.training is None or self.training != action.instruction:
                        self._build(action.instruction)
                    self._perform(self.agent.samples_checked(action.instruction, 100))
                case Train():
                    assert self.training is not None
                    self.disk.current = (self.training, action.rule)
                case Read() | Look():
                    self.reads.append(action)
                case Drop():
                    self.training, self.disk.current = None, None
                case Answered():
                    self._settle(action.receipt)
                case Republish():
                    self._send_again(action.sequence, action.attempt)
                case Reincarnate():
                    self.world.seen["reincarnated"] += 1
                    self._new_incarnation()
                    self.agent = Agent(self.name, self.disk.incarnation, TYPES)
                    self.training, self.version, self.wait_until = None, -1, -1
                    self._perform(self.agent.join())

    def _build(self, instruction: Instruction) -> None:
        """A model from nothing; what was handed in before says from which version to go on under a rule that waits."""
        self.training, self.version = instruction, -1
        mine = [manifest for manifest, _ in self.disk.owed.values() if manifest.encoder == instruction.encoder]
        answered = {n: r for n, r in self.disk.answered().items() if r.encoder == instruction.encoder}
        last = max((*(m.sequence for m in mine), *answered), default=-1)
        owed = next((manifest for manifest in mine if manifest.sequence == last), None)
        receipt = answered.get(last)
        self.wait_until = -1
        if owed is not None:
            self.wait_until = owed.base_version
        elif receipt is not None and receipt.accepted:
            self.wait_until = receipt.version - 1

    def _settle(self, receipt: Receipt) -> None:
        self.step("before receipt")
        key = (receipt.encoder, receipt.incarnation, receipt.sequence)
        new = key not in self.disk.receipts
        self.disk.receipts.setdefault(key, receipt)
        self.step("after receipt")
        owed = self.disk.owed.pop(receipt.sequence, None)
        if owed is not None:
            self.world.settled(self, owed[0], receipt)
        if new and not receipt.accepted:
            self.wait_until = -1

    def _new_incarnation(self) -> None:
        self.disk.incarnation, self.disk.next_sequence = self.world.incarnation(self.name), 0
        self.disk.owed, self.disk.current = {}, None

    def _say(self, message: Message) -> None:
        if isinstance(message, InstructionAck):
            exchange, key = TOPOLOGY.ack, self.name
        else:
            exchange, key = TOPOLOGY.request, f"{self.name}.{message.kind.removeprefix('request.')}"  # type: ignore[attr-defined]
        self.outbox.append([Publication(exchange, key, encode(message), message_id=self.world.message_id())])

    def _send_again(self, sequence: int, attempt: int | None = None) -> None:
        if sequence in self.disk.owed:
            manifest, token = self.disk.owed[sequence]
            number = manifest.attempt + 1 if attempt is None else attempt
            if number <= manifest.attempt:
                return
            manifest = manifest.model_copy(update={"attempt": number})
            self.disk.owed[sequence] = (manifest, token)
            self._send(manifest, token)

    def _send(self, manifest: UpdateManifest, token: bytes) -> None:
        self.sent_at[manifest.sequence] = self.world.clock()
        bodies = [token[:28], token[28:]]
        chunks = [
            Publication(TOPOLOGY.update, f"{self.name}.chunk", encode(chunk))
            for chunk in update_chunks(manifest, bodies)
        ]
        message_id = f"{manifest.update_id}/{manifest.attempt}"
        ready = Publication(TOPOLOGY.update, f"{self.name}.ready", encode(manifest), message_id=message_id)
        self.outbox += [chunks, [ready]]

    def _scan(self, wanted: Read | Look) -> CompleteVersion | None:
        """The newest version on the stream that is new enough, as `common.wire.versions` finds it."""
        found = None
        assembly = VersionAssembly(wanted.encoder, LAYOUT.digest)
        for chunk in self.world.stream(wanted.encoder):
            done = assembly.add(chunk)
            exact = isinstance(wanted, Read) and wanted.exact
            if done is None or (done.version != wanted.at_least if exact else done.version < wanted.at_least):
                continue
            if found is None or (done.epoch, done.version) >= (found.epoch, found.version):
                found = done
        return found


# --- the seams between the real and the simulated --------------------------------------------------------------------


class WorldLike:
    """What the parties need of the world that they are in."""

    server: MemoryServer
    disk: MasterDisk
    seen: Counter[str]
    confirmed: list[Publication]
    #: Of each queue the messages that were acked last: a broker that dies may have forgotten that.
    acked: dict[str, deque[Any]]
    #: Versions (of an encoder) that a broker's death has taken from a stream, or a part of them.
    lost: set[tuple[str, int]]
    asked_again: set[str]
    heard: list[Receipt]
    trail: dict[str, UpdateManifest]
    tokens: Iterator[int]
    kill_in: int
    #: Rows that kill the master whenever it folds them, and whether the next one is to be such.
    deadly: set[int]
    deadly_next: bool

    def clock(self) -> float:
        raise NotImplementedError

    def message_id(self) -> str:
        raise NotImplementedError

    def incarnation(self, node: str) -> str:
        raise NotImplementedError

    def stream(self, encoder: str) -> list[ParameterChunk]:
        raise NotImplementedError

    def settled(self, node: SimNode, owed: UpdateManifest, receipt: Receipt) -> None:
        raise NotImplementedError


#: The world that is being simulated, for the seams that have no other way to it.
WORLD: list[WorldLike] = []


def step(label: str) -> None:
    """A labelled step of the master: it dies here if that was ordered."""
    world = WORLD[0]
    world.seen[f"master: {label}"] += 1
    world.kill_in -= 1
    if world.kill_in == 0:
        world.seen[f"killed: master {label}"] += 1
        raise Killed


#: Ids that are the same whenever a plan is lived through again.
_IDS = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=WORLD[0].message_id()))


def _generate(effect: Any) -> tuple[dict[str, Any], Parameters]:
    return {}, Parameters(hashlib.sha256(b"fresh").hexdigest())


@contextmanager
def simulated() -> Iterator[None]:
    """The real modules with their clock, arithmetic, ids and labelled steps taken over."""
    quiet = structlog.wrap_logger(None, processors=[], wrapper_class=structlog.make_filtering_bound_logger(50))
    service, journal, publisher = (
        master_service.service,
        master_service.history.state_directory,
        master_service.wire.publisher,
    )
    changes: list[tuple[Any, dict[str, Any]]] = [
        (
            service,
            {
                "Journal": MemoryJournal,
                "fingerprint": dict,
                "export_encoder": lambda directory, encoder, parameters: None,
                "reached": step,
                "log": quiet,
            },
        ),
        (
            master_service.wire.updates,
            {"measure": lambda payload, size, encoding: (True, 1.0), "reached": step, "log": quiet},
        ),
        (master_service.arithmetic.generation, {"generate": _generate, "log": quiet}),
        (journal, {"reached": step, "uuid": _IDS, "log": quiet}),
        (
            publisher,
            {
                "reached": step,
                "uuid": _IDS,
                "log": quiet,
                "time": SimpleNamespace(monotonic=lambda: WORLD[0].clock()),
                "encode_vector": lambda digest, encoding: [digest[:32].encode(), digest[32:].encode()],
            },
        ),
        (common.wire.versions, {"time": SimpleNamespace(time=lambda: WORLD[0].clock())}),
        (common.numbers.slicing, {"SLICE": SLICE}),
        (common.wire.transfer, {"SLICE": SLICE}),
    ]
    with ExitStack() as stack:
        for module, names in changes:
            stack.enter_context(patch.multiple(module, **names))
        yield
