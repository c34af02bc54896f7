"""The master's shell: broker, disk and clock around the fold. One thread decides; deliveries wait for it in a queue."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch

from common.crash_points import reached
from common.errors import BrokerUnavailable, Damaged, Poison
from common.wire.broker import Broker, Delivery
from common.wire.messages import (
    Alive,
    AskStatus,
    Get,
    Introduce,
    Message,
    StatusReport,
    UpdateManifest,
)
from common.wire.topology import Topology
from master_service.arithmetic.aggregator import PayloadsLost
from master_service.arithmetic.export import check_export_directory, export_encoder
from master_service.arithmetic.generation import Outcome, fingerprint, generated
from master_service.config import MasterConfig
from master_service.decisions.effects import (
    Broadcast,
    Conclude,
    Effect,
    Generate,
    Publish,
    Refused,
    Send,
    SetAside,
    Step,
)
from master_service.decisions.records import (
    Configured,
    Entry,
    Loggable,
    Presence,
    Record,
    Skipped,
    Started,
    StepFailed,
    Tick,
    UpdateFacts,
    Versioned,
)
from master_service.decisions.settings import Settings, settled
from master_service.history.state_directory import Journal
from master_service.status import Live, Report, report
from master_service.wire.inbox import identity, understood
from master_service.wire.publisher import Publisher
from master_service.wire.updates import Updates

log = structlog.get_logger()

_POLL_SECONDS = 0.25
#: Between two looks whether there is room on the disk again.
_ROOM_SECONDS = 0.5


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
    clock: Callable[[], float] = time.time
    live: Live = field(default_factory=Live)

    def __post_init__(self) -> None:
        self._events: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._held: deque[Delivery] = deque()
        self._lost = threading.Event()
        self._stop = threading.Event()
        if self.config.export_dir is not None:
            check_export_directory(self.config.export_dir)
        self._journal = Journal(self.config, self.clock, self._wait_for_room)
        self._fold = self._journal.fold
        self._publisher = Publisher(self.broker, self.topology, self.config.encoding, self._ended)
        self._updates = Updates(
            self.broker,
            self.topology,
            self._journal,
            self._fold.coordinator,
            self._publisher,
            patience=self.config.chunk_timeout_seconds,
            record=self._record,
            on_delivery=self._events.put,
            on_poison=self._dead_letter,
        )

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
            self._updates.close()

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
        state = fold.coordinator.state
        # before anything is written: a start that is refused leaves the log as it is
        settings = settled(state.settings if state.epoch else None, self.settings, self.given, change=self.change)
        journal.carried_out = fold.offset
        with journal.attempts.at(_row(fold.offset)):
            outcomes = [Outcome(fold.compute(encoder)) for encoder in fold.pending]
            outcomes += [generated(effect) for effect in fold.coordinator.unmade()]
        self._record_all(outcomes)
        # before the epoch: a first start that dies in between is a first start again
        if state.settings != settings:
            self._record(Configured(settings=settings))
        # later than every epoch before, also when rows of the log were lost
        self._record(Started(epoch=max(state.epoch + 1, int(self.clock())), fingerprint=fingerprint()))
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
        self._updates.look()
        self._journal.snapshot(due_after=self.config.snapshot_every_seconds)
        self.on_change(self)

    def _patience(self) -> float:
        """How long to wait for a delivery, in seconds."""
        return min(_POLL_SECONDS, self._updates.seconds_left() + 0.001)

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _receive(self, delivery: Delivery) -> None:
        if self._updates.took(delivery):
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
        if isinstance(message, UpdateManifest):
            self.live.seen(message.node, self.clock())
            self._updates.announced(message, delivery)
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
            self._publisher.send(message.sender, StatusReport(report=self.report().model_dump()))
        else:
            return False
        return True

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
                    outcomes.append(Outcome(self._fold.compute(effect.encoder)))
                elif isinstance(effect, Generate):
                    outcomes.append(generated(effect))
        self._send_out(effects)
        journal.carried_out = entry.offset
        self._record_all(outcomes)

    def _record_all(self, outcomes: list[Outcome]) -> None:
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

    def report(self) -> Report:
        """What `status` shows."""
        disk, rows, snapshot = self._journal.report()
        return report(
            self._fold.coordinator.state,
            self.live,
            self.broker.status(),
            now=self.clock(),
            bytes_published=self._publisher.bytes_out,
            disk=disk,
            log=rows,
            snapshot=snapshot,
        )


def _row(offset: int) -> str:
    return f"row {offset}"
