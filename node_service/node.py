"""One node, stepped by hand: messages in, training between them, updates out. It knows no thread and never sleeps.

`service` drives it with threads and a real clock, `deploy.simulate` and the fault tests by hand under a virtual one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import assert_never

import structlog

from common.clock import Clock
from common.crash_points import reached
from common.errors import Poison, UserError
from common.events import BrokerWatch, happened
from common.wire.accounts import Door
from common.wire.base import Message, update_id
from common.wire.broker import Broker, Delivery
from common.wire.codec import received
from common.wire.numbering import Hearing
from common.wire.to_master import Get, Join
from common.wire.to_node import Answer, Instruction, Pulse, Receipt, Rule
from common.wire.topology import Topology
from common.workers import AtOnce, Beside
from node_service.agent import (
    Action,
    Agent,
    Answered,
    CheckSamples,
    Contribute,
    Drop,
    Gather,
    Look,
    Read,
    Reincarnate,
    Republish,
    Resume,
    Say,
    TakenOut,
    Train,
    Unmade,
)
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.ending import Ending
from node_service.figures import Lost, NodeFigures
from node_service.handover.asset_cache import shown
from node_service.handover.contributing import Contributions, answer, nothing
from node_service.handover.handover import Handover
from node_service.handover.local_state import LocalState
from node_service.handover.outbox import Outbox
from node_service.handover.reading import AssetRead, Reading, VersionRead
from node_service.time_spent import TimeSpent
from node_service.training.training import Training, update_manifest
from node_service.trials import Build, Trials

log = structlog.get_logger()

#: The longest time between two turns of a node that has nothing to do, seconds; what comes in wakes it earlier.
IDLE_SECONDS = 0.2

#: The most of a node's time that goes into checkpoints.
_SAVING_SHARE = 0.02

#: How many answers beyond `max_unanswered` the master keeps at least.
_SPARE_ANSWERS = 8


class Node:
    """`start`, then `hear`, `was_read` and `work` as things come and time passes, and `goodbye` at a clean end.

    After an error nothing more may be asked of it: what is on disk is whole, and what is in memory may be half done.
    `outbox` and `reading` are to be flushed and read by whoever drives it.
    """

    def __init__(
        self,
        name: str,
        config: NodeConfig,
        corpora: Mapping[str, Corpus],
        broker: Broker,
        topology: Topology,
        state: LocalState,
        build: Build,
        outbox: Outbox,
        *,
        clock: Clock,
        beside: Beside | None = None,
    ) -> None:
        """`beside`: by what the trainings that `build` makes get their checkpoints onto the disk."""
        self.name = name
        self.config = config
        self.figures = NodeFigures()
        self.outbox = outbox
        self._door = Door(topology, node=name)
        self.reading = Reading(broker, topology, clock, self._door)
        self._corpora = corpora
        self._contributions = Contributions(corpora, config.private)
        self._broker = broker
        self._topology = topology
        self.state = state
        self._trials = Trials(name, state, build)
        self._clock = clock
        self._handover = Handover(state, outbox, clock)
        self._ending = Ending(name, state, self.figures, config.export_dir)
        self._agent = self._new_agent()
        self.training: Training | None = None
        self._wait_until_version = -1
        #: When it last heard of anything to do, and when of the master at all.
        self._heard_at = self._master_at = clock.monotonic()
        self._alive_at = self._saved_at = clock.monotonic()
        self._beside: Beside = beside or AtOnce()
        #: Seconds that training has stood still for the newest checkpoint.
        self._saving_took = 0.0
        self._spent = TimeSpent(name, self.figures, clock)
        #: A throttled node takes no step before, whatever wakes it.
        self._next_step_at = clock.monotonic()
        self._hearing = Hearing(self._agent.types)
        #: When the owner's hours let it train again; empty while they do.
        self._paused_until = ""
        self._connection = BrokerWatch(clock, node=name)

    # --- what drives it ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Declare what is its own, introduce itself, send what it owes, and go on with what it trained last."""
        self._broker.declare(self._topology.node(self.name, self._agent.types))
        self.figures.note = "waiting for an instruction"
        self._let_go_of_what_is_not_accepted()
        self._paused_until = self.figures.paused_until = self.config.accept.rests_until(self._clock.now())
        if not self._paused_until:
            self._perform(self._agent.join())
        self._handover.send_owed()
        self._resume()
        if self.config.get is not None:
            self._say(Get(sender=self.name, encoder_type=self.config.get))

    def hear(self, delivery: Delivery) -> None:
        """Handle one message from the master, and ack it."""
        if not self._door.takes(delivery):
            self._broker.ack(delivery)
            return
        self._master_at = self._clock.monotonic()
        self._hearing.hear(delivery)
        try:
            message = received(delivery)
        except Poison as poison:
            log.warning("message set aside", node=self.name, reason=poison.reason, detail=poison.detail)
            self._broker.dead_letter(delivery, poison.reason, poison.detail)
            return
        if isinstance(message, Pulse):
            self._broker.ack(delivery)
            return
        self._heard_at = self._master_at
        if isinstance(message, Answer) and not message.accepted:
            log.error("the master cannot make this encoder", problem=message.detail)
        mistaken = isinstance(message, Receipt) and self._handover.mistaken(message)
        if isinstance(message, Rule) and (why := self._trials.refused(message)):
            self._refuse_rule(message, why)
        else:
            self._perform(self._agent.mistaken() if mistaken else self._agent.receive(message))
        reached("node before ack")
        self._broker.ack(delivery)
        reached("node after ack")

    def was_read(self, read: VersionRead | AssetRead) -> None:
        """Handle what `reading` gave."""
        if isinstance(read, AssetRead):
            self._asset_read(read)
        else:
            self.version_read(read)

    def version_read(self, read: VersionRead) -> None:
        """Handle a version, or that it could not be read."""
        training = self.training
        self._heard_at = self._clock.monotonic()
        if read.version is None:
            log.warning("a version could not be read, asking for it", node=self.name, problem=read.problem)
            self._perform(self._agent.read_failed(read.encoder, read.wanted))
            return
        if training is None or training.instruction.encoder != read.encoder:
            return
        number = read.version.version
        if self._agent.finishes(read.encoder, number, exact=read.exact):
            self._finish(training, read)
        elif self._agent.adopts(read.encoder, number, exact=read.exact):
            with self._aside(training, "adoption"):
                training.adopt(read.version)
            self._measured(training)
            happened("version adopted", node=self.name, encoder=read.encoder, version=number)
        else:
            return
        self._perform(self._agent.version_read(read.encoder, number))

    def work(self) -> float:
        """Do what is to be done now: one training step at most. Gives the seconds until this is wanted again."""
        now = self._clock.monotonic()
        if self._handover.numbers_used_up:
            self._reincarnate("there are no numbers left for what it sends")
        training = self.training
        self._keep_to_the_hours()
        ready = self.ready
        self.figures.turned_away = self._door.turned_away
        waits = training is not None and not (ready and (not training.must_return or self._may_hand_in(training)))
        rests = self._paused_until or self._agent.paused
        waits_for = training if self._agent.rule is not None and not rests else None
        self._spent.look(waits_for, ready=ready, waits=waits)
        self._connection.look(self._broker.status())
        if training is not None and ready and now >= self._next_step_at:
            self._next_step_at = now + self._train(training)
            self._spent.until(self._next_step_at)
        self._keep_in_touch(now, ready)
        if training is not None and now - self._saved_at >= self._save_every and not self._beside.busy:
            self._saved_at = now
            self._save(training)
        if training is None or not ready:
            return IDLE_SECONDS
        return max(0.0, self._next_step_at - self._clock.monotonic())

    def goodbye(self) -> None:
        """A clean end: hand in what was trained, save, leave. What cannot be sent is sent at the next start."""
        training = self.training
        if training is not None and self._agent.training and training.since.steps > 0:
            self._hand_in(training, wants_version=False)
        if training is not None:
            self._save(training)
            self._beside.wait()
        self._perform(self._agent.leave())
        happened("left", node=self.name, encoder=self.encoder)

    @property
    def finished(self) -> bool:
        """Whether it has exported the whole model of an encoder, its finishing phase included."""
        return self._ending.finished

    @property
    def encoder(self) -> str | None:
        """The encoder that this node trains, is being let in to train, or finishes by itself."""
        if self._agent.current is not None:
            return self._agent.current.encoder
        training = self.training
        return training.instruction.encoder if training is not None and training.finishing is not None else None

    @property
    def ready(self) -> bool:
        """Whether `work` would take a step now."""
        return self.training is not None and self._may_train(self.training, self._clock.monotonic())

    # --- training and returning --------------------------------------------------------------------------------------

    def _may_train(self, training: Training, now: float) -> bool:
        """Whether a step is to be taken. While the master is away training goes on beyond what it may hand in: all of
        it becomes one update, once that one may go."""
        if self._paused_until:
            return False
        if training.finishing is not None:
            return True
        if not self._agent.training or self._agent.paused or training.version < 0:
            return False
        rule = training.rule
        if rule.wait and training.version <= self._wait_until_version:
            return False
        if not training.must_return or self._may_hand_in(training):
            return True
        away, most = now - self._master_at > self.config.away_after_seconds, rule.away_steps
        return away and (most is None or training.since.steps < most)

    def _may_hand_in(self, training: Training) -> bool:
        """Whether one more update may go unanswered. The master keeps only the newest answers, so an update whose
        answer was lost must not fall too far behind."""
        owed, most = self.state.owed, training.rule.max_unanswered
        behind = self.state.identity.next_sequence - min(owed, default=self.state.identity.next_sequence)
        return len(owed) < most and behind < most + _SPARE_ANSWERS

    def _train(self, training: Training) -> float:
        """Hand in if an update is due, and take a step; the seconds from its beginning to that of the next."""
        if training.finishing is None and training.must_return and self._may_hand_in(training):
            self._hand_in(training, wants_version=True)
            if training.rule.wait:
                return 0.0
        before = self._clock.monotonic()
        with self._spent.on("steps"), self._trials.step(training):
            took = training.step()
        self.figures.step_seconds += took
        took += self._clock.monotonic() - before
        self.figures.trained(training.steps, training.since.loss_mean, took)
        if training.finishing is not None:
            self._ending.stepped(training, training.finishing)
        most = self.config.max_steps_per_second
        return took if most is None else max(took, 1.0 / most)

    def _about(self, training: Training) -> dict[str, object]:
        """What an event of a training is about."""
        return {"node": self.name, "encoder": training.instruction.encoder, "version": training.version}

    @contextmanager
    def _aside(self, training: Training, what: Lost) -> Iterator[None]:
        """Inside, something is done with what is trained, and no step runs. A GPU works on what was given it after
        the call has returned: waited for at both ends, its time is counted where it belongs."""
        with self._spent.on("steps"):
            training.settle()
        with self._spent.on(what):
            yield
            training.settle()

    def _hand_in(self, training: Training, *, wants_version: bool) -> None:
        with self._aside(training, "hand_in"):
            sequence = self.state.next_sequence()
            incarnation = self.state.identity.incarnation
            since, bodies = training.hand_in(sequence)
            manifest = update_manifest(
                training, since, bodies, self.name, incarnation, sequence, wants_version=wants_version
            )
            self._handover.hand_over(manifest, bodies)
        self._wait_until_version = training.version
        self.figures.handed_in += 1
        happened(
            "update handed in",
            node=self.name,
            encoder=manifest.encoder,
            update=manifest.update_id,
            version=manifest.base_version,
            steps=manifest.steps,
            bytes=manifest.size,
            loss=manifest.loss,
        )

    def _save(self, training: Training) -> None:
        identity, begun = self.state.identity, self._clock.monotonic()
        with self._aside(training, "checkpoint"):
            training.save(identity.incarnation, identity.next_sequence)
        self._saving_took = self._clock.monotonic() - begun

    @property
    def _save_every(self) -> float:
        """Seconds from one checkpoint to the next: large models are saved less often, so that it costs little time."""
        return max(self.config.checkpoint_every_seconds, self._saving_took / _SAVING_SHARE)

    # --- what it says of itself --------------------------------------------------------------------------------------

    def _keep_in_touch(self, now: float, ready: bool) -> None:
        if self._paused_until:
            return  # it has left: nobody is to count on it
        # while nothing leaves, more of the same need not wait to leave
        if now - self._alive_at >= self.config.alive_every_seconds and not self.outbox.problem:
            self._alive(now)
            self._handover.send_unanswered(self.config.resend_after_seconds)
        if not self.outbox.problem and self._hearing.asks(now):
            happened("messages missed", node=self.name)
            self._perform(self._agent.missed())
        if now - self._heard_at >= self.config.ask_after_seconds:
            self._heard_at = now
            # one that finishes by itself asks like one that has nothing to do
            if not (ready and self._agent.training) and not self.outbox.problem:
                self._perform(self._agent.ask())
            self._perform(self._agent.look())

    def _alive(self, now: float) -> None:
        self._alive_at = now
        sent = self._broker.status().bytes_out
        self._say(self.figures.alive(self.name, self.state.identity.incarnation, self.encoder, sent))

    # --- what follows from what was said -----------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Say():
                    self._say(action.message)
                case CheckSamples():
                    self._check_samples(action.instruction)
                case Contribute():
                    self._contribute(action)
                case Gather():
                    self._gather(action.instruction)
                case Resume():
                    self._resume()
                case Train():
                    self._go_on(action.rule)
                case Read():
                    self.reading.read(
                        self._trained().instruction,
                        action.at_least,
                        action.published_at,
                        exact=action.exact,
                        digest=action.digest,
                        offset=action.offset,
                    )
                case Look():
                    self.reading.look(self._trained().instruction, action.at_least)
                case Drop():
                    self._drop(action.encoder)
                case Answered():
                    self._answered(action.receipt)
                case Republish():
                    self._republish(action)
                case Reincarnate():
                    self._reincarnate("the master knows other updates under this identity")
                case TakenOut():
                    self._taken_out(action.reason)
                case Unmade():
                    log.warning("the master could not make an encoder", encoder=action.encoder, reason=action.reason)
                    if self.training is None:
                        self.figures.note = f"waiting for another: {action.encoder} could not be made: {action.reason}"
                case _:
                    assert_never(action)
        self.figures.version = self.training.version if self.training is not None else -1

    def _taken_out(self, why: str) -> None:
        """It waits until it is let in again; the owner is told once."""
        note = f"taken out by the master's operator{f': {why}' if why else ''}; waiting to be let in again"
        if note != self.figures.note:
            log.warning(note, node=self.name)
        self.figures.note = note

    def _say(self, message: Message) -> None:
        if isinstance(message, Join):
            happened("joining", node=self.name, incarnation=message.incarnation, types=message.types)
        self.outbox.say(message)

    def _republish(self, wanted: Republish) -> None:
        if wanted.sequence is None:
            self._handover.send_owed()
            return
        again = self._handover.send_again(wanted.sequence, wanted.attempt, wanted.beyond)
        if again is not None:
            # a line that is too slow, or a broker that loses chunks: somebody has to look into it
            log.warning(
                "the master asks for an update again",
                node=self.name,
                encoder=again.encoder,
                update=again.update_id,
                version=again.base_version,
                attempt=again.attempt,
                detail=wanted.detail,
            )

    def _trained(self) -> Training:
        assert self.training is not None, "the agent reads versions only of an encoder whose training was built"
        return self.training

    def _refuse_rule(self, rule: Rule, why: str) -> None:
        log.error("refusing the rule", node=self.name, encoder=rule.encoder, problem=why)
        refused = self._agent.rule_refused(rule.encoder, f"the rule is refused: {why}")
        if refused:
            self._ending.end(self.training)
            self.training = None
            self.figures.note = f"refused the rule of {rule.encoder}: {why}"
        self._perform(refused)

    def _go_on(self, rule: Rule) -> None:
        if rule.unknown:
            fields = ", ".join(rule.unknown)
            log.warning("of the rule this release leaves out what it does not know", node=self.name, fields=fields)
        training = self._trained()
        self._ending.end(self.training)
        training.retune(rule.update_rule, rule.progress)
        self.state.remember_current(training.instruction, rule)
        self.figures.note = "paused by the operator" if rule.paused else "training"
        happened(self.figures.note, **self._about(training))

    def _resume(self) -> None:
        """Go on with what was trained last, whether the master is there or not."""
        if self._finish_on():
            return
        current = self.state.current()
        corpus = self._corpora.get(current.instruction.encoder_type) if current is not None else None
        if current is None or corpus is None or len(corpus.train) == 0:
            return
        encoder = current.instruction.encoder
        if (assets := self.state.assets.read(current.instruction.assets)) is None:
            log.warning("assets of the encoder are gone from the disk, reading them", node=self.name, encoder=encoder)
            self._perform(self._agent.lacks_assets(current.instruction))
            return
        if why := self._trials.refused(current.rule):
            log.error("cannot go on by the rule", node=self.name, encoder=encoder, problem=why)
            self.state.forget_current()
            return
        try:
            training = self._begin(current.instruction, corpus, assets)
        except UserError as error:
            log.error("cannot go on with the encoder", node=self.name, encoder=encoder, problem=str(error))
            return
        self._perform(self._agent.resume(current.instruction, current.rule, training.version))

    def _check_samples(self, instruction: Instruction) -> None:
        """Build what the instruction asks for around this node's samples, or say why not."""
        corpus = self._corpora.get(instruction.encoder_type)
        if corpus is None or len(corpus.train) == 0:
            self._refuse(instruction, f"no samples of type {instruction.encoder_type} here")
            return
        if why := self.config.accept.refusal(instruction):
            log.warning("refusing the instruction", node=self.name, encoder=instruction.encoder, why=why)
            self.figures.note = f"refused {instruction.encoder}: {why}"
            self._refuse(instruction, why)
            return
        if self._paused_until:
            return  # the master says it again once this node joins
        if self.training is None or self.training.instruction != instruction:
            needed = [instruction, *self._agent.waiting.values()]
            self.state.assets.keep_only(entry for each in needed for entry in each.assets)
            if (assets := self.state.assets.read(instruction.assets)) is None:
                self._perform(self._agent.lacks_assets(instruction))
                return
            self._ending.end(self.training)
            try:
                self._begin(instruction, corpus, assets)
            except UserError as error:
                log.error("refusing the instruction", node=self.name, encoder=instruction.encoder, problem=str(error))
                self.figures.note = f"refused {instruction.encoder}: {error.public}"
                self._refuse(instruction, error.public)
                return
        if self._agent.rule is None:
            self.figures.note = "waiting for the rule"
        samples = len(corpus.train)
        happened("instruction accepted", node=self.name, encoder=instruction.encoder, samples=samples)
        self._perform(self._agent.samples_checked(instruction, samples))

    def _refuse(self, instruction: Instruction, why: str) -> None:
        happened("instruction refused", node=self.name, encoder=instruction.encoder, reason=why)
        self._perform(self._agent.samples_checked(instruction, 0, why))

    def _contribute(self, asked: Contribute) -> None:
        if self.config.accept.refuses(asked.wanted.encoder, asked.wanted.encoder_type):
            answered = nothing(asked.wanted, self.state)
        else:
            answered = answer(asked.wanted, self._contributions, self.state, again=asked.again)
        self._say(answered)
        happened("words contributed", node=self.name, encoder=answered.encoder, words=len(answered.words))

    def _gather(self, instruction: Instruction) -> None:
        """Read what is lacking."""
        lacking = self.state.assets.lacking(instruction.assets)
        self.figures.note = f"reading the {shown(lacking)}"
        self.reading.gather(instruction.encoder, lacking)

    def _asset_read(self, read: AssetRead) -> None:
        """Keep an asset, and go on once none is lacking; or ask for those that did not come."""
        self._heard_at = self._clock.monotonic()
        if read.entry is None:
            log.warning("assets could not be read, asking for them", node=self.name, problem=read.problem)
            # while nothing leaves, more of the same need not wait to leave
            self._perform(self._agent.gathering_failed(read.encoder, ask=not self.outbox.problem))
            return
        reached("node before asset")
        self.state.assets.keep(read.entry, read.content)
        reached("node after asset")
        happened("asset read", node=self.name, encoder=read.encoder, asset=read.entry.name, bytes=read.entry.size)
        gathering = self._agent.gathering
        if gathering is not None and not self.state.assets.lacking(gathering.assets):
            self._perform(self._agent.gathered())

    def _begin(self, instruction: Instruction, corpus: Corpus, assets: Mapping[str, bytes]) -> Training:
        """Raises UserError if this node cannot."""
        self.figures.begin(instruction.encoder, self._broker.status().bytes_out)
        self.figures.note = "building the model"
        ledger = self.state.ledger(instruction.encoder)
        self._wait_until_version = ledger.wait_until_version
        self.training = self._trials.build(instruction, corpus, ledger, assets)
        self.figures.steps = self.training.steps
        # to build it takes a while, in which nothing could be heard, and the master was not waited for
        self._heard_at = self._clock.monotonic()
        self._spent.begin_again()
        return self.training

    def _finish(self, training: Training, read: VersionRead) -> None:
        assert read.version is not None
        self._ending.begin(training, read.version)
        self.reading.forget(read.encoder)
        self._spent.begin_again()
        self._measured(training)
        if training.held_out is not None and not self.outbox.problem:
            self.figures.version = training.version
            self._alive(self._clock.monotonic())  # no update carries this measurement

    def _finish_on(self) -> bool:
        """Go on with a finishing phase that an earlier process began."""
        instruction = self._ending.left()
        corpus = self._corpora.get(instruction.encoder_type) if instruction is not None else None
        if instruction is None or corpus is None or len(corpus.train) == 0:
            return False
        try:
            # what its private parts were fitted with lies beside them by now
            training = self._begin(instruction, corpus, {})
            self._ending.go_on(training)
        except UserError as error:
            log.error("cannot finish the encoder", node=self.name, encoder=instruction.encoder, problem=str(error))
            self.training = None
            return False
        if training.finishing is None:
            self.training = None  # it stands at no version, and must not be saved as if it did
        return True

    def _measured(self, training: Training) -> None:
        newest = training.held_out
        if newest is not None and newest.finite:
            self.figures.held_out, self.figures.held_out_version = newest.loss, newest.version

    def _answered(self, receipt: Receipt) -> None:
        if not self._handover.answered(receipt):
            return
        figures, training = self.figures, self.training
        if training is not None and training.instruction.encoder == receipt.encoder:
            training.answered(receipt)
        about = {"node": self.name, "encoder": receipt.encoder, "update": update_id(receipt)}
        facts = {**about, "version": receipt.version}
        figures.answered(receipt)
        if receipt.accepted:
            happened("update counted", **facts, weight=receipt.weight, staleness=receipt.staleness)
            return
        # nobody announces a version because of an update that does not count
        self._wait_until_version = -1
        if receipt.reason == "finished":
            happened("update refused", **facts, reason=receipt.reason, detail=receipt.detail)
        else:
            log.warning("update refused", **facts, reason=receipt.reason, detail=receipt.detail)

    # --- what its owner agrees to ------------------------------------------------------------------------------------

    def _keep_to_the_hours(self) -> None:
        """Outside the owner's hours a node takes no step. The others are not to wait for it: it hands in what it has,
        leaves, and joins again."""
        before, self._paused_until = self._paused_until, self.config.accept.rests_until(self._clock.now())
        self.figures.paused_until = self._paused_until
        if self._paused_until and not before:
            log.info("paused by its owner's hours", node=self.name, until=self._paused_until)
            training = self.training
            if training is not None and self._agent.training and training.since.steps > 0:
                if self._may_hand_in(training):
                    self._hand_in(training, wants_version=False)
                self._save(training)
                self._beside.wait()
            self._alive(self._clock.monotonic())
            self._perform(self._agent.leave())
        elif before and not self._paused_until:
            log.info("its owner's hours begin", node=self.name)
            self._heard_at = self._clock.monotonic()
            self._perform(self._agent.join())

    def _let_go_of_what_is_not_accepted(self) -> None:
        """The owner may have thought better of what was trained last: it is not gone on with, and what of it was not
        answered yet is not sent again. As that may count all the same, this is another incarnation then."""
        current = self.state.current()
        why = self.config.accept.refusal(current.instruction) if current is not None else ""
        if current is None or not why:
            return
        encoder = current.instruction.encoder
        log.warning("leaving what its owner does not accept any more", node=self.name, encoder=encoder, why=why)
        self.figures.note = f"left {encoder}: {why}"
        self.state.forget_current()
        if any(manifest.encoder == encoder for manifest in self.state.owed.values()):
            self.state.reincarnate()
            self._agent = self._new_agent()

    # --- beginning anew ----------------------------------------------------------------------------------------------

    def _new_agent(self) -> Agent:
        identity = self.state.identity.incarnation
        return Agent(self.name, identity, tuple(self._corpora), named=self.config.named)

    def _drop(self, encoder: str) -> None:
        log.warning(
            "letting go of the encoder: it is refused here, or the master does not know it",
            node=self.name,
            encoder=encoder,
        )
        self._ending.end(self.training)
        self.training = None
        self.state.forget_current()
        self.figures.note = "waiting for an instruction"

    def _reincarnate(self, why: str) -> None:
        log.warning(f"{why}; joining under a new identity", node=self.name)
        self.state.reincarnate()
        self._handover.forget()
        self._agent = self._new_agent()
        self._wait_until_version = -1
        if self.training is not None and self.training.finishing is None:
            self.training = None
        self._perform(self._agent.join())
