"""One master, stepped by hand: messages in, decisions in the log, messages out. It knows no thread and never sleeps.

`_drain` is the product's invariant, and its only home: what is to be decided is appended to the log, marked, folded and
computed; what follows from it leaves; only then is what it came in acked. A process that dies anywhere in between goes
on from the log. `service` drives it with a queue and a real clock, `deploy.simulate` and the fault tests by hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import structlog

from common.clock import Clock, Signal
from common.crash_points import reached
from common.errors import Damaged, Poison, StorageFull, UserError
from common.events import happened
from common.wire.broker import Broker, Delivery, OnDelivery
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
from master_service.arithmetic.arithmetic import Outcome, PayloadsLost
from master_service.config import MasterConfig
from master_service.decisions.effects import (
    Broadcast,
    Conclude,
    DeleteStream,
    Effect,
    Generate,
    Publish,
    Refused,
    Send,
    SetAside,
    Step,
)
from master_service.decisions.messages_out import resend
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
from master_service.decisions.settings import Settings
from master_service.decisions.state import State
from master_service.history.state_directory import Journal, random_id
from master_service.narration import events
from master_service.status import Live, Report, report
from master_service.wire.inbox import identity, understood
from master_service.wire.intake import CompleteUpdate
from master_service.wire.publisher import Publisher
from master_service.wire.updates import Updates

log = structlog.get_logger()

#: How long a master to which nothing comes need not be looked after, seconds.
IDLE_SECONDS = 0.25
#: Between two signs of life.
PULSE_SECONDS = 10.0
#: Between two looks whether there is room on the disk again, seconds.
_ROOM_SECONDS = 0.5


@dataclass(frozen=True)
class _Todo:
    """Something to be logged and carried out. `work`: what it is known by, should it kill. `payload` is stored first,
    and for an update `measured` says whether it is finite, and its norm; `deliveries` are acked last."""

    body: Loggable
    message_id: str | None = None
    payload: bytes | None = None
    measured: tuple[bool, float] | None = None
    work: str = ""
    deliveries: tuple[Delivery, ...] = ()


class Master:
    """`start`, then `hear` and `look` as things come and time passes; `close` at any end.

    While the disk is full nothing is decided or acked: it waits here, and `blocked` says why. After an error nothing
    more may be asked of it: what is in memory may be half of an entry, and the log is the truth.
    """

    def __init__(
        self,
        config: MasterConfig,
        settings: Callable[[Settings | None], Settings],
        broker: Broker,
        topology: Topology,
        journal: Journal,
        *,
        get: str | None,
        clock: Clock,
        ending: Signal,
        on_delivery: OnDelivery,
        new_id: Callable[[], str] = random_id,
    ) -> None:
        """`settings` gives what to decide by from here on, of what the log says; it may raise UserError. `get`: make an
        encoder of this type. `on_delivery` is called by the broker with what is then to be given to `hear`."""
        self.config = config
        self.live = Live()
        self.blocked = ""
        self._settings = settings
        self._broker = broker
        self._topology = topology
        self.journal = journal
        self._fold = journal.fold
        self._coordinator = journal.fold.coordinator
        self._get = get
        self._clock = clock
        self._on_delivery = on_delivery
        self._publisher = Publisher(broker, topology, config.encoding, clock=clock, ending=ending, new_id=new_id)
        self._updates = Updates(
            broker,
            topology,
            patience=config.chunk_timeout_seconds,
            clock=clock,
            on_delivery=on_delivery,
            is_done=self._coordinator.is_done,
        )
        self._todo: deque[_Todo] = deque()
        self._held: deque[Delivery] = deque()
        self._try_again_at = 0.0
        self._pulse_at = 0.0

    # --- what drives it ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Declare what is its own, fold what the log holds after the snapshot, repeat what may not have left, and tell
        everybody. Raises Damaged if the state directory cannot be recovered from, UserError for settings."""
        self._broker.declare(self._topology.master())
        self._recover()
        if self._get is not None:
            self._record(_Todo(Get(sender="master", encoder_type=self._get)))

    def hear(self, delivery: Delivery) -> None:
        """Handle one delivery. While the disk is full it waits, unless it can be answered without the log."""
        if self.blocked and not self._is_answered(delivery):
            self._held.append(delivery)
            return
        if self._updates.is_chunk(delivery):
            self._hear_chunk(delivery)
        elif delivery.queue in (self._topology.master_inbox, self._topology.master_updates):
            self._hear_message(delivery)
        # else a chunk of an intake that has ended: it went back to its queue when that closed

    def look(self) -> float:
        """Do what time has made due; gives the seconds until this is wanted again."""
        if self.blocked and not self._has_room_again():
            return _ROOM_SECONDS
        now = self._clock.now()
        deadline = self._coordinator.deadline()
        if deadline is not None and now >= deadline:
            self._record(_Todo(Tick()))
        for node, present in self.live.transitions(now, self.config.presence_timeout_seconds):
            self._record(_Todo(Presence(node=node, present=present)))
        if (overdue := self._updates.overdue()) is not None:
            if overdue.wanted:
                self._ask_again(f"{overdue.progress}, and then none for a while")
            else:
                self._acknowledge(overdue.update().deliveries, update=True)
                self._updates.done()
                self._next_update()
        if self._clock.monotonic() >= self._pulse_at:
            self._pulse_at = self._clock.monotonic() + PULSE_SECONDS
            self._publisher.pulse(self.state.epoch)
        if not self.blocked:
            self.journal.snapshot(due_after=self.config.snapshot_every_seconds)
        return min(IDLE_SECONDS, self._updates.seconds_left() + 0.001)

    @property
    def state(self) -> State:
        """What the log has led to."""
        return self._coordinator.state

    @property
    def done(self) -> bool:
        """Whether every encoder has ended, and there is one."""
        encoders = self.state.encoders.values()
        return bool(encoders) and all(encoder.status in ("finished", "failed") for encoder in encoders)

    def report(self) -> Report:
        """What `status` shows."""
        disk, rows, snapshot = self.journal.report()
        return report(
            self.state,
            self.live,
            self._broker.status(),
            now=self._clock.now(),
            bytes_published=self._publisher.bytes_out,
            disk=disk,
            log=rows,
            snapshot=snapshot,
        )

    def snapshot(self) -> None:
        """Write one now. Not after an error. Raises StorageFull while something waits for room."""
        if self.blocked:
            raise StorageFull(self.blocked)
        self.journal.snapshot()

    def close(self) -> None:
        """Give back what was fetched and not recorded."""
        self._updates.done()

    # --- recovery ----------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        journal, fold = self.journal, self._fold
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
        state = self.state
        # before anything is written: a start that is refused leaves the log as it is
        settings = self._settings(state.settings if state.epoch else None)
        journal.carried_out = fold.offset
        with journal.attempts.at(_row(fold.offset)):
            outcomes = [Outcome(fold.compute(encoder)) for encoder in fold.pending]
            outcomes += [fold.arithmetic.generated(effect) for effect in self._coordinator.unmade()]
        for outcome in outcomes:
            self._record(_Todo(outcome.body, payload=outcome.payload))
        # before the epoch: a first start that dies in between is a first start again
        if state.settings != settings:
            self._record(_Todo(Configured(settings=settings)))
        # later than every epoch before, also when rows of the log were lost
        epoch = max(state.epoch + 1, int(self._clock.now()))
        self._record(_Todo(Started(epoch=epoch, fingerprint=fold.arithmetic.fingerprint())))
        # who has vanished meanwhile is missed as if it had been heard just now
        for known in state.nodes.values():
            self.live.begin(known.node, known.present, self._clock.now())

    def _kills(self, entry: Entry) -> bool:
        """Whether an entry has killed the master often enough. The master's own records are never skipped."""
        fatal = self.journal.attempts.fatal(_row(entry.offset))
        return fatal and not isinstance(entry.body, Record) and not entry.skipped

    def _refold(self, entry: Entry) -> list[Effect]:
        """Fold an entry of the log once more. Raises Damaged if a version does not come out as it was logged."""
        with self.journal.attempts.at(_row(entry.offset)):
            check = self._fold.check(entry.body) if isinstance(entry.body, Versioned) else None
            effects = self._fold.apply(entry)
        if check is not None and not check.identical:
            raise Damaged(
                f"version {check.version} of {check.encoder} comes out different from the log: "
                f"{self.config.state_dir} is damaged, or another torch or processor computed it; see `log verify`"
            )
        return effects

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _hear_message(self, delivery: Delivery) -> None:
        attempts, what = self.journal.attempts, identity(delivery)
        try:
            if delivery.redelivered and attempts.fatal(what):
                raise Poison("kills", "the master died of it twice")
            with attempts.at(what):
                message = understood(delivery, self._topology)
        except Poison as poison:
            self._set_aside(delivery, poison)
            return
        node = getattr(message, "node", None)
        if node is not None:
            self.live.seen(node, self._clock.now())
        if isinstance(message, UpdateManifest):
            self._updates.announced(message, delivery)
            self._next_update()
        elif self._answer(message):
            self._acknowledge((delivery,))
        else:
            # below the sender's name: nobody can take the id of another's message, or of an update
            message_id = f"{delivery.routing_key}:{delivery.message_id}" if delivery.message_id else None
            self._record(_Todo(message, message_id, work=what, deliveries=(delivery,)))  # type: ignore[arg-type]

    def _answer(self, message: Message) -> bool:
        """What is shown and not decided upon needs no log, and goes on while the disk is full."""
        if isinstance(message, Alive):
            self.live.alive(message)
            known = self.state.nodes.get(message.node)
            if known is None or known.incarnation != message.incarnation:
                self._publisher.send(message.node, Introduce(node=message.node))
        elif isinstance(message, AskStatus):
            self._publisher.send(message.sender, StatusReport(report=self.report().model_dump()))
        else:
            return False
        return True

    def _is_answered(self, delivery: Delivery) -> bool:
        """Answer a delivery that needs no log, and ack it."""
        if delivery.queue != self._topology.master_inbox:
            return False
        try:
            answered = self._answer(understood(delivery, self._topology))
        except Poison:
            return False
        if answered:
            self._acknowledge((delivery,))
        return answered

    def _set_aside(self, delivery: Delivery, poison: Poison) -> None:
        self.live.poison += 1
        self._publisher.dead_letter(delivery, poison)

    # --- updates -----------------------------------------------------------------------------------------------------

    def _next_update(self) -> None:
        """Begin with the next update, if none is being fetched. One that does not count is answered at once."""
        manifest = self._updates.turn()
        if manifest is None:
            return
        # one that kills the master is not fetched any more, and is refused for want of its payload
        deadly = self.journal.attempts.fatal(_work(manifest))
        wanted = not deadly and self._coordinator.wants_payload(manifest)
        if not wanted:
            self._record(_Todo(manifest, _delivery_id(manifest), work=_work(manifest)))
        self._updates.fetch(wanted=wanted)

    def _hear_chunk(self, delivery: Delivery) -> None:
        try:
            update = self._updates.add(delivery)
        except Poison as poison:
            self._set_aside(delivery, poison)
            return
        if update is not None:
            self._take(update)

    def _take(self, update: CompleteUpdate) -> None:
        """All chunks are here: make the update durable, then decide on it, then remove it from the broker."""
        manifest, intake = update.manifest, self._updates.intake
        if intake is None or not intake.wanted:
            self._acknowledge(update.deliveries, update=True)
        elif self._coordinator.wants_payload(manifest) and self._is_spent(_delivery_id(manifest)):
            self._ask_again("this attempt was looked at already")
            return
        else:
            size = self.state.encoders[manifest.encoder].size
            with self.journal.attempts.at(_work(manifest)):
                measured = self._fold.arithmetic.measure(update.payload, size, manifest.encoding)
            self._record(
                _Todo(
                    manifest,
                    _delivery_id(manifest),
                    payload=update.payload,
                    measured=measured,
                    work=_work(manifest),
                    deliveries=update.deliveries,
                )
            )
        self._updates.done()
        self._next_update()

    def _ask_again(self, why: str) -> None:
        """The node sends the chunks again as another attempt."""
        if (intake := self._updates.intake) is None:
            return
        manifest = intake.manifest
        log.warning("asking a node to send its update again", node=manifest.node, update=manifest.update_id, why=why)
        self._publisher.send(manifest.node, resend(manifest.encoder, manifest, why))
        self._broker.ack(intake.announcement)
        self._updates.gave_up()
        self._next_update()

    def _is_spent(self, delivery_id: str) -> bool:
        """Whether this very delivery is in the log to no effect: its node was not known then, or its payload was lost.
        One that was skipped is not asked for again; it is refused."""
        entry = self.journal.log.find(delivery_id)
        return entry is not None and not entry.skipped

    # --- what is decided ---------------------------------------------------------------------------------------------

    def _record(self, todo: _Todo) -> None:
        """Log something and carry out what follows; after what waits already."""
        self._todo.append(todo)
        if not self.blocked:
            self._drain()

    def _drain(self) -> None:
        """Append, mark, fold, compute, send, carried out, ack: one entry after the other, each with what it leads to.

        Where there is no room on the disk it stops before the entry that does not fit, and goes on from there later.
        """
        journal = self.journal
        while self._todo:
            todo = self._todo[0]
            try:
                payload, facts = self._store(todo)
                entry = journal.append(todo.body, message_id=todo.message_id, facts=facts, payload=payload)
                if entry is None and isinstance(todo.body, UpdateManifest):
                    # the log has it, its answer may not have left: recorded as one more delivery of the same update
                    entry = journal.append(todo.body)
            except StorageFull as error:
                self._wait_for_room(str(error))
                return
            self._todo.popleft()
            if entry is not None:
                self._carry_out(entry, todo.work)
            if todo.deliveries:
                self._acknowledge(todo.deliveries, update=isinstance(todo.body, UpdateManifest))

    def _store(self, todo: _Todo) -> tuple[str | None, UpdateFacts | None]:
        """Make a payload durable; its digest, and the facts of an update. Raises StorageFull."""
        if todo.payload is None:
            return None, None
        digest = self.journal.write_payload(todo.payload)
        if todo.measured is None:
            return digest, None
        finite, norm = todo.measured
        return digest, UpdateFacts(digest=digest, size=len(todo.payload), finite=finite, norm=norm)

    def _carry_out(self, entry: Entry, work: str) -> None:
        """What an entry leads to. What was computed because of it is logged before anything else."""
        journal, fold = self.journal, self._fold
        with journal.attempts.at(_row(entry.offset), work):
            effects = fold.apply(entry)
            reached("during fold")
            outcomes = []
            for effect in effects:
                if isinstance(effect, Step):
                    outcomes.append(Outcome(fold.compute(effect.encoder)))
                elif isinstance(effect, Generate):
                    outcomes.append(fold.arithmetic.generated(effect))
        self._send_out(effects)
        journal.carried_out = entry.offset
        for what, facts in events(entry, effects):
            happened(what, **facts)
        for outcome in outcomes:
            if isinstance(outcome.body, StepFailed):
                log.error("payloads are damaged; their nodes are asked to send again", lost=outcome.body.lost)
        self._todo.extendleft(_Todo(outcome.body, payload=outcome.payload) for outcome in reversed(outcomes))

    def _send_out(self, effects: list[Effect]) -> None:
        """In order. Steps and generations are not sent: their outcomes are logged."""
        for effect in effects:
            match effect:
                case Send():
                    self._publisher.send(effect.to, effect.message)
                case Broadcast():
                    self._publisher.broadcast(effect.encoder_type, effect.message)
                case Publish():
                    self._publish(effect)
                case DeleteStream():
                    self._publisher.delete_stream(effect.encoder)
                case Conclude():
                    self._export(effect)
                case Refused():
                    self.journal.drop_refused(effect.payload)
                case SetAside():
                    self.live.poison += 1
                    message = self.journal.log.entry(effect.offset).body
                    self._publisher.dead_message(message, "kills", f"row {effect.offset} killed the master twice")
                case Step() | Generate():
                    pass
                case _:
                    assert_never(effect)

    def _publish(self, effect: Publish) -> None:
        state = self.state
        if self._publisher.is_due(effect, state.epoch):
            bodies = self._fold.arithmetic.encoded(effect.encoder, self.config.encoding)
            self._publisher.version(effect, state.epoch, state.encoders[effect.encoder].layout_digest, bodies)

    def _export(self, effect: Conclude) -> None:
        encoder = self.state.encoders[effect.encoder]
        directory = self.config.export_dir or self.config.state_dir / "encoders" / effect.encoder
        reached("before export")
        try:
            self._fold.arithmetic.export(directory, encoder)
        except (OSError, UserError) as error:  # UserError: an encoder type of another package that cannot do it
            again = f"shared-encoder export {effect.encoder} --state {self.config.state_dir}"
            log.error("the finished encoder could not be exported", problem=str(error), later=again)
            return
        log.info("encoder finished", encoder=effect.encoder, version=effect.version, directory=str(directory))

    def _acknowledge(self, deliveries: tuple[Delivery, ...], *, update: bool = False) -> None:
        reached("before ack of an update" if update else "before ack")
        self._broker.ack(*deliveries)
        reached("after ack of an update" if update else "after ack")

    # --- a full disk -------------------------------------------------------------------------------------------------

    def _wait_for_room(self, problem: str) -> None:
        if not self.blocked:
            log.error("the disk is full: accepting nothing until there is room", problem=problem)
        self.blocked = problem
        self._try_again_at = self._clock.monotonic() + _ROOM_SECONDS

    def _has_room_again(self) -> bool:
        """Try what waits once more; then what has come meanwhile."""
        if self._clock.monotonic() < self._try_again_at:
            return False
        self._drain()
        if self._todo:
            return False
        self.blocked = ""
        log.info("there is room on the disk again")
        while self._held and not self.blocked:
            self.hear(self._held.popleft())
        return not self.blocked


def _row(offset: int) -> str:
    return f"row {offset}"


def _delivery_id(manifest: UpdateManifest) -> str:
    return f"{manifest.update_id}/{manifest.attempt}"


def _work(manifest: UpdateManifest) -> str:
    """What the work on an update is known by, however often it is sent."""
    return f"update {manifest.update_id}"
