"""What leaves the master: messages and versions, in order, each until the broker has it, because what was decided must
leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import structlog

from common.clock import Clock, Signal
from common.crash_points import reached
from common.errors import BrokerUnavailable, Poison, PublishRejected, Unroutable
from common.numbers.slicing import EncodingName
from common.wire.assets import publish_asset
from common.wire.base import Message
from common.wire.broker import Broker, Delivery, Publication, dead_letter
from common.wire.codec import encode
from common.wire.fields import AssetEntry
from common.wire.numbering import Numbers
from common.wire.to_node import Answer, Finish, Notice, Pulse, Rule, StatusReport
from common.wire.topology import MIB, Topology
from common.wire.versions import HINT_MARGIN_SECONDS, publish_version
from master_service.arithmetic.arithmetic import Elsewhere, Encoded, Head
from master_service.decisions.effects import Publish
from master_service.decisions.messages_out import PUBLISH_AGAIN_SECONDS
from master_service.log.payloads import Payloads
from master_service.wire.outbox import Outbox
from master_service.wire.stream_ends import StreamEnds

log = structlog.get_logger()

_RETRY_SECONDS = 1.0
#: What is set aside is published together: once so many messages, or bytes, have come, or the first has waited so long.
_DEAD_LETTERS = 64
_DEAD_BYTES = 4 * MIB
_DEAD_SECONDS = 0.1


class Publisher:
    """Tries each send again until the broker takes it; gives up once `ending` is set.

    What is to be sent goes through `outbox`: it is said in the thread that decides, and done in the one that serves the
    outbox, so `_hints`, `_digests`, `_numbers` and `_streams` belong to that one.
    """

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        encoding: EncodingName,
        *,
        clock: Clock,
        ending: Signal,
        new_id: Callable[[], str],
        receives: Callable[[str], None] | None = None,
    ) -> None:
        """`receives`, if any, is called before a node is told its rule: it will send updates."""
        self.bytes_out = 0
        self._receives = receives
        self.outbox = Outbox(self._send_together)
        self._broker = broker
        self._topology = topology
        self._encoding = encoding
        self._clock = clock
        self._ending = ending
        self._new_id = new_id
        self._numbers = Numbers()
        self._hints: dict[str, float] = {}
        #: By encoder: epoch and version that were written last, and when that had ended.
        self._written: dict[str, tuple[tuple[int, int], float]] = {}
        #: By encoder: the version that was written last, and the digest of its bytes.
        self._digests: dict[str, tuple[int, str]] = {}
        #: Where streams end. By encoder: the version that was written last, and where it begins, if that is known.
        self._ends = StreamEnds(broker)
        self._offsets: dict[str, tuple[int, int | None]] = {}
        #: What is set aside and not published yet, and when the first of it came.
        self._dead: list[tuple[Delivery, Poison]] = []
        self._dead_since = 0.0
        #: The encoders whose streams are declared.
        self._streams: set[str] = set()

    def begin(self, epoch: int) -> None:
        """An epoch has begun: what is sent from now on is numbered in it."""
        self.outbox.action(partial(self._numbers.begin, epoch))

    def send(self, to: str, message: Message) -> None:
        """To one node or observer."""

        def letter() -> Publication:
            if isinstance(message, Rule) and (receives := self._receives) is not None:
                self._persist(lambda: receives(to))
            exchange = self._topology.rule if isinstance(message, Rule) else self._topology.receipt
            # who only asks has an inbox for one answer
            numbered = not isinstance(message, Answer | StatusReport)
            return self._publication(exchange, to, message, self._numbers.to_one(to) if numbered else {})

        self.outbox.letter(letter)

    def expect(self, node: str) -> None:
        """A node may send what it owes, and no rule is sent to it: a broker with a new disk has nowhere for that."""
        if (receives := self._receives) is not None:
            self.outbox.action(lambda: self._persist(lambda: receives(node)))

    def broadcast(self, encoder_type: str, message: Message) -> None:
        """To every node that listens for this type."""
        exchange = self._topology.instruction
        self.outbox.letter(
            lambda: self._publication(exchange, encoder_type, message, self._numbers.to_all(encoder_type))
        )

    def pulse(self, epoch: int) -> None:
        """A sign of life to every node."""
        exchange, key, now = self._topology.instruction, self._topology.pulse_key, self._clock.now()
        self.outbox.letter(lambda: self._publication(exchange, key, Pulse(at=now, epoch=epoch)))

    def is_due(self, effect: Publish, epoch: int) -> bool:
        """Whether a version is to be written. One that was missed is not written again a moment later: on a slow line,
        many may have asked for it while it was written."""
        last, ended_at = self._written.get(effect.encoder, ((-1, -1), 0.0))
        just_now = self._clock.monotonic() - ended_at < PUBLISH_AGAIN_SECONDS
        return not (effect.again and (epoch, effect.version) == last and just_now)

    def version(self, effect: Publish, epoch: int, layout_digest: str, encoded: Encoded | Elsewhere) -> None:
        """Write a version to its encoder's stream."""
        self.bytes_out += encoded.size
        # until it is there it counts as written just now
        self._written[effect.encoder] = (epoch, effect.version), float("inf")
        self.outbox.action(partial(self._write, effect, epoch, layout_digest, encoded), large=True)

    def _write(self, effect: Publish, epoch: int, layout_digest: str, encoded: Encoded | Elsewhere) -> None:
        head = Head(effect.encoder, effect.version, epoch, layout_digest, effect.progress)
        stream = self._topology.stream(effect.encoder)

        def write() -> None:
            begins = self._ends.of(stream)
            try:
                if effect.encoder not in self._streams:
                    self._broker.declare(self._topology.parameters(effect.encoder, encoded.size))
                self._hints[effect.encoder], digest = self._written_as(head, encoded)
                self._streams.add(effect.encoder)
                if digest is None:  # not all of it is there
                    self._ends.forget(stream)
                    return
                self._digests[effect.encoder] = effect.version, digest
                holds = self._ends.wrote(stream, encoded.chunks, encoded.size)
                self._offsets[effect.encoder] = effect.version, begins if holds else None
            except Unroutable as error:  # somebody has deleted the stream: declared again when this is tried again
                self._streams.discard(effect.encoder)
                self._ends.forget(stream)
                raise BrokerUnavailable(str(error)) from None

        reached("before publish")
        self._persist(write)
        if self._written.get(effect.encoder, ((), 0.0))[0] == (epoch, effect.version):
            self._written[effect.encoder] = (epoch, effect.version), self._clock.monotonic()
        reached("after publish")

    def _written_as(self, head: Head, encoded: Encoded | Elsewhere) -> tuple[float, str | None]:
        """From when on a version is to be read, and its digest, once all of it is on its stream."""
        if isinstance(encoded, Elsewhere):
            hint = max(0.0, self._clock.now() - HINT_MARGIN_SECONDS)
            return hint, encoded.publish(head)
        hint = publish_version(
            self._broker,
            self._topology,
            encoder=head.encoder,
            epoch=head.epoch,
            version=head.version,
            encoding=self._encoding,
            layout_digest=head.layout_digest,
            bodies=encoded.bodies,
            progress=head.progress,
            declare=False,
            digest=encoded.digest,
            clock=self._clock,
        )
        return hint, encoded.digest

    def provide(self, encoder: str, assets: Sequence[AssetEntry], payloads: Payloads) -> None:
        """Write the assets of an encoder to their stream, one after the other. One that is not whole on disk is left
        out: whoever needs it goes on asking for it."""
        self.outbox.action(partial(self._provide, encoder, tuple(assets), payloads), large=True)

    def _provide(self, encoder: str, assets: Sequence[AssetEntry], payloads: Payloads) -> None:
        size = sum(entry.size for entry in assets)

        def write(entry: AssetEntry, content: bytes) -> None:
            # each time: it is done seldom, and somebody may have deleted the stream
            self._broker.declare(self._topology.assets(encoder, size))
            try:
                publish_asset(self._broker, self._topology, encoder, entry, content)
            except Unroutable as error:
                raise BrokerUnavailable(str(error)) from None

        for entry in assets:
            if problem := payloads.damage(entry.digest):
                log.error(
                    "nodes do not get an asset; restore its payload from a backup of the state directory",
                    encoder=encoder,
                    asset=entry.name,
                    payload=entry.digest,
                    problem=problem,
                )
                continue
            reached("before provide")
            self._persist(partial(write, entry, payloads.read(entry.digest)))
            self.bytes_out += entry.size
            reached("after provide")

    def delete_stream(self, encoder: str, *, assets: bool = False) -> None:
        """Delete an encoder's stream; the next version is written to a new one. `assets`: the stream of those too."""
        self._written.pop(encoder, None)
        self.outbox.action(partial(self._delete_stream, encoder, assets=assets))

    def _delete_stream(self, encoder: str, *, assets: bool) -> None:
        self._persist(lambda: self._broker.delete_queue(self._topology.stream(encoder)))
        if assets:
            self._persist(lambda: self._broker.delete_queue(self._topology.asset_stream(encoder)))
        self._streams.discard(encoder)
        self._hints.pop(encoder, None)
        self._digests.pop(encoder, None)
        self._ends.forget(self._topology.stream(encoder))
        self._offsets.pop(encoder, None)

    def dead_letter(self, delivery: Delivery, poison: Poison) -> None:
        """Set a delivery aside with its reason, soon and together with others; it is acked after the confirm."""
        if not self._dead:
            self._dead_since = self._clock.monotonic()
        self._dead.append((delivery, poison))
        if len(self._dead) >= _DEAD_LETTERS or sum(len(each.body) for each, _ in self._dead) >= _DEAD_BYTES:
            self.bury()

    def bury_in(self) -> float:
        """Seconds until `bury` is due; infinite if nothing is set aside."""
        return max(0.0, self._dead_since + _DEAD_SECONDS - self._clock.monotonic()) if self._dead else float("inf")

    def bury(self) -> None:
        """Publish what is set aside, with one confirm for all of it, then ack it. One line for each kind says so."""
        dead, self._dead = self._dead, []
        if not dead:
            return
        kinds: dict[tuple[str, str], list[str]] = {}
        for delivery, poison in dead:
            kinds.setdefault((delivery.queue, poison.reason), []).append(poison.detail)
        for (queue, reason), details in kinds.items():
            more = {"messages": len(details)} if len(details) > 1 else {}
            log.warning("message set aside", queue=queue, reason=reason, detail=details[0], **more)
        letters = [dead_letter(self._topology.dead_letters, each, why.reason, why.detail) for each, why in dead]

        def act() -> None:
            self._persist(lambda: self._broker.publish(*letters))
            self._broker.ack(*(delivery for delivery, _ in dead))

        self.outbox.action(act)

    def dead_message(self, message: Message, reason: str, detail: str) -> None:
        """Set aside a message whose delivery is long acked."""
        headers = {"x-reason": reason, "x-detail": detail[:500]}
        publication = Publication(self._topology.dead_letters, reason, encode(message), headers, self._new_id())
        self.outbox.letter(lambda: publication)

    def _publication(
        self, exchange: str, key: str, message: Message, headers: Mapping[str, str | int] | None = None
    ) -> Publication:
        if isinstance(message, Rule | Notice | Finish | Answer) and message.encoder is not None:
            message = message.model_copy(update={"published_at": self._hints.get(message.encoder, 0.0)})
        if isinstance(message, Rule | Notice | Finish):
            written, digest = self._digests.get(message.encoder, (-1, None))
            if written == message.version:
                message = message.model_copy(update={"stream_digest": digest})
            written, offset = self._offsets.get(message.encoder, (-1, None))
            if written == message.version:
                message = message.model_copy(update={"stream_offset": offset})
        return Publication(exchange, key, encode(message), headers or {}, self._new_id())

    def _send_together(self, letters: Sequence[Publication]) -> None:
        reached("before send")

        def send() -> None:
            try:
                self._broker.publish(*letters)
            except Unroutable as error:
                # nobody listens (yet); a node that joins later is told everything then
                log.debug("nobody takes this", problem=str(error))

        self._persist(send)
        reached("after send")

    def _persist(self, action: Callable[[], None]) -> None:
        """Try until the broker takes it. Raises the broker's last error once the service is to end."""
        while True:
            try:
                return action()
            except (BrokerUnavailable, PublishRejected) as error:
                log.warning("the broker does not take messages, trying again", problem=str(error))
                if self._clock.wait(_RETRY_SECONDS, self._ending):
                    raise
