"""The product's invariant, in its only home: what is to be decided is appended to the log, marked, folded and computed;
once its row is durable what follows from it leaves, and what it came in is acked. A process that dies anywhere in
between goes on from the log.

Rows that come together are made durable together. Until then they have changed nothing but this process's memory: what
follows from them is held, so a process that dies loses memory and rows alike, and the broker delivers them again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import structlog

from common.clock import Clock
from common.crash_points import reached
from common.errors import Damaged, ShardsAway, StorageBlocked, StorageFull, UserError
from common.events import happened
from common.wire.broker import Broker, Delivery
from common.wire.to_master import UpdateManifest
from master_service.arithmetic.arithmetic import Outcome, PayloadsLost
from master_service.config import MasterConfig
from master_service.counts import Counts
from master_service.decisions.changes import Logged, changed, still_live
from master_service.decisions.effects import (
    Broadcast,
    Conclude,
    DeleteStream,
    Effect,
    Generate,
    Provide,
    Publish,
    Refused,
    Send,
    SetAside,
    Step,
)
from master_service.decisions.limits import KEPT_FAILED
from master_service.decisions.records import (
    Configured,
    Entry,
    Generated,
    Loggable,
    Record,
    Skipped,
    Started,
    StepFailed,
    UpdateFacts,
    Versioned,
)
from master_service.decisions.settings import Settings, carried_over
from master_service.decisions.state import State
from master_service.history.state_directory import Journal
from master_service.making import Making
from master_service.narration import events
from master_service.status import Live
from master_service.wire.arriving import Arriving
from master_service.wire.publisher import Publisher

log = structlog.get_logger()

#: How often to check whether there is room on the disk again, seconds.
ROOM_SECONDS = 0.5


@dataclass(frozen=True)
class Todo:
    """An entry to be logged and carried out. `work`: the name under which it is marked, in case it kills the master.
    `payload` is stored first, or what of an update has `arrived` is kept; `deliveries` are acked last, and then `acked`
    is called."""

    body: Loggable
    message_id: str | None = None
    payload: bytes | None = None
    arrived: Arriving | None = None
    work: str = ""
    deliveries: tuple[Delivery, ...] = ()
    acked: Callable[[], None] | None = None


@dataclass(frozen=True)
class _Held:
    """What follows from an entry, until its row is durable. `entry` None: it was in the log already. `known`: it is an
    update that had come before."""

    todo: Todo
    entry: Entry | None
    effects: list[Effect]
    known: bool = False


#: What is done with an encoder as it is now: before another row changes it.
_OF_NOW = (Publish, Provide, DeleteStream, Conclude)


class Recorder:
    """Records, and carries out. While nothing can be written, such as with a full disk, what is to be recorded waits
    here, and `blocked` says why.

    After an error nothing more may be asked of it: what is in memory may be half of an entry, and the log is the truth.
    """

    def __init__(
        self, config: MasterConfig, journal: Journal, publisher: Publisher, broker: Broker, live: Live, clock: Clock
    ) -> None:
        self.blocked = ""
        self.blocked_by: type[StorageBlocked] = StorageBlocked
        self.live = live
        self.counts = Counts()
        self.journal = journal
        self._config = config
        self._fold = journal.fold
        self._coordinator = journal.fold.coordinator
        self._publisher = publisher
        self._broker = broker
        self._clock = clock
        self._making = Making(self._fold.arithmetic.generated, journal.making, journal.background)
        self._todo: deque[Todo] = deque()
        #: What could not be written and does not wait in `_todo`.
        self._missing: Callable[[], None] | None = None
        self._held: list[_Held] = []
        #: The encoders of which a version is to be computed elsewhere, before anything else is recorded.
        self._elsewhere: deque[str] = deque()
        self._try_again_at = 0.0

    @property
    def state(self) -> State:
        """What the log has led to."""
        return self._coordinator.state

    # --- recovery ----------------------------------------------------------------------------------------------------

    def recover(self, chosen: Callable[[Logged | None], Settings]) -> None:
        """Fold what the log holds after the snapshot, repeat what may not have left, and tell everybody.

        `chosen` is given the settings that the log ends with (None: a fresh log) and gives those to go on with, above
        which stays what operators have changed; it may
        raise UserError. Raises Damaged if the state directory cannot be recovered from.
        """
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
                f"{error}, in {self._config.state_dir / 'payloads'}: a version that was published was made of it; "
                "restore it from a backup of the state directory"
            ) from None
        state = self.state
        # before anything is written: a start that is refused leaves the log as it is
        logged = Logged(carried_over(state.configured or state.settings, state.claims), state.live)
        configured = chosen(logged if state.epoch else None)
        live = still_live(logged, configured)
        if live:
            log.info("what operators have changed while it ran holds", settings=live)
        settings = changed(configured, live)
        journal.carried_out = fold.offset
        # who waits for aggregators is not killed by what it waits for
        with contextlib.nullcontext() if fold.arithmetic.elsewhere else journal.attempts.at(_row(fold.offset)):
            outcomes = [Outcome(fold.compute(encoder)) for encoder in fold.pending]
        for effect in self._coordinator.unmade():
            self._making.begin(effect)
        for outcome in outcomes:
            self.record(Todo(outcome.body, payload=outcome.payload))
        self.record_made()
        # before the epoch: a first start that dies in between is a first start again
        row = Configured(settings=settings, claims="compared", kept_failed=KEPT_FAILED)
        if live:
            row = row.model_copy(update={"configured": configured, "live": live})
        held = (state.settings, state.claims, state.kept_failed, state.configured, state.live)
        if held != (row.settings, row.claims, row.kept_failed, row.configured, row.live):
            self.record(Todo(row))
        # later than every epoch before, also when rows of the log were lost
        epoch = max(state.epoch + 1, int(self._clock.now()))
        self.record(Todo(Started(epoch=epoch, fingerprint=fold.arithmetic.fingerprint())))
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
                f"{self._config.state_dir} is damaged, or another torch or processor computed it; see `log verify`"
            )
        return effects

    # --- what is decided ---------------------------------------------------------------------------------------------

    def record(self, todo: Todo, *, more: bool = False) -> None:
        """Log something and carry out what follows; after what waits already. `more`: `settle` follows soon, and until
        then nothing of it need be durable."""
        self._todo.append(todo)
        if not self.blocked and self._drain() and not more:
            self.settle()

    def settle(self) -> bool:
        """Make durable what was recorded, let what follows from it leave, and ack what it came in; whether it could."""
        return not self.blocked and self._settle()

    def _settle(self) -> bool:
        if self._held:
            try:
                self.journal.commit()
            except StorageBlocked as error:
                self._wait(error)
                return False
            self._release()
        return True

    def record_made(self) -> None:
        """Log what has come of encoders that were made beside this thread."""
        for outcome in self._making.made():
            self.record(Todo(outcome.body, payload=outcome.payload))

    def _drain(self) -> bool:
        """Append, mark, fold, compute: one entry after the other, each with what it leads to; whether all of it could
        be written.

        Where it cannot be, it stops before the entry, and goes on from there later.
        """
        journal = self.journal
        while self._elsewhere or self._todo:
            if self._elsewhere:
                if not self._compute_elsewhere():
                    return False
                continue
            todo = self._todo[0]
            # without a name of its own for it, only its row says what has killed the master
            alone = not todo.work and not isinstance(todo.body, Record)
            # who lasts longer than this process begins with a version 0 that does too
            alone = alone or (isinstance(todo.body, Generated) and self._fold.arithmetic.elsewhere)
            journal.carried_out = max(journal.carried_out, self._publisher.outbox.left)
            try:
                payload, facts = self._store(todo)
                entry = journal.append(
                    todo.body, message_id=todo.message_id, facts=facts, payload=payload, together=not alone
                )
                if entry is None and isinstance(todo.body, UpdateManifest):
                    # the log has it, its answer may not have left: recorded as one more delivery of the same update
                    entry = journal.append(todo.body, together=True)
            except StorageBlocked as error:
                self._wait(error)
                return False
            self._todo.popleft()
            known = isinstance(todo.body, UpdateManifest) and self._coordinator.knows(todo.body)
            effects = self._fold_in(entry, todo.work) if entry is not None else []
            self._held.append(_Held(todo, entry, effects, known))
            if any(isinstance(effect, _OF_NOW) for effect in effects) and not self._settle():
                return False
        return True

    def _compute_elsewhere(self) -> bool:
        """Have a version computed by who lasts longer than this process: of rows that do too. Whether it could be."""
        try:
            self.journal.commit()
            outcome = Outcome(self._fold.compute(self._elsewhere[0]))
        except StorageBlocked as error:
            self._wait(error)
            return False
        self._elsewhere.popleft()
        self._note_lost(outcome)
        self._todo.appendleft(Todo(outcome.body))
        return True

    def _store(self, todo: Todo) -> tuple[str | None, UpdateFacts | None]:
        """Make a payload durable; its digest, and the facts of an update. Raises StorageBlocked."""
        if todo.arrived is not None:
            facts = todo.arrived.kept()
            return facts.digest, facts
        return None if todo.payload is None else self.journal.write_payload(todo.payload), None

    def _fold_in(self, entry: Entry, work: str) -> list[Effect]:
        """What an entry leads to. What is computed because of it is the next entry."""
        journal, fold = self.journal, self._fold
        # the number of a row that is not durable may be another's after a death
        row = () if journal.log.uncommitted else (_row(entry.offset),)
        with journal.attempts.at(*row, *((work,) if work else ())):
            effects = fold.apply(entry)
            reached("during fold")
            outcomes: list[Outcome] = []
            for effect in effects:
                if isinstance(effect, Step) and fold.arithmetic.elsewhere:
                    self._elsewhere.append(effect.encoder)
                elif isinstance(effect, Step):
                    outcomes.append(Outcome(fold.compute(effect.encoder)))
                elif isinstance(effect, Generate):
                    self._making.begin(effect)
            outcomes += self._making.made()
        for outcome in outcomes:
            self._note_lost(outcome)
        self._todo.extendleft(Todo(outcome.body, payload=outcome.payload) for outcome in reversed(outcomes))
        return effects

    def _note_lost(self, outcome: Outcome) -> None:
        if isinstance(outcome.body, StepFailed):
            log.error("payloads are damaged; their nodes are asked to send again", lost=outcome.body.lost)

    def _release(self) -> None:
        """All rows are durable: what follows from them leaves, then what they came in is acked."""
        held, self._held = self._held, []
        for each in held:
            self._send_out(each.effects)
            if each.entry is not None:
                self._publisher.outbox.mark(each.entry.offset)
                self.counts.note(each.entry, each.effects, self.state.encoders, known=each.known)
                for what, facts in events(each.entry, each.effects):
                    happened(what, **facts)
        for update in (True, False):
            bodies = [each.todo for each in held if isinstance(each.todo.body, UpdateManifest) == update]
            if deliveries := tuple(delivery for todo in bodies for delivery in todo.deliveries):
                self.acknowledge(deliveries, update=update)
            for todo in bodies:
                if todo.acked is not None:
                    todo.acked()

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
                case Provide():
                    encoder = self.state.encoders[effect.encoder]
                    self._publisher.provide(effect.encoder, encoder.assets, self.journal.log.payloads)
                case DeleteStream():
                    self._publisher.delete_stream(effect.encoder, assets=effect.assets)
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
            encoded = self._fold.arithmetic.encoded(effect.encoder, self._config.encoding)
            self._publisher.version(effect, state.epoch, state.encoders[effect.encoder].layout_digest, encoded)

    def _export(self, effect: Conclude) -> None:
        encoder = self.state.encoders[effect.encoder]
        directory = self._config.export_dir or self._config.state_dir / "encoders" / effect.encoder
        reached("before export")
        try:
            self._fold.arithmetic.export(directory, encoder, self.state.settings)
        except (OSError, UserError) as error:  # UserError: an encoder type of another package that cannot do it
            again = f"shared-encoder export {effect.encoder} --state {self._config.state_dir}"
            log.error("the finished encoder could not be exported", problem=str(error), later=again)
            return
        log.info("encoder finished", encoder=effect.encoder, version=effect.version, directory=str(directory))

    def acknowledge(self, deliveries: tuple[Delivery, ...], *, update: bool = False) -> None:
        if update:
            reached("before ack of an update")
            self._broker.ack(*deliveries)
            reached("after ack of an update")
        else:
            reached("before ack")
            self._broker.ack(*deliveries)
            reached("after ack")

    # --- a full disk, a ledger that another process holds ------------------------------------------------------------

    def wait(self, error: StorageBlocked, missing: Callable[[], None]) -> None:
        """Something could not be written: nothing is decided until `missing` can be done without a StorageBlocked."""
        self._missing = missing
        self._wait(error)

    def _wait(self, error: StorageBlocked) -> None:
        if not self.blocked:
            log.error(f"{_what(error)}: accepting nothing meanwhile", problem=str(error))
        self.blocked, self.blocked_by = str(error), type(error)
        self._try_again_at = self._clock.monotonic() + ROOM_SECONDS

    def writes_again(self) -> bool:
        """Try again to write what waits; whether all of it is written."""
        if self._clock.monotonic() < self._try_again_at:
            return False
        try:
            if self._missing is not None:
                self._missing()
        except StorageBlocked as error:
            self._wait(error)
            return False
        self._missing = None
        if not (self._drain() and self._settle()):
            return False
        self.blocked = ""
        log.info("going on")
        return True


def _what(error: StorageBlocked) -> str:
    if isinstance(error, ShardsAway):
        return "an aggregator does not answer"
    return "the disk is full" if isinstance(error, StorageFull) else "the message log is held"


def _row(offset: int) -> str:
    return f"row {offset}"
