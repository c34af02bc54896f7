"""The master's shell: broker, disk and clock around the fold. One thread decides; deliveries wait for it in a queue."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import torch

from common.broker import Broker, Delivery
from common.codec import decode
from common.errors import BrokerUnavailable, Damaged, Poison, UserError
from common.messages import (
    Alive,
    AskStatus,
    Get,
    Introduce,
    Message,
    Resend,
    StatusReport,
    UpdateChunk,
    UpdateManifest,
)
from common.parameters import ParameterSet
from common.steps import reached
from common.topology import Topology
from master_service.aggregator import PayloadsLost, measure
from master_service.config import MasterConfig
from master_service.effects import Broadcast, Conclude, Effect, Generate, Publish, Refused, Send, SetAside, Step
from master_service.entries import (
    Configured,
    Entry,
    Generated,
    GenerationFailed,
    Loggable,
    Presence,
    Record,
    Settings,
    Skipped,
    Started,
    StepFailed,
    Tick,
    UpdateFacts,
    Versioned,
)
from master_service.fingerprint import fingerprint
from master_service.generation import generate
from master_service.inbox import identity, understood
from master_service.intake import Intake
from master_service.journal import Journal
from master_service.publisher import Publisher
from master_service.registry import check_export_directory, export_encoder
from master_service.status import Live, report

log = structlog.get_logger()

_POLL_SECONDS = 0.25
#: Between two looks whether there is room on the disk again.
_ROOM_SECONDS = 0.5
#: An update that does not count is answered at once; its chunks, which were there before its manifest, are thrown away
#: until none has come for so long, or for the longer time in all: what else a node sends must not hold up the others.
#: What is left is thrown away with those of the node's next update that counts.
_DISCARD_SECONDS = (0.1, 1.0)


@dataclass
class MasterService:
    """Runs until stopped, or until all encoders are finished if so configured.

    Made: the state directory is locked and the newest snapshot read. Raises LockHeld, which names the holder, Damaged,
    or UserError for an export directory that holds something else. `on_change` is called in the service's thread
    whenever something happened that is worth showing.
    """

    config: MasterConfig
    settings: Settings
    broker: Broker
    topology: Topology
    get: str | None = None
    on_change: Callable[[MasterService], None] = lambda service: None
    clock: Callable[[], float] = time.time
    live: Live = field(default_factory=Live)

    def __post_init__(self) -> None:
        self._events: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._held: deque[Delivery] = deque()
        self._manifests: deque[Delivery] = deque()
        self._intake: Intake | None = None
        #: By node: chunks that the last intake in vain has passed by.
        self._passed: dict[str, set[tuple[str, int, int]]] = {}
        self._lost = threading.Event()
        self._stop = threading.Event()
        if self.config.export_dir is not None:
            check_export_directory(self.config.export_dir)
        self._journal = Journal(self.config, self.clock, self._wait_for_room)
        self._fold = self._journal.fold
        self._publisher = Publisher(self.broker, self.topology, self.config.encoding, self._ended)

    # --- life --------------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set.

        Raises LockHeld if another master serves this namespace, BrokerUnavailable once its lock is lost, Damaged if the
        state directory cannot be recovered from, StorageFull if it is stopped while the disk is full.
        """
        torch.set_num_threads(self.config.threads)
        self._stop = stop
        try:
            self.broker.lock(self.topology.master_lock, self._lost.set)
            self.broker.declare(self.topology.master())
            self._recover()
            self._serve()
            # only here: after an error the state in memory may be half of an entry, and the log is the truth
            self._journal.snapshot()
        finally:
            self._journal.close()

    def _serve(self) -> None:
        subscriptions = [
            self.broker.consume(self.topology.master_inbox, self._events.put, prefetch=64),
            self.broker.consume(self.topology.master_updates, self._events.put, prefetch=4),
        ]
        try:
            if self.get is not None:
                self._record(Get(sender="master", encoder_type=self.get))
            while not self._stop.is_set() and not self._done():
                self._turn()
                if self._lost.is_set():
                    raise BrokerUnavailable("the lock of this namespace was lost; another master may be serving it now")
        finally:
            for subscription in subscriptions:
                subscription.close()
            if self._intake is not None:
                self._intake.close()

    def _recover(self) -> None:
        """Fold what the log holds after the snapshot, repeat what may not have left, and tell everybody."""
        journal, fold = self._journal, self._fold
        again, last = journal.carried_out, journal.log.last_offset
        if last > again and self._kills(journal.log.entry(last)):
            log.error("a message has killed the master twice; it is skipped and set aside", offset=last)
            journal.append(Skipped(offset=last))
        try:
            for entry in journal.log.entries(fold.offset):
                effects = self._refold(entry)
                if entry.offset > again:
                    self._send_out(effects)
        except PayloadsLost as error:
            raise Damaged(
                f"{error}, in {self.config.state_dir / 'payloads'}: a version that was published was made of it; "
                "restore it from a backup of the state directory"
            ) from None
        journal.carried_out = fold.offset
        with journal.attempts.at(_row(fold.offset)):
            outcomes = [_Outcome(fold.compute(encoder)) for encoder in fold.pending]
            outcomes += [_generated(effect) for effect in fold.coordinator.unmade()]
        self._record_all(outcomes)
        state = fold.coordinator.state
        # later than every epoch before, also when rows of the log were lost
        self._record(Started(epoch=max(state.epoch + 1, int(self.clock())), fingerprint=fingerprint()))
        if state.settings != self.settings:
            self._record(Configured(settings=self.settings))
        # who has vanished meanwhile is missed as if it had been heard just now
        for known in state.nodes.values():
            self.live.begin(known.node, known.present, self.clock())

    def _kills(self, entry: Entry) -> bool:
        """Whether an entry has killed the master often enough. The master's own records are never skipped."""
        fatal = self._journal.attempts.fatal(_row(entry.offset))
        return fatal and not isinstance(entry.body, Record) and not entry.skipped

    def _refold(self, entry: Entry) -> list[Effect]:
        """Fold an entry of the log once more. Raises Damaged if a version does not come out as it was logged."""
        with self._journal.attempts.at(_row(entry.offset)):
            check = self._fold.check(entry.body) if isinstance(entry.body, Versioned) else None
            effects = self._fold.apply(entry)
        if check is not None and not check.identical:
            raise Damaged(
                f"version {check.version} of {check.encoder} comes out different from the log: "
                f"{self.config.state_dir} is damaged, or another torch or processor computed it; see `log verify`"
            )
        return effects

    def _done(self) -> bool:
        encoders = self._fold.coordinator.state.encoders.values()
        return (
            self.config.exit_when_finished
            and bool(encoders)
            and all(encoder.status in ("finished", "failed") for encoder in encoders)
        )

    def _ended(self, seconds: float) -> bool:
        """Wait; whether the service is to end."""
        return self._stop.wait(seconds) or self._lost.is_set()

    def _turn(self) -> None:
        """Wait for one delivery or for a deadline, and handle it."""
        with contextlib.suppress(queue.Empty):
            self._receive(self._held.popleft() if self._held else self._events.get(timeout=self._patience()))
        now = self.clock()
        deadline = self._fold.coordinator.deadline()
        if deadline is not None and now >= deadline:
            self._record(Tick())
        for node, present in self.live.transitions(now, self.config.presence_timeout_seconds):
            self._record(Presence(node=node, present=present))
        if self._intake is not None and time.monotonic() > self._intake.deadline:
            self._chunks_missing(self._intake)
        self._journal.snapshot(due_after=self.config.snapshot_every_seconds)
        self.on_change(self)

    def _patience(self) -> float:
        """How long to wait for a delivery, in seconds."""
        if self._intake is None:
            return _POLL_SECONDS
        return min(_POLL_SECONDS, max(0.0, self._intake.deadline - time.monotonic()) + 0.001)

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _receive(self, delivery: Delivery) -> None:
        intake = self._intake
        if intake is not None and delivery.queue == self.topology.chunk_queue(intake.manifest.node):
            if intake.add(delivery):
                self._take_update(intake)
            elif not intake.wanted:
                intake.deadline = min(time.monotonic() + _DISCARD_SECONDS[0], intake.begun + _DISCARD_SECONDS[1])
            return
        if delivery.queue not in (self.topology.master_inbox, self.topology.master_updates):
            return  # a chunk of an intake that has ended: it went back to its queue when that closed
        what = identity(delivery)
        try:
            if delivery.redelivered and self._journal.attempts.fatal(what):
                raise Poison("kills", "the master died of it twice")
            with self._journal.attempts.at(what):
                message = understood(delivery, self.topology)
        except Poison as poison:
            self._dead_letter(delivery, poison)
            return
        if delivery.queue == self.topology.master_updates:
            self._manifests.append(delivery)
            self._next_manifest()
        else:
            self._handle_message(delivery, message)

    def _handle_message(self, delivery: Delivery, message: Message) -> None:
        node = getattr(message, "node", None)
        if node is not None:
            self.live.seen(node, self.clock())
        if not self._answer(message):
            # below the sender's name: nobody can take the id of another's message, or of an update
            message_id = f"{delivery.routing_key}:{delivery.message_id}" if delivery.message_id else None
            self._record(message, message_id=message_id, delivery=identity(delivery))  # type: ignore[arg-type]
        reached("before ack")
        self.broker.ack(delivery)
        reached("after ack")

    def _answer(self, message: Message) -> bool:
        """What is shown and not decided upon needs no log, and goes on while the disk is full."""
        if isinstance(message, Alive):
            self.live.alive(message)
            known = self._fold.coordinator.state.nodes.get(message.node)
            if known is None or known.incarnation != message.incarnation:
                self._publisher.send(message.node, Introduce(node=message.node))
        elif isinstance(message, AskStatus):
            self._publisher.send(message.sender, StatusReport(report=self.report()))
        else:
            return False
        return True

    def _next_manifest(self) -> None:
        """Begin with the next update, if none is being fetched. One that does not count is answered here."""
        if self._intake is not None or not self._manifests:
            return
        delivery = self._manifests.popleft()
        manifest = decode(delivery.body)
        assert isinstance(manifest, UpdateManifest)
        self.live.seen(manifest.node, self.clock())
        # one that kills the master is not fetched any more, and is refused for want of its payload
        deadly = self._journal.attempts.fatal(_update(manifest))
        wanted = not deadly and self._fold.coordinator.wants_payload(manifest)
        if not wanted:
            self._record(manifest, message_id=_delivery_id(manifest), delivery=_update(manifest))
        patience = self.config.chunk_timeout_seconds if wanted else _DISCARD_SECONDS[0]
        self._intake = Intake(
            self.broker,
            self.topology,
            manifest,
            delivery,
            wanted=wanted,
            begun=time.monotonic(),
            patience=patience,
            on_delivery=self._events.put,
            on_poison=self._dead_letter,
            is_done=self._is_done,
        )

    def _take_update(self, intake: Intake) -> None:
        """All chunks are here: make the update durable, then decide on it, then remove it from the broker."""
        manifest = intake.manifest
        if intake.wanted:
            if self._fold.coordinator.wants_payload(manifest) and self._is_spent(_delivery_id(manifest)):
                self._ask_again(intake)
                return
            payload = intake.payload()
            size = self._fold.coordinator.state.encoders[manifest.encoder].size
            with self._journal.attempts.at(_update(manifest)):
                finite, norm = measure(payload, size, manifest.encoding)
            digest = self._journal.write_payload(payload)
            facts = UpdateFacts(digest=digest, size=len(payload), finite=finite, norm=norm)
            self._record(
                manifest, message_id=_delivery_id(manifest), facts=facts, payload=digest, delivery=_update(manifest)
            )
        reached("before ack of an update")
        intake.settle()
        reached("after ack of an update")
        self._end_intake(intake)

    def _is_done(self, chunk: UpdateChunk) -> bool:
        """Whether a chunk of a lower number is of no use: its update is answered, or an intake before this one had to
        pass it by already, so that its manifest should have come."""
        passed = (chunk.incarnation, chunk.sequence, chunk.attempt) in self._passed.get(chunk.node, set())
        return passed or self._fold.coordinator.is_done(chunk)

    def _is_spent(self, delivery_id: str) -> bool:
        """Whether this very delivery is in the log to no effect: its node was not known then, or its payload was lost.
        One that was skipped is not asked for again; it is refused."""
        entry = self._journal.log.find(delivery_id)
        return entry is not None and not entry.skipped

    def _chunks_missing(self, intake: Intake) -> None:
        """Of an update that does not count they are not missed; of another the node has them still."""
        if intake.wanted:
            self._ask_again(intake)
        else:
            self._take_update(intake)

    def _ask_again(self, intake: Intake) -> None:
        """The node sends the chunks again as another attempt."""
        manifest = intake.manifest
        log.warning("chunks missing, asking the node to send again", update=manifest.update_id)
        resend = Resend(
            encoder=manifest.encoder,
            node=manifest.node,
            incarnation=manifest.incarnation,
            sequence=manifest.sequence,
            attempt=manifest.attempt + 1,
        )
        self._passed[manifest.node] = intake.passed
        self._publisher.send(manifest.node, resend)
        self.broker.ack(intake.delivery)
        self._end_intake(intake)

    def _end_intake(self, intake: Intake) -> None:
        intake.close()
        self._intake = None
        self._next_manifest()

    def _dead_letter(self, delivery: Delivery, poison: Poison) -> None:
        self.live.poison += 1
        self._publisher.dead_letter(delivery, poison)

    # --- what is decided ---------------------------------------------------------------------------------------------

    def _record(
        self,
        body: Loggable,
        *,
        message_id: str | None = None,
        facts: UpdateFacts | None = None,
        payload: str | None = None,
        delivery: str = "",
    ) -> None:
        """Append to the log, fold, and carry out what follows. A message id that is in the log already has no effect,
        except that an update is answered again."""
        journal = self._journal
        entry = journal.append(body, message_id=message_id, facts=facts, payload=payload)
        if entry is None:
            if not isinstance(body, UpdateManifest):
                return
            # the log has it, its answer may not have left: recorded as one more delivery of the same update
            entry = journal.append(body)
            assert entry is not None
        with journal.attempts.at(_row(entry.offset), delivery):
            effects = self._fold.apply(entry)
            reached("during fold")
            outcomes = []
            for effect in effects:
                if isinstance(effect, Step):
                    outcomes.append(_Outcome(self._fold.compute(effect.encoder)))
                elif isinstance(effect, Generate):
                    outcomes.append(_generated(effect))
        self._send_out(effects)
        journal.carried_out = entry.offset
        self._record_all(outcomes)

    def _record_all(self, outcomes: list[_Outcome]) -> None:
        """What was computed because of an entry: logged after everything else that the entry led to."""
        for outcome in outcomes:
            body, payload = outcome.body, None
            if outcome.parameters is not None:
                payload = self._journal.write_payload(outcome.parameters.to_bytes())
            if isinstance(body, StepFailed):
                log.error("payloads are damaged; their nodes are asked to send again", lost=body.lost)
            self._record(body, payload=payload)

    def _send_out(self, effects: list[Effect]) -> None:
        """In order. Steps and generations are not sent: their outcomes are logged."""
        for effect in effects:
            match effect:
                case Send():
                    self._publisher.send(effect.to, effect.message)
                case Broadcast():
                    self._publisher.broadcast(effect.encoder_type, effect.message)
                case Publish():
                    parameters = self._fold.aggregator.targets[effect.encoder].parameters
                    self._publisher.version(effect, self._fold.coordinator.state.epoch, parameters)
                case Conclude():
                    self._export(effect)
                case Refused():
                    self._journal.drop_refused(effect.payload)
                case SetAside():
                    self.live.poison += 1
                    message = self._journal.log.entry(effect.offset).body
                    self._publisher.dead_message(message, "kills", f"row {effect.offset} killed the master twice")

    def _export(self, effect: Conclude) -> None:
        encoder = self._fold.coordinator.state.encoders[effect.encoder]
        directory = self.config.export_dir or self.config.state_dir / "encoders" / effect.encoder
        reached("before export")
        try:
            export_encoder(directory, encoder, self._fold.aggregator.targets[effect.encoder].parameters)
        except OSError as error:
            again = f"shared-encoder export {effect.encoder} --state {self.config.state_dir}"
            log.error("the finished encoder could not be exported", problem=str(error), later=again)
            return
        log.info("encoder finished", encoder=effect.encoder, version=effect.version, directory=str(directory))

    def _wait_for_room(self) -> bool:
        """The disk is full: answer who asks for the status; everything else waits, not acked. False at the end."""
        until = time.monotonic() + _ROOM_SECONDS
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                delivery = self._events.get(timeout=left)
                if self._is_answered(delivery):
                    self.broker.ack(delivery)
                else:
                    self._held.append(delivery)
        self.on_change(self)
        return not self._ended(0.0)

    def _is_answered(self, delivery: Delivery) -> bool:
        """Answer a delivery that needs no log."""
        if delivery.queue != self.topology.master_inbox:
            return False
        try:
            return self._answer(understood(delivery, self.topology))
        except Poison:
            return False

    def report(self) -> dict[str, object]:
        """What `status` shows. Times in seconds, sizes in bytes."""
        plain = report(self._fold.coordinator.state, self.live, self.broker.status(), self.clock())
        return plain | {"bytes_published": self._publisher.bytes_out} | self._journal.report()


@dataclass(frozen=True)
class _Outcome:
    """What a step or a generation led to; version 0 comes with its parameters."""

    body: Versioned | StepFailed | Generated | GenerationFailed
    parameters: ParameterSet | None = None


def _generated(effect: Generate) -> _Outcome:
    log.info("making the encoder", encoder=effect.encoder, generation=effect.generation)
    try:
        architecture, parameters = generate(effect)
    except UserError as error:
        log.error("the encoder could not be made", encoder=effect.encoder, problem=str(error))
        return _Outcome(GenerationFailed(encoder=effect.encoder, reason=str(error)))
    body = Generated(
        encoder=effect.encoder,
        architecture=architecture,
        layout=parameters.layout.plain(),
        layout_digest=parameters.layout.digest,
        digest=parameters.digest(),
    )
    return _Outcome(body, parameters)


def _delivery_id(manifest: UpdateManifest) -> str:
    return f"{manifest.update_id}/{manifest.attempt}"


def _update(manifest: UpdateManifest) -> str:
    """What an update is known by, however often it is sent."""
    return f"update {manifest.update_id}"


def _row(offset: int) -> str:
    return f"row {offset}"
