"""The master's shell: broker, disk and clock around the fold. One thread decides; deliveries wait for it in a queue."""

from __future__ import annotations

import contextlib
import platform
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch

from common.broker import Broker, Delivery, Publication
from common.codec import decode, encode
from common.encodings import encode_vector
from common.errors import BrokerUnavailable, Poison, PublishRejected, SharedEncoderError, Unroutable, UserError
from common.messages import (
    Alive,
    Answer,
    AskStatus,
    Finish,
    Get,
    Introduce,
    Message,
    Notice,
    Resend,
    Rule,
    StatusReport,
    UpdateChunk,
    UpdateManifest,
)
from common.topology import Topology
from common.versions import publish_version
from master_service.aggregator import measure
from master_service.config import MasterConfig
from master_service.effects import Broadcast, Conclude, Effect, Generate, Publish, Refused, Send, Step
from master_service.entries import (
    Configured,
    Generated,
    GenerationFailed,
    Loggable,
    Presence,
    Settings,
    Started,
    Tick,
    UpdateFacts,
)
from master_service.generation import generate
from master_service.intake import Intake
from master_service.message_log import MessageLog
from master_service.registry import export_encoder
from master_service.snapshot import read_snapshot, write_snapshot
from master_service.status import Live, report

log = structlog.get_logger()

#: Kinds that a node or an observer may send to the master's inbox and that are decided upon.
_DECIDED = (
    "request.join",
    "request.get",
    "request.update",
    "request.fetch",
    "request.leave",
    "request.stop",
    "ack",
)
_POLL_SECONDS = 0.25
#: How long the chunks of an update that does not count are waited for; they were there before its manifest.
_DISCARD_SECONDS = 1.0


