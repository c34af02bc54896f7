"""The node's shell: broker, disk and clock around agent and training. The main thread trains; between two steps it
handles what came in. Sending and reading versions happen on threads of their own."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from common.crash_points import reached
from common.errors import BrokerUnavailable, Poison, UserError
from common.wire.broker import Broker, Delivery
from common.wire.codec import decode
from common.wire.messages import Answer, Get, Instruction, Receipt
from common.wire.topology import Topology
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
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.figures import NodeFigures
from node_service.handover.handover import Handover
from node_service.handover.local_state import LocalState
from node_service.handover.outbox import Outbox
from node_service.handover.reading import VersionRead, VersionThread
from node_service.training.session import Training
from node_service.training.trainer import choose_device

log = structlog.get_logger()

_POLL_SECONDS = 0.2
_FLUSH_SECONDS = 20.0


class NodeService:
    """Runs until stopped, or until an encoder is finished if so configured. `on_change` is called between steps."""

    def __init__(
        self,
        node: str,
        config: NodeConfig,
        corpora: dict[str, Corpus],
        broker: Broker,
        topology: Topology,
        on_change: Callable[[NodeService], None] = lambda service: None,
    ) -> None:
        self.node = node
        self.config = config
        self.broker = broker
        self.topology = topology
        self.figures = NodeFigures()
        self.history: list[tuple[float, int, float]] = []
        self._corpora = corpora
        self._on_change = on_change
        self._events: queue.SimpleQueue[Delivery | VersionRead] = queue.SimpleQueue()
        self._training: Training | None = None
        self._lost = threading.Event()
        self._wait_until_version = -1
        self._finished = False

    # --- life --------------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set.

        Raises LockHeld if this node id or its state directory is in use, UserError for a device that is not there.
        """
        torch.set_num_threads(self.config.threads)
        self._device = choose_device(self.config.device)
        directory = self.config.state_dir or Path("node-state") / self.node
        with contextlib.closing(LocalState(directory, self.node)) as self._state:
            self.broker.lock(self.topology.node_lock(self.node), self._lost.set)
            self._serve(stop)

    def _serve(self, stop: threading.Event) -> None:
        types = tuple(self._corpora)
        self.broker.declare(self.topology.node(self.node, types))
        self._outbox = Outbox(self.broker, self.topology, self.node)
        self._handover = Handover(self._state, self._outbox)
        self._reader = VersionThread(self.broker, self.topology, self._events.put)
        self._agent = Agent(self.node, self._state.identity.incarnation, types)
        subscription = self.broker.consume(self.topology.node_inbox(self.node), self._events.put, prefetch=32)
        try:
            self.figures.note = "waiting for an instruction"
            self._perform(self._agent.join())
            self._resume()
            if self.config.get is not None:
                self._outbox.say(Get(sender=self.node, encoder_type=self.config.get))
            self._loop(stop)
        finally:
            self._say_goodbye()
            subscription.close()
            self._reader.close()

    def _resume(self) -> None:
        """Send what is owed, and go on with what was trained last, whether the master is there or not."""
        self._agent.unanswered = self._handover.send_owed()
        current = self._state.current()
        corpus = self._corpora.get(current.instruction.encoder_type) if current is not None else None
        if current is None or corpus is None or len(corpus.train) == 0:
            return
        encoder = current.instruction.encoder
        try:
            training = self._build(current.instruction, corpus)
        except UserError as error:
            log.error("cannot go on with the encoder", node=self.node, encoder=encoder, problem=str(error))
            return
        self.figures.version, self.figures.steps = training.version, training.trainer.steps
        self._perform(self._agent.resume(current.instruction, current.rule, training.version))

    def _loop(self, stop: threading.Event) -> None:
        heard = alive_at = saved_at = time.monotonic()
        while not stop.is_set() and not (self._finished and self.config.exit_when_finished):
            if self._lost.is_set():
                raise BrokerUnavailable(f"the lock of node {self.node!r} was lost; is it running somewhere else?")
            now = time.monotonic()
            ready = self._may_train()
            if self._handle_events(wait=0.0 if ready else _POLL_SECONDS):
                heard, ready = time.monotonic(), self._may_train()  # after a model was built that is a good while later
            if ready:
                self._train()
            elif self._agent.rule is not None:
                self.figures.waiting_seconds += time.monotonic() - now
            # while nothing leaves, more of the same need not wait to leave
            if now - alive_at >= self.config.alive_every_seconds and not self._outbox.problem:
                alive_at = now
                encoder = self._agent.current.encoder if self._agent.current else None
                sent = self.broker.status().bytes_out
                self._outbox.say(self.figures.alive(self.node, self._state.identity.incarnation, encoder, sent))
                self._handover.send_unanswered(self.config.resend_after_seconds)
            if now - heard >= self.config.ask_after_seconds:
                heard = now
                if not ready and not self._outbox.problem:
                    self._perform(self._agent.ask())
                self._perform(self._agent.look())
            if self._training is not None and now - saved_at >= self.config.checkpoint_every_seconds:
                saved_at = now
                self._training.save()
            self._on_change(self)

    def _say_goodbye(self) -> None:
        """Hand in what was trained, save, leave; what cannot be sent in time is sent at the next start."""
        if self._training is not None and self._agent.training and self._training.since.steps > 0:
            self._hand_in(wants_version=False)
        if self._training is not None:
            self._training.save()
        self._perform(self._agent.leave())
        if not self._outbox.close(_FLUSH_SECONDS):
            log.warning("not everything could be sent; it is kept and sent at the next start", node=self.node)

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _handle_events(self, wait: float) -> bool:
        """Handle everything that has come, waiting up to `wait` seconds for the first; whether anything had."""
        handled = False
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get(timeout=wait) if wait else self._events.get_nowait()
                wait, handled = 0.0, True
                if isinstance(event, VersionRead):
                    self._version_read(event)
                else:
                    self._delivered(event)
        return handled

    def _delivered(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.body)
        except Poison as poison:
            log.warning("message set aside", node=self.node, reason=poison.reason, detail=poison.detail)
            self.broker.dead_letter(delivery, poison.reason, poison.detail)
            return
        if isinstance(message, Answer) and not message.accepted:
            log.error("the master cannot make this encoder", problem=message.detail)
        mistaken = isinstance(message, Receipt) and self._handover.mistaken(message)
        self._perform(self._agent.mistaken() if mistaken else self._agent.receive(message))
        reached("node before ack")
        self.broker.ack(delivery)
        reached("node after ack")

    def _version_read(self, read: VersionRead) -> None:
        training = self._training
        if read.version is None:
            log.warning("a version could not be read, asking for it", node=self.node, problem=read.problem)
            self._perform(self._agent.read_failed(read.encoder, read.wanted))
            return
        if training is None or training.instruction.encoder != read.encoder:
            return
        number = read.version.version
        if self._agent.finishes(read.encoder, number, exact=read.exact):
            self._finish(training, read)
        elif self._agent.adopts(read.encoder, number, exact=read.exact):
            training.adopt(read.version)
        else:
            return
        self.figures.version = training.version
        self._perform(self._agent.version_read(read.encoder, number))

    # --- what follows ------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Say():
                    self._outbox.say(action.message)
                case CheckSamples():
                    self._check_samples(action.instruction)
                case Train():
                    assert self._training is not None
                    self._training.retune(action.rule.update_rule)
                    self._training.trainer.progress = max(self._training.trainer.progress, action.rule.progress)
                    self._state.remember_current(self._training.instruction, action.rule)
                    self.figures.note = "training"
                case Read():
                    assert self._training is not None
                    digest = self._training.instruction.layout_digest
                    wanted = (action.encoder, digest, action.at_least, action.published_at)
                    self._reader.read(*wanted, exact=action.exact)
                case Look():
                    assert self._training is not None
                    self._reader.look(action.encoder, self._training.instruction.layout_digest, action.at_least)
                case Drop():
                    self._drop(action.encoder)
                case Answered():
                    self._settle(action.receipt)
                case Republish():
                    self._handover.send_again(action.sequence, action.attempt)
                case Reincarnate():
                    self._reincarnate()

    def _check_samples(self, instruction: Instruction) -> None:
        """Build what the instruction asks for around this node's samples, or say why not."""
        corpus = self._corpora.get(instruction.encoder_type)
        if corpus is None or len(corpus.train) == 0:
            refusal = f"no samples of type {instruction.encoder_type} here"
            self._perform(self._agent.samples_checked(instruction, 0, refusal))
            return
        if self._training is None or self._training.instruction != instruction:
            try:
                self._build(instruction, corpus)
            except UserError as error:
                log.error("refusing the instruction", node=self.node, encoder=instruction.encoder, problem=str(error))
                self.figures.note = f"refused {instruction.encoder}: {error}"
                self._perform(self._agent.samples_checked(instruction, 0, str(error)))
                return
        if self._agent.rule is None:
            self.figures.note = "waiting for the rule"
        self._perform(self._agent.samples_checked(instruction, len(corpus.train)))

    def _build(self, instruction: Instruction, corpus: Corpus) -> Training:
        """Raises UserError if this node cannot."""
        self.figures.note = "building the model"
        ledger = self._state.ledger(instruction.encoder)
        self._wait_until_version = ledger.wait_until_version
        self._training = Training(
            instruction,
            corpus.train,
            self._state.private(instruction.encoder),
            private=self.config.private,
            seed=self.config.seed,
            device=self._device,
            ledger=ledger,
        )
        return self._training

    def _finish(self, training: Training, read: VersionRead) -> None:
        assert read.version is not None
        training.finish(read.version)
        directory = self.config.export_dir or training.directory / "model"
        training.export(directory)
        self._state.forget_current()
        self.figures.note = "finished"
        log.info(
            "encoder finished",
            node=self.node,
            encoder=read.encoder,
            version=read.version.version,
            model=str(directory),
            private=str(training.directory),
        )
        self._finished = True

    # --- training and returning --------------------------------------------------------------------------------------

    def _may_train(self) -> bool:
        training = self._training
        if training is None or not self._agent.training or training.version < 0:
            return False
        if training.rule.wait and training.version <= self._wait_until_version:
            return False
        return not (training.must_return and len(self._agent.unanswered) >= training.rule.max_unanswered)

    def _train(self) -> None:
        training, figures = self._training, self.figures
        assert training is not None
        if training.must_return:
            self._hand_in(wants_version=True)
            if training.rule.wait:
                return
        seconds = training.step()
        figures.training_seconds += seconds
        figures.steps = training.trainer.steps
        figures.loss = training.since.loss_mean
        if self.config.max_steps_per_second is not None:
            pause = 1.0 / self.config.max_steps_per_second - seconds
            if pause > 0:
                time.sleep(pause)
                seconds += pause
        rate = 1.0 / max(seconds, 1e-9)
        figures.steps_per_second += 0.1 * (rate - figures.steps_per_second) if figures.steps_per_second else rate

    def _hand_in(self, *, wants_version: bool) -> None:
        training = self._training
        assert training is not None
        sequence = self._state.next_sequence()
        manifest, bodies = training.hand_in(
            self.node, self._state.identity.incarnation, sequence, wants_version=wants_version
        )
        self.history.append((time.time(), training.trainer.steps, manifest.loss))
        try:
            self._handover.hand_over(manifest, bodies)
        except OSError:
            self._training = None  # its steps are still in the checkpoint before, which must stay
            raise
        self._agent.unanswered.add(sequence)
        self._wait_until_version = training.version
        self.figures.handed_in += 1

    def _settle(self, receipt: Receipt) -> None:
        if not self._handover.settle(receipt):
            return
        training = self._training
        if training is not None and training.instruction.encoder == receipt.encoder:
            training.settle(receipt.sequence, receipt.accepted, receipt.reason)
        if receipt.accepted:
            self.figures.accepted += 1
            self.figures.last_weight, self.figures.staleness = receipt.weight, receipt.staleness
            return
        self.figures.refused += 1
        # nobody announces a version because of an update that does not count
        self._wait_until_version = -1
        if receipt.reason != "finished":
            log.warning(
                "update refused", node=self.node, reason=receipt.reason, detail=receipt.detail, update=receipt.sequence
            )

    # --- beginning anew ----------------------------------------------------------------------------------------------

    def _drop(self, encoder: str) -> None:
        log.warning("the master does not know this encoder, letting go of it", node=self.node, encoder=encoder)
        self._training = None
        self._state.forget_current()
        self.figures.note = "waiting for an instruction"

    def _reincarnate(self) -> None:
        log.warning("the master knows other updates under this identity; joining under a new one", node=self.node)
        self._state.reincarnate()
        self._handover.forget()
        self._agent = Agent(self.node, self._state.identity.incarnation, self._agent.types)
        self._training, self._wait_until_version = None, -1
        self._perform(self._agent.join())
