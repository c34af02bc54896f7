"""One master, stepped by hand: messages in, decisions in the log, messages out. It knows no thread and never sleeps.

What is decided goes through `record`. `service` drives it with a queue and a real clock, `deploy.simulate` and the
fault tests by hand under a virtual one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import structlog

from common.clock import Clock, Signal
from common.encoders import encoder_type_names
from common.errors import Poison, StorageBlocked
from common.numbers.slicing import payload_size
from common.wire.base import Message, NodeMessage
from common.wire.broker import Broker, Delivery, OnDelivery
from common.wire.to_master import Alive, AskStatus, Continue, Get, Join, Operation, Stop, UpdateManifest, Words
from common.wire.to_node import Answer, Introduce, StatusReport
from common.wire.topology import MIB, Topology
from master_service.config import MasterConfig
from master_service.decisions import operating
from master_service.decisions.changes import Logged
from master_service.decisions.limits import refused
from master_service.decisions.messages_out import resend
from master_service.decisions.rates import Rates
from master_service.decisions.records import (
    Presence,
    Tick,
)
from master_service.decisions.settings import Settings
from master_service.decisions.state import State
from master_service.history.state_directory import Journal, random_id
from master_service.record import ROOM_SECONDS, Recorder, Todo
from master_service.status import Live, Report, report
from master_service.wire import orders
from master_service.wire.arriving import Arrived
from master_service.wire.inbox import identity, refusal, understood
from master_service.wire.intake import CompleteUpdate
from master_service.wire.outbox import Outbox
from master_service.wire.pace import Pace, sender_of
from master_service.wire.publisher import Publisher
from master_service.wire.shards import Shards
from master_service.wire.updates import Updates

log = structlog.get_logger()

#: The longest time between two looks of a master to which nothing comes, seconds.
IDLE_SECONDS = 0.25
#: Between two signs of life.
PULSE_SECONDS = 10.0
#: Deliveries of the master's two queues that are at hand, at most. What one sender has waiting here is far less, so it
#: keeps out nobody; and `bounded` bounds each.
INBOX_PREFETCH = 256
UPDATES_PREFETCH = 512
#: The least that intakes have together, bytes, where nothing is said: many small updates fit in.
_INTAKE_BYTES = 16 * MIB
#: Updates are answered without being fetched for so long at a time, seconds; then it is looked at what has come.
_TURN_SECONDS = 0.02
#: Whose update cannot be dealt with now is looked at again after so many seconds, or when the log has gone on.
_HELD_SECONDS = 0.1
#: How long a snapshot that is due waits for what is to leave, and how long it is before it is tried again, seconds.
_DRAIN_SECONDS, _DRAIN_AGAIN_SECONDS = 0.5, 10.0
#: A sender that was silent may send so many times what it may send in a second.
_BURST = 5.0


class Master:
    """`start`, then `hear` and `look` as things come and time passes; `close` at any end.

    While the disk is full nothing is decided or acked: it waits here, and `blocked` says why. After an error nothing
    more may be asked of it: what is in memory may be half of an entry, and the log is the truth.
    """

    def __init__(
        self,
        config: MasterConfig,
        settings: Callable[[Logged | None], Settings],
        broker: Broker,
        topology: Topology,
        journal: Journal,
        *,
        get: str | None,
        clock: Clock,
        ending: Signal,
        on_delivery: OnDelivery,
        new_id: Callable[[], str] = random_id,
        shards: Shards | None = None,
    ) -> None:
        """`settings` is given the settings that the log ends with (None: a fresh log) and gives those to go on with; it
        may raise UserError. `get`: make an encoder of this type. The broker calls `on_delivery` with each delivery;
        whoever drives this then passes it to `hear`. `shards`: the aggregators of the journal's arithmetic."""
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
        self._shards = shards
        self._publisher = Publisher(
            broker,
            topology,
            config.encoding,
            clock=clock,
            ending=ending,
            new_id=new_id,
            receives=shards.receives if shards is not None else None,
        )
        self.recorder = Recorder(config, journal, self._publisher, broker, self.live, clock)
        self._updates = Updates(
            broker,
            topology,
            patience=config.chunk_timeout_seconds,
            current=self._incarnation,
            clock=clock,
            on_delivery=on_delivery,
            discard=self._discard_parts if shards is not None else None,
        )
        self._rates = Rates(config.messages_per_second, _BURST * config.messages_per_second)
        self._pace = Pace(self._rates, topology, clock)
        self._held: deque[Delivery] = deque()
        self._blocked_at: float | None = None
        self._pulse_at = self._snapshot_again_at = 0.0
        #: When, and at which row of the log, updates that could not be dealt with were looked at last.
        self._released = 0.0, -1

    # --- what drives it ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Declare what is its own, fold what the log holds after the snapshot, repeat what may not have left, and tell
        everybody. Raises Damaged if the state directory cannot be recovered from, UserError for settings."""
        self._broker.declare(self._topology.master())
        if self._shards is not None:
            self._shards.start()
        self.recorder.recover(self._settings)
        if self._shards is not None:
            self._shards.patient = False
        self._publisher.begin(self.state.epoch)
        for known in self.state.nodes.values():
            if known.present:
                self._publisher.expect(known.node)
        if self._get is not None:
            self.recorder.record(Todo(Get(sender="master", encoder_type=self._get)))

    def hear(self, delivery: Delivery, *, more: bool = False) -> None:
        """Handle one delivery. While the disk is full it waits, unless it can be answered without the log. `more`:
        another follows at once, so that the rows of both may be made durable together."""
        begun = self._clock.monotonic()
        if delivery.queue == self._topology.master_shards:
            self._hear_shards(delivery)
        elif delivery.queue == self._topology.master_inbox and not self._pace.admits(delivery):
            self._hear_too_many(delivery)
        elif delivery.queue == self._topology.master_updates and self._updates.is_beyond_all(sender_of(delivery)):
            self._broker.ack(delivery)  # it has broken its rule by far; what it owes it sends again
        else:
            self._hear_admitted(delivery)
        self._take_turns()
        if not more:
            self.recorder.settle()
        self._updates.pardon(self._clock.monotonic() - begun)

    def look(self) -> float:
        """Do what time has made due; gives the seconds until this is wanted again."""
        if self.recorder.blocked and not self._go_on():
            return ROOM_SECONDS
        begun = self._clock.monotonic()
        for delivery in self._pace.ready():
            self._hear_admitted(delivery)
        now = self._clock.now()
        deadline = self._coordinator.deadline()
        if deadline is not None and now >= deadline:
            self.recorder.record(Todo(Tick()), more=True)
        for node, present in self.live.transitions(now, self.config.presence_timeout_seconds):
            self.recorder.record(Todo(Presence(node=node, present=present)), more=True)
        self._end_in_vain()
        self.recorder.record_made()
        if self._clock.monotonic() >= self._pulse_at:
            self._pulse_at = self._clock.monotonic() + PULSE_SECONDS
            self._publisher.pulse(self.state.epoch)
        self._snapshot_in_time()
        if self._publisher.bury_in() <= 0:
            self._publisher.bury()
        self._updates.look()
        self._release()
        more = self._take_turns()
        self.recorder.settle()
        self._updates.pardon(self._clock.monotonic() - begun)
        soon = min(self._updates.seconds_left(), self._publisher.bury_in()) + 0.001
        return 0.0 if more else min(IDLE_SECONDS, soon)

    @property
    def outbox(self) -> Outbox:
        """What is to leave: another thread may send it."""
        return self._publisher.outbox

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

    def waiting(self) -> dict[str, int]:
        """How much waits in here: updates for their turn, what was decided to leave, and while the disk is full what
        has come for room."""
        return {"updates": self._updates.waiting, "outbox": self.outbox.waiting, "held": len(self._held)}

    def _snapshot_in_time(self) -> None:
        """One that is due waits for what is to leave, and is not waited for where that takes long."""
        if self._clock.monotonic() < self._snapshot_again_at:
            return
        if self.journal.snapshot_due(self.config.snapshot_every_seconds) and self.recorder.settle():
            if self.outbox.drain(_DRAIN_SECONDS):
                self.snapshot()
            else:
                self._snapshot_again_at = self._clock.monotonic() + _DRAIN_AGAIN_SECONDS

    def snapshot(self) -> None:
        """Begin to write one now, once all that it stands for has left, and the one before is written. Not after an
        error. Raises StorageBlocked while something waits to be written."""
        if self.recorder.blocked or not self.recorder.settle():
            raise self.recorder.blocked_by(self.recorder.blocked)
        self._publisher.outbox.drain()
        self.journal.carried_out = max(self.journal.carried_out, self.outbox.left)
        self.journal.wait_for_snapshot()
        self.journal.snapshot()

    def close(self) -> None:
        """Give back what was fetched and not recorded."""
        self._updates.close()

    def _go_on(self) -> bool:
        """The disk was full: go on if there is room again, with what has come meanwhile."""
        now = self._clock.monotonic()
        if self._blocked_at is not None:
            self._updates.pardon(now - self._blocked_at)
        self._blocked_at = now
        if not self.recorder.writes_again():
            return False
        self._blocked_at = None
        while self._held and not self.recorder.blocked:
            self._hear_admitted(self._held.popleft())
        return not self.recorder.blocked

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _hear_admitted(self, delivery: Delivery) -> None:
        if self.recorder.blocked:
            if not self._is_answered(delivery):
                self._held.append(delivery)
        elif self._updates.is_chunk(delivery):
            self._hear_chunk(delivery)
        elif delivery.queue in (self._topology.master_inbox, self._topology.master_updates):
            self._hear_message(delivery)
        # else a chunk of an intake that has ended: it went back to its queue when that closed

    def _hear_too_many(self, delivery: Delivery) -> None:
        """What one sender sends beyond its rate costs next to nothing, and takes nobody's place."""
        if (sender := self._pace.payer(delivery)) in self.state.nodes:
            self.live.seen(sender, self._clock.now())
        if (dropped := self._pace.too_many(delivery)) is not None:
            self._broker.ack(dropped)

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
        if node is not None and (node in self.state.nodes or isinstance(message, Join)):
            self.live.seen(node, self._clock.now())
        if isinstance(message, Join) and message.node in self.state.nodes:
            self._publisher.expect(message.node)
        if isinstance(message, UpdateManifest):
            self._updates.announced(message, delivery)
        elif self._answer(message, delivery) or self._are_idle_words(message) or self._is_refused(message):
            self.recorder.acknowledge((delivery,))
        else:
            # below the sender's name: nobody can take the id of another's message, or of an update
            message_id = f"{delivery.routing_key}:{delivery.message_id}" if delivery.message_id else None
            self.recorder.record(Todo(message, message_id, work=what, deliveries=(delivery,)), more=True)  # type: ignore[arg-type]

    def _answer(self, message: Message, delivery: Delivery) -> bool:
        """What is shown and not decided upon needs no log, and goes on while the disk is full; nor does what is not for
        its sender to ask."""
        if isinstance(message, Get | Continue | Stop | Operation):
            if not (why := refusal(message, delivery, self._topology, self.config)):
                return False
            log.warning("request refused", sender=message.sender, kind=getattr(message, "kind", ""), why=why)
            self._publisher.send(message.sender, Answer(accepted=False, detail=why))
        elif isinstance(message, Alive):
            if message.node in self.state.nodes:
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

    def _is_refused(self, message: Message) -> bool:
        """A request for an encoder that would cost too much, or is of no type that there is, is answered and gets no
        row; so is what an operator cannot do. Not while the disk is full: what waits for room may decide whether it
        does."""
        if isinstance(message, Operation):
            if why := operating.refused(self.state, message):
                self._publisher.send(message.sender, Answer(accepted=False, status="refused", detail=why))
            return bool(why)
        if not isinstance(message, Get | Continue):
            return False
        why = refused(self.state, message, types=encoder_type_names(), most=self.config.max_encoders)
        if why:
            answer = Answer(accepted=False, status="refused", detail=why)
            self._publisher.send(message.sender, answer)
        return bool(why)

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

    def _take_turns(self) -> bool:
        """Begin to fetch what there is room for, and answer at once what does not count, node by node in turn. False
        once nothing more can be done now; True if the time for it is over before."""
        until = self._clock.monotonic() + _TURN_SECONDS
        while not self.recorder.blocked and (manifest := self._updates.turn()) is not None:
            # one that kills the master is not fetched any more, and is refused for want of its payload
            deadly = self.journal.attempts.fatal(_work(manifest))
            if deadly or not self._coordinator.wants_payload(manifest):
                if self._rates.allows(manifest.node, self._clock.monotonic()):
                    self._refuse(manifest)
                else:
                    self._updates.hold()
            elif not self._coordinator.has_place(manifest):
                self._updates.hold()
            elif not (self._has_room(manifest) and self._fetch(manifest)):
                return False
            if self._clock.monotonic() > until:
                return True
        return False

    def _has_room(self, manifest: UpdateManifest) -> bool:
        """Whether an update can be fetched now; one that carries its payload is here already."""
        is_here = manifest.data is not None and self._shards is None
        return is_here or self._updates.has_room(manifest.size, self._intake_bytes())

    def _fetch(self, manifest: UpdateManifest) -> bool:
        """Begin to fetch the update whose turn it is, or take it if it is here, if there is room on the disk."""
        if self._shards is not None:
            self._updates.fetch_parts(self._shards, self._keep_digests)
            return True
        size = self.state.encoders[manifest.encoder].size
        try:
            arrived = Arrived(
                self.journal.receive_payload(manifest.size),
                self._arithmetic.measurement(size, manifest.encoding),
                keep=self.journal.keep_payload,
                marked=partial(self.journal.attempts.at, _work(manifest)),
            )
        except StorageBlocked as error:
            self.recorder.wait(error, lambda: self.journal.receive_payload(manifest.size).discard())
            return False
        if manifest.data is None:
            self._updates.fetch(arrived)
        else:
            self._take(self._updates.carried(arrived))
        return True

    # --- updates whose parts lie with aggregators --------------------------------------------------------------------

    def _keep_digests(self, digests: bytes) -> str:
        """What the log has of such an update. Raises StorageBlocked."""
        incoming = self.journal.receive_payload(len(digests))
        incoming.add(digests)
        return self.journal.keep_payload(incoming)

    def _discard_parts(self, manifest: UpdateManifest) -> None:
        incarnation = self._incarnation(manifest.node) or manifest.incarnation
        assert self._shards is not None, "else nobody has parts"
        logged = self.journal.log.uses(manifest.digest) > 0
        self._shards.tell(orders.Discard, manifest=manifest.bare(), incarnation=incarnation, logged=logged)

    def _hear_shards(self, delivery: Delivery) -> None:
        """How far an aggregator is with an update; or it is here again, and may have lost what it was told to take."""
        assert self._shards is not None, "nobody else hears this queue"
        said = self._shards.told(delivery)
        if isinstance(said, orders.Hello):
            self._updates.greeted(said.shard)
        elif isinstance(said, orders.Arriving):
            if (update := self._updates.reported(said)) is not None:
                self._take(update)
            self._end_in_vain()
        self._broker.ack(delivery)

    # --- what becomes of them ----------------------------------------------------------------------------------------

    def _incarnation(self, node: str) -> str | None:
        """As it has joined."""
        known = self.state.nodes.get(node)
        return known.incarnation if known is not None else None

    def _release(self) -> None:
        """Updates that could not be dealt with have another turn."""
        at, offset = self._released
        now, last = self._clock.monotonic(), self.journal.log.last_offset
        if last != offset or now >= at + _HELD_SECONDS:
            self._released = now, last
            self._updates.release()
            for node in self._updates.idle():
                self._ask_for_later(node)

    def _intake_bytes(self) -> int:
        """What may be fetched at the same time: two updates of the largest encoder that is being trained."""
        if self.config.intake_bytes is not None:
            return self.config.intake_bytes
        sizes = [encoder.size for encoder in self.state.encoders.values() if encoder.status == "running"]
        encoding = self.state.settings.update_rule.encoding
        return max(_INTAKE_BYTES, 2 * payload_size(max(sizes, default=0), encoding))

    def _refuse(self, manifest: UpdateManifest) -> None:
        """The row of an update that does not count leads to its answer; nobody waits for its chunks."""
        delivery = self._updates.answered()
        row = manifest.model_copy(update={"data": None})
        todo = Todo(row, _delivery_id(manifest), work=_work(manifest), deliveries=(delivery,))
        self.recorder.record(todo, more=True)
        self._ask_for_later(manifest.node)

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
        """Chunks that do not come are sent again."""
        while (intake := self._updates.in_vain()) is not None:
            then = "later ones" if intake.overtaken else "none for a while"
            why = f"{intake.progress}, and then {then}"
            self._ask_again(intake.manifest, intake.announcement, why, beyond=intake.overtaken)

    def _take(self, update: CompleteUpdate) -> None:
        """All of it is here: make the update durable, then decide on it, then remove it from the broker."""
        manifest = update.manifest
        if self._coordinator.wants_payload(manifest) and self._is_spent(_delivery_id(manifest)):
            update.arrived.discard()
            self._ask_again(manifest, update.deliveries[-1], "this attempt was looked at already")
            return
        self.recorder.record(
            Todo(
                manifest,
                _delivery_id(manifest),
                arrived=update.arrived,
                work=_work(manifest),
                deliveries=update.deliveries,
                acked=self._updates.taken(manifest.node),
            ),
            more=True,
        )
        self._ask_for_later(manifest.node)

    def _ask_again(self, manifest: UpdateManifest, announcement: Delivery, why: str, *, beyond: int = 0) -> None:
        """The node sends the update again as another attempt."""
        log.warning("asking a node to send its update again", node=manifest.node, update=manifest.update_id, why=why)
        self._publisher.send(manifest.node, resend(manifest.encoder, manifest, why, beyond=beyond))
        self._broker.ack(announcement)
        self._done(manifest.node)

    def _done(self, node: str) -> None:
        self._updates.done(node)
        self._ask_for_later(node)

    def _ask_for_later(self, node: str) -> None:
        """A node that had announced too many at once is asked for one more, now that there is a place. What of it was
        dropped unread has no name: after the last of the others it is asked to join, which brings all that it owes."""
        if (manifest := self._updates.later(node)) is not None:
            self._publisher.send(node, resend(manifest.encoder, manifest, "too many updates at once"))
        elif self._updates.owes_more(node):
            self._publisher.send(node, Introduce(node=node))

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
