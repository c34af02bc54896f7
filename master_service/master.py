"""One master, stepped by hand: messages in, decisions in the log, messages out. It knows no thread and never sleeps.

What is decided goes through `record`. `service` drives it with a queue and a real clock, `deploy.simulate` and the
fault tests by hand under a virtual one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import structlog

from common.clock import Clock, Signal
from common.errors import Poison, StorageBlocked
from common.wire.broker import Broker, Delivery, OnDelivery
from common.wire.messages import (
    Alive,
    Answer,
    AskStatus,
    Continue,
    Get,
    Introduce,
    Message,
    NodeMessage,
    StatusReport,
    Stop,
    UpdateManifest,
    Words,
)
from common.wire.topology import Topology
from master_service.config import MasterConfig
from master_service.decisions.messages_out import resend
from master_service.decisions.records import (
    Presence,
    Tick,
)
from master_service.decisions.settings import Settings
from master_service.decisions.state import State
from master_service.history.state_directory import Journal, random_id
from master_service.record import ROOM_SECONDS, Recorder, Todo
from master_service.status import Live, Report, report
from master_service.wire.inbox import identity, refusal, understood
from master_service.wire.intake import CompleteUpdate
from master_service.wire.publisher import Publisher
from master_service.wire.updates import Updates

log = structlog.get_logger()

#: The longest time between two looks of a master to which nothing comes, seconds.
IDLE_SECONDS = 0.25
#: Between two signs of life.
PULSE_SECONDS = 10.0


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
        """`settings` is given the settings that the log ends with (None: a fresh log) and gives those to go on with; it
        may raise UserError. `get`: make an encoder of this type. The broker calls `on_delivery` with each delivery;
        whoever drives this then passes it to `hear`."""
        self.config = config
        self.live = Live()
        self._settings = settings
        self._broker = broker
        self._topology = topology
        self.journal = journal
        self._arithmetic = journal.fold.arithmetic
        self._coordinator = journal.fold.coordinator
        self._get = get
        self._clock = clock
        self._on_delivery = on_delivery
        self._publisher = Publisher(broker, topology, config.encoding, clock=clock, ending=ending, new_id=new_id)
        self.recorder = Recorder(config, journal, self._publisher, broker, self.live, clock)
        self._updates = Updates(
            broker,
            topology,
            patience=config.chunk_timeout_seconds,
            clock=clock,
            on_delivery=on_delivery,
        )
        self._held: deque[Delivery] = deque()
        self._pulse_at = 0.0

    # --- what drives it ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Declare what is its own, fold what the log holds after the snapshot, repeat what may not have left, and tell
        everybody. Raises Damaged if the state directory cannot be recovered from, UserError for settings."""
        self._broker.declare(self._topology.master())
        self.recorder.recover(self._settings)
        self._publisher.begin(self.state.epoch)
        if self._get is not None:
            self.recorder.record(Todo(Get(sender="master", encoder_type=self._get)))

    def hear(self, delivery: Delivery) -> None:
        """Handle one delivery. While the disk is full it waits, unless it can be answered without the log."""
        if self.recorder.blocked:
            if not self._is_answered(delivery):
                self._held.append(delivery)
            return
        if self._updates.is_chunk(delivery):
            self._hear_chunk(delivery)
        elif delivery.queue in (self._topology.master_inbox, self._topology.master_updates):
            self._hear_message(delivery)
        # else a chunk of an intake that has ended: it went back to its queue when that closed

    def look(self) -> float:
        """Do what time has made due; gives the seconds until this is wanted again."""
        if self.recorder.blocked and not self._go_on():
            return ROOM_SECONDS
        now = self._clock.now()
        deadline = self._coordinator.deadline()
        if deadline is not None and now >= deadline:
            self.recorder.record(Todo(Tick()))
        for node, present in self.live.transitions(now, self.config.presence_timeout_seconds):
            self.recorder.record(Todo(Presence(node=node, present=present)))
        self._end_in_vain()
        if self._clock.monotonic() >= self._pulse_at:
            self._pulse_at = self._clock.monotonic() + PULSE_SECONDS
            self._publisher.pulse(self.state.epoch)
        if not self.recorder.blocked:
            self.journal.snapshot(due_after=self.config.snapshot_every_seconds)
        return min(IDLE_SECONDS, self._updates.seconds_left() + 0.001)

    @property
    def state(self) -> State:
        """What the log has led to."""
        return self.recorder.state

    @property
    def done(self) -> bool:
        """Whether every encoder has ended, and there is one."""
        encoders = self.state.encoders.values()
        return bool(encoders) and all(encoder.status in ("finished", "failed") for encoder in encoders)

    def report(self) -> Report:
        """What `status` shows."""
        disk, rows, snapshot = self.journal.report(self.recorder.blocked)
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
        """Write one now. Not after an error. Raises StorageBlocked while something waits to be written."""
        if self.recorder.blocked:
            raise StorageBlocked(self.recorder.blocked)
        self.journal.snapshot()

    def close(self) -> None:
        """Give back what was fetched and not recorded."""
        self._updates.done()

    def _go_on(self) -> bool:
        """The disk was full: go on if there is room again, with what has come meanwhile."""
        if not self.recorder.writes_again():
            return False
        while self._held and not self.recorder.blocked:
            self.hear(self._held.popleft())
        return not self.recorder.blocked

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
        elif self._answer(message, delivery) or self._are_idle_words(message):
            self.recorder.acknowledge((delivery,))
        else:
            # below the sender's name: nobody can take the id of another's message, or of an update
            message_id = f"{delivery.routing_key}:{delivery.message_id}" if delivery.message_id else None
            self.recorder.record(Todo(message, message_id, work=what, deliveries=(delivery,)))  # type: ignore[arg-type]

    def _answer(self, message: Message, delivery: Delivery) -> bool:
        """What is shown and not decided upon needs no log, and goes on while the disk is full; nor does what is not for
        its sender to ask."""
        if isinstance(message, Get | Continue | Stop):
            if not (why := refusal(message, delivery, self._topology, self.config)):
                return False
            log.warning("request refused", sender=message.sender, kind=message.kind, why=why)
            self._publisher.send(message.sender, Answer(accepted=False, detail=why))
        elif isinstance(message, Alive):
            self.live.alive(message)
            self._introduce(message)
        elif isinstance(message, AskStatus):
            self._publisher.send(message.sender, StatusReport(report=self.report().model_dump()))
        else:
            return False
        return True

    def _are_idle_words(self, message: Message) -> bool:
        """Words that would not count get no row: each could be of a mebibyte. A stranger says them again once it has
        joined. Not while the disk is full: what waits for room may decide whether they count."""
        if not isinstance(message, Words) or self._coordinator.wants_words(message):
            return False
        self._introduce(message)
        return True

    def _introduce(self, message: NodeMessage) -> None:
        """Ask a node to join, if it is not known as it says it is."""
        known = self.state.nodes.get(message.node)
        if known is None or known.incarnation != message.incarnation:
            self._publisher.send(message.node, Introduce(node=message.node))

    def _is_answered(self, delivery: Delivery) -> bool:
        """Answer a delivery that needs no log, and ack it."""
        if delivery.queue != self._topology.master_inbox:
            return False
        try:
            answered = self._answer(understood(delivery, self._topology), delivery)
        except Poison:
            return False
        if answered:
            self.recorder.acknowledge((delivery,))
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
            self.recorder.record(Todo(manifest, _delivery_id(manifest), work=_work(manifest)))
        self._updates.fetch(wanted=wanted)

    def _hear_chunk(self, delivery: Delivery) -> None:
        try:
            update = self._updates.add(delivery)
        except Poison as poison:
            self._set_aside(delivery, poison)
            return
        if update is not None:
            self._take(update)
        self._end_in_vain()

    def _end_in_vain(self) -> None:
        """Chunks that do not come are sent again; of an update that does not count they are not missed."""
        while (intake := self._updates.in_vain()) is not None:
            if intake.wanted:
                then = "later ones" if intake.overtaken else "none for a while"
                self._ask_again(f"{intake.progress}, and then {then}")
            else:
                self.recorder.acknowledge(intake.update().deliveries, update=True)
                self._updates.done()
                self._next_update()

    def _take(self, update: CompleteUpdate) -> None:
        """All chunks are here: make the update durable, then decide on it, then remove it from the broker."""
        manifest, intake = update.manifest, self._updates.intake
        if intake is None or not intake.wanted:
            self.recorder.acknowledge(update.deliveries, update=True)
        elif self._coordinator.wants_payload(manifest) and self._is_spent(_delivery_id(manifest)):
            self._ask_again("this attempt was looked at already")
            return
        else:
            size = self.state.encoders[manifest.encoder].size
            with self.journal.attempts.at(_work(manifest)):
                measured = self._arithmetic.measure(update.payload, size, manifest.encoding)
            self.recorder.record(
                Todo(
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
        self._publisher.send(manifest.node, resend(manifest.encoder, manifest, why, beyond=intake.overtaken))
        self._broker.ack(intake.announcement)
        self._updates.done()
        self._next_update()

    def _is_spent(self, delivery_id: str) -> bool:
        """Whether this very delivery is in the log to no effect: its node was not known then, or its payload was lost.
        One that was skipped is not asked for again; it is refused."""
        entry = self.journal.log.find(delivery_id)
        return entry is not None and not entry.skipped


def _delivery_id(manifest: UpdateManifest) -> str:
    return f"{manifest.update_id}/{manifest.attempt}"


def _work(manifest: UpdateManifest) -> str:
    """What the work on an update is known by, however often it is sent."""
    return f"update {manifest.update_id}"