@dataclass
class MasterService:
    """Runs until stopped, or until all encoders are finished if so configured.

    `on_change` is called in the service's thread whenever something happened that is worth showing.
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
        self._manifests: deque[Delivery] = deque()
        self._intake: Intake | None = None
        self._hints: dict[str, float] = {}
        self._lost = threading.Event()
        self._log = MessageLog(self.config.state_dir)
        self._fold, self._folded = read_snapshot(self._snapshots, self._log.payloads)

    # --- life --------------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set. Raises LockHeld if another master serves this namespace."""
        torch.set_num_threads(self.config.threads)
        self._stop = stop
        self.broker.lock(self.topology.master_lock, self._lost.set)
        self.broker.declare(self.topology.master())
        self._recover()
        subscriptions = [
            self.broker.consume(self.topology.master_inbox, self._events.put, prefetch=64),
            self.broker.consume(self.topology.master_updates, self._events.put, prefetch=4),
        ]
        if self.get is not None:
            self._record(Get(sender="master", encoder_type=self.get))
        try:
            while not stop.is_set() and not self._done():
                self._turn()
                if self._lost.is_set():
                    raise BrokerUnavailable("the lock of this namespace was lost; another master may be serving it now")
        finally:
            for subscription in subscriptions:
                subscription.close()
            if self._intake is not None:
                self._intake.close()
            self._snapshot()
            self._log.close()

    def _recover(self) -> None:
        """Fold what the log holds after the snapshot, log what was computed but not logged, and tell everybody."""
        checks = self._fold.replay(self._log.entries(self._folded))
        bad = next((check for check in checks if not check.identical), None)
        if bad is not None:
            raise SharedEncoderError(
                f"version {bad.version} of {bad.encoder} comes out different from the log: "
                "the state directory is damaged or another torch version computed it"
            )
        for versioned in list(self._fold.unlogged.values()):
            self._record(versioned)
        state = self._fold.coordinator.state
        self._record(Started(epoch=state.epoch + 1, fingerprint=fingerprint()))
        if state.settings != self.settings:
            self._record(Configured(settings=self.settings))
        self._carry_out(self._fold.coordinator.restate(self.clock()))

    def _done(self) -> bool:
        encoders = self._fold.coordinator.state.encoders.values()
        return (
            self.config.exit_when_finished
            and bool(encoders)
            and all(encoder.status in ("finished", "failed") for encoder in encoders)
        )

    def _turn(self) -> None:
        """Wait for one delivery or for a deadline, and handle it."""
        with contextlib.suppress(queue.Empty):
            self._receive(self._events.get(timeout=_POLL_SECONDS))
        now = self.clock()
        deadline = self._fold.coordinator.deadline()
        if deadline is not None and now >= deadline:
            self._record(Tick())
        for node, present in self.live.transitions(now, self.config.presence_timeout_seconds):
            self._record(Presence(node=node, present=present))
        if self._intake is not None and time.monotonic() > self._intake.deadline:
            self._chunks_missing(self._intake)
        self.on_change(self)

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _receive(self, delivery: Delivery) -> None:
        intake = self._intake
        if intake is not None and delivery.queue == self.topology.chunk_queue(intake.manifest.node):
            if intake.add(delivery):
                self._take_update(intake)
            return
        if delivery.queue not in (self.topology.master_inbox, self.topology.master_updates):
            return  # a chunk of an intake that has ended: it went back to its queue when that closed
        try:
            message = decode(delivery.body)
            self._verify_sender(delivery, message)
        except Poison as poison:
            self._dead_letter(delivery, poison)
            return
        if delivery.queue == self.topology.master_updates:
            self._manifests.append(delivery)
            self._next_manifest()
        else:
            self._handle_message(delivery, message)

    def _verify_sender(self, delivery: Delivery, message: Message) -> None:
        """The routing key names the sender; what is in the message must not claim another."""
        claimed = getattr(message, "node", None) or getattr(message, "sender", None)
        if claimed != delivery.routing_key.partition(".")[0]:
            raise Poison("sender", f"a message of {claimed!r} came with the routing key {delivery.routing_key!r}")
        kind = getattr(message, "kind", "")
        if (kind == "update") != (delivery.queue == self.topology.master_updates) or isinstance(message, UpdateChunk):
            raise Poison("unexpected-kind", f"a message of kind {kind!r} does not belong into {delivery.queue}")
        if kind not in (*_DECIDED, "update", "request.alive", "request.status"):
            raise Poison("unexpected-kind", f"a message of kind {kind!r} is not for the master")

    def _handle_message(self, delivery: Delivery, message: Message) -> None:
        node = getattr(message, "node", None)
        if node is not None:
            self.live.seen(node, self.clock())
        if isinstance(message, Alive):
            self.live.alive(message)
            known = self._fold.coordinator.state.nodes.get(message.node)
            if known is None or known.incarnation != message.incarnation:
                self._send(message.node, Introduce(node=message.node))
        elif isinstance(message, AskStatus):
            plain = report(self._fold.coordinator.state, self.live, self.broker.status(), self.clock())
            self._send(message.sender, StatusReport(report=plain))
        else:
            # below the sender's name: nobody can take the id of another's message, or of an update
            message_id = f"{delivery.routing_key}:{delivery.message_id}" if delivery.message_id else None
            self._record(message, message_id=message_id)  # type: ignore[arg-type]
        self.broker.ack(delivery)

    def _next_manifest(self) -> None:
        """Begin with the next update, if none is being fetched."""
        if self._intake is not None or not self._manifests:
            return
        delivery = self._manifests.popleft()
        manifest = decode(delivery.body)
        assert isinstance(manifest, UpdateManifest)
        self.live.seen(manifest.node, self.clock())
        wanted = self._fold.coordinator.wants_payload(manifest)
        patience = self.config.chunk_timeout_seconds if wanted else _DISCARD_SECONDS
        self._intake = Intake(
            self.broker,
            self.topology,
            manifest,
            delivery,
            wanted=wanted,
            deadline=time.monotonic() + patience,
            on_delivery=self._events.put,
            on_poison=self._dead_letter,
        )

    def _take_update(self, intake: Intake) -> None:
        """All chunks are here: make the update durable, then decide on it, then remove it from the broker."""
        manifest = intake.manifest
        if intake.wanted:
            payload = intake.payload()
            size = self._fold.coordinator.state.encoders[manifest.encoder].size
            finite, norm = measure(payload, size, manifest.encoding)
            digest = self._log.payloads.write(payload)
            facts = UpdateFacts(digest=digest, size=len(payload), finite=finite, norm=norm)
            self._record(manifest, message_id=_delivery_id(manifest), facts=facts, payload=digest)
        else:
            self._record(manifest, message_id=_delivery_id(manifest))
        intake.settle()
        self._end_intake(intake)

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
        self._send(manifest.node, resend)
        self.broker.ack(intake.delivery)
        self._end_intake(intake)

    def _end_intake(self, intake: Intake) -> None:
        intake.close()
        self._intake = None
        self._next_manifest()

    def _dead_letter(self, delivery: Delivery, poison: Poison) -> None:
        self.live.poison += 1
        log.warning("message set aside", queue=delivery.queue, reason=poison.reason, detail=poison.detail)
        self._persist(lambda: self.broker.dead_letter(delivery, poison.reason, poison.detail))

    # --- what is decided ---------------------------------------------------------------------------------------------

    def _record(
        self,
        body: Loggable,
        *,
        message_id: str | None = None,
        facts: UpdateFacts | None = None,
        payload: str | None = None,
    ) -> None:
        """Append to the log, fold, and carry out what follows. A message id that is in the log already has no effect,
        except that an update is answered again."""
        entry = self._log.append(
            body, message_id=message_id or uuid.uuid4().hex, at=self.clock(), facts=facts, payload=payload
        )
        if entry is None:
            if not isinstance(body, UpdateManifest):
                return
            # the log has it, its answer may not have left: recorded as one more delivery of the same update
            entry = self._log.append(body, message_id=uuid.uuid4().hex, at=self.clock())
            assert entry is not None
        self._folded = entry.offset
        self._carry_out(self._fold.apply(entry))

    def _carry_out(self, effects: list[Effect]) -> None:
        """In order; what a computed version leads to comes after everything that was decided before it."""
        later: list[Loggable] = []
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect.to, effect.message)
                case Broadcast():
                    self._publish_message(self.topology.instruction, effect.encoder_type, effect.message)
                case Publish():
                    self._publish_version(effect)
                case Step():
                    later.append(self._fold.unlogged[effect.encoder])
                case Generate():
                    later.append(self._generate(effect))
                case Conclude():
                    self._export(effect)
                case Refused():
                    self._log.payloads.drop(effect.payload)
        for body in later:
            payload = body.digest if isinstance(body, Generated) else None
            self._record(body, payload=payload)

    def _generate(self, effect: Generate) -> Loggable:
        log.info("making the encoder", encoder=effect.encoder, generation=effect.generation)
        try:
            architecture, parameters = generate(effect)
        except UserError as error:
            log.error("the encoder could not be made", encoder=effect.encoder, problem=str(error))
            return GenerationFailed(encoder=effect.encoder, reason=str(error))
        digest = self._log.payloads.write(parameters.to_bytes())
        return Generated(
            encoder=effect.encoder,
            architecture=architecture,
            layout=parameters.layout.plain(),
            layout_digest=parameters.layout.digest,
            digest=digest,
        )

    def _publish_version(self, effect: Publish) -> None:
        state = self._fold.coordinator.state
        parameters = self._fold.aggregator.targets[effect.encoder].parameters
        bodies = encode_vector(parameters.vector, self.config.encoding)
        self.live.bytes_published += sum(len(body) for body in bodies)

        def write() -> None:
            self._hints[effect.encoder] = publish_version(
                self.broker,
                self.topology,
                encoder=effect.encoder,
                epoch=state.epoch,
                version=effect.version,
                encoding=self.config.encoding,
                layout_digest=parameters.layout.digest,
                bodies=bodies,
                progress=effect.progress,
            )

        self._persist(write)

    def _export(self, effect: Conclude) -> None:
        encoder = self._fold.coordinator.state.encoders[effect.encoder]
        directory = self.config.export_dir or self.config.state_dir / "encoders" / effect.encoder
        export_encoder(directory, encoder, self._fold.aggregator.targets[effect.encoder].parameters)
        log.info("encoder finished", encoder=effect.encoder, version=effect.version, directory=str(directory))

    # --- what goes out -----------------------------------------------------------------------------------------------

    def _send(self, to: str, message: Message) -> None:
        exchange = self.topology.rule if isinstance(message, Rule) else self.topology.receipt
        self._publish_message(exchange, to, message)

    def _publish_message(self, exchange: str, key: str, message: Message) -> None:
        if isinstance(message, Rule | Notice | Finish | Answer) and message.encoder is not None:
            message = message.model_copy(update={"published_at": self._hints.get(message.encoder, 0.0)})
        publication = Publication(exchange, key, encode(message), message_id=uuid.uuid4().hex)

        def send() -> None:
            try:
                self.broker.publish(publication)
            except Unroutable:
                # nobody listens (yet); a node that joins later is told everything then
                log.debug("nobody takes this", exchange=exchange, key=key)

        self._persist(send)

    def _persist(self, action: Callable[[], None]) -> None:
        """Try until the broker takes it: what was decided must leave. Gives up only when the service is stopped."""
        while True:
            try:
                return action()
            except (BrokerUnavailable, PublishRejected) as error:
                log.warning("the broker does not take messages, trying again", problem=str(error))
                if self._stop.wait(1.0) or self._lost.is_set():
                    raise

    # --- disk --------------------------------------------------------------------------------------------------------

    @property
    def _snapshots(self) -> Path:
        return self.config.state_dir / "snapshots"

    def _snapshot(self) -> None:
        if not self._fold.unlogged:
            write_snapshot(self._snapshots, self._fold, self._folded)

    def report(self) -> dict[str, object]:
        """What `status` shows."""
        return report(self._fold.coordinator.state, self.live, self.broker.status(), self.clock())


def fingerprint() -> dict[str, str]:
    """What the bits of a computation depend on; replay elsewhere can say why they differ."""
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def _delivery_id(manifest: UpdateManifest) -> str:
    return f"{manifest.update_id}/{manifest.attempt}"
