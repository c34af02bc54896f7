"""One aggregator, stepped by hand: it does what the master orders with its part of updates and versions, and decides
nothing. It knows no thread and never sleeps.

Every order may come again, and leads to the same again. What is told to the master is durable before.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import assert_never

import structlog

from common.clock import Clock, Signal
from common.crash_points import reached
from common.errors import BrokerUnavailable, Poison, PublishRejected, Unroutable, UserError
from common.numbers.slicing import encoded_size, payload_size, slice_count, slice_length
from common.wire.broker import Broker, Delivery, OnDelivery, Publication
from common.wire.codec import encode
from common.wire.topology import Topology
from common.wire.transfer import payload_digest
from common.wire.versions import publish_version
from master_service.arithmetic.arithmetic import PayloadsLost
from master_service.log.deadly import Attempts
from master_service.log.payloads import Incoming
from master_service.log.room import is_full
from master_service.shards.holding import Holding, part_of
from master_service.shards.store import ShardStore
from master_service.shards.taking import Taking
from master_service.wire import orders
from master_service.wire.orders import AnyOrder, Done, Hello, Report

log = structlog.get_logger()

#: Orders that are at hand, at most; one to take an update is, until that is here.
ORDERS_PREFETCH = 1024
#: The longest time between two looks, seconds.
_IDLE_SECONDS = 0.5
#: How often it is tried whether there is room on the disk again, seconds.
_ROOM_SECONDS = 1.0
#: Versions that are encoded and not published yet, of each encoder.
_ENCODED = 3

#: Does a piece of work after those before it, perhaps in another thread.
Beside = Callable[[Callable[[], None]], None]


class Shard:
    """Aggregator `number` (from 0 on) of `shards`. `start`, then `hear` and `look`; `close` at any end."""

    def __init__(
        self,
        number: int,
        shards: int,
        broker: Broker,
        topology: Topology,
        store: ShardStore,
        attempts: Attempts,
        *,
        clock: Clock,
        ending: Signal,
        on_delivery: OnDelivery,
        beside: Beside,
    ) -> None:
        """The broker calls `on_delivery` with each delivery; whoever drives this then passes it to `hear`. `beside`
        publishes. Raises Damaged if the store cannot be gone on from."""
        self.number, self.shards = number, shards
        self.holding = Holding(store, number, shards)
        self._broker = broker
        self._topology = topology
        self._store = store
        self._clock = clock
        self.ending = ending
        self._attempts = attempts
        self._beside = beside
        self._taking = Taking(
            number,
            shards,
            broker,
            topology,
            store,
            attempts,
            clock=clock,
            on_delivery=on_delivery,
            say=self._say,
        )
        #: By encoder: version 0 as it comes, and the slice that is next.
        self._placing: dict[str, tuple[Incoming, int]] = {}
        self._encoded: dict[str, OrderedDict[int, list[bytes]]] = {}
        #: By encoder: epoch and version that were published last.
        self._issued: dict[str, tuple[int, int]] = {}
        #: Orders that there was no room on the disk for, and when they are tried again.
        self._without_room: deque[Delivery] = deque()
        self._try_again_at = 0.0

    @property
    def without_room(self) -> int:
        """Orders that wait for room on the disk."""
        return len(self._without_room)

    def start(self) -> None:
        """Declare what is talked by, and say that it is here."""
        self._broker.declare(self._topology.shards(self.shards))
        self._say(Hello(shard=self.number, shards=self.shards))

    def hear(self, delivery: Delivery) -> None:
        """Handle one delivery. Raises UserError for a master of another number of shards."""
        if delivery.queue == self._topology.shard_queue(self.number):
            self._hear_order(delivery)
            return
        try:
            self._taking.hear(delivery)
        except Poison as poison:
            log.warning("message set aside", queue=delivery.queue, reason=poison.reason, detail=poison.detail)
            self._broker.dead_letter(delivery, poison.reason, poison.detail)

    def look(self) -> float:
        """Do what time has made due; gives the seconds until this is wanted again."""
        if self._without_room and self._clock.monotonic() >= self._try_again_at:
            for _ in range(len(self._without_room)):
                self._hear_order(self._without_room.popleft())
        return min(_IDLE_SECONDS, self._taking.look())

    def close(self) -> None:
        """Give back what was fetched and is not whole."""
        self._taking.close()
        self._attempts.close()

    # --- orders ------------------------------------------------------------------------------------------------------

    def _hear_order(self, delivery: Delivery) -> None:
        try:
            order = orders.order(delivery, self._topology)
        except Poison as poison:
            log.warning("an order cannot be read", why=poison.detail)
            self._broker.ack(delivery)
            return
        if order.shards != self.shards:
            raise UserError(
                f"the master's log is of {order.shards} shards, this is aggregator {self.number + 1}/{self.shards}; "
                f"start it with --shard {self.number + 1}/{order.shards}"
            )
        try:
            if isinstance(order, orders.Take):
                self._taking.take(order.manifest, delivery)  # acked once it is here
                return
            answer = self._obey(order)
        except OSError as error:
            if not is_full(error):
                raise
            self._wait_for_room(delivery, error)
            return
        if answer is not None:
            self._say(answer)
        self._broker.ack(delivery)

    def _wait_for_room(self, delivery: Delivery, error: OSError) -> None:
        if not self._without_room:
            log.error("the disk is full: taking no more until there is room", problem=str(error))
        self._without_room.append(delivery)
        self._try_again_at = self._clock.monotonic() + _ROOM_SECONDS

    def _obey(self, order: AnyOrder) -> Done | None:
        """The answer, if there is one at once."""
        answer = partial(Done, shard=self.number, request=order.request)
        match order:
            case orders.Begin():
                return answer(version=self._begin(order))
            case orders.Place():
                self._place(order)
                return answer()
            case orders.Leave():
                self._taking.leave(order.node)
            case orders.Discard():
                if not order.logged:
                    self._store.discard(order.manifest.update_id, order.manifest.digest)
                reached("shard after discard")
                self._taking.throw_away(order.manifest, order.incarnation)
            case orders.Keep():
                self._store.keep(order.update, order.digest)
            case orders.Drop():
                self._store.drop(order.digest)
            case orders.Compute():
                return self._compute(order)
            case orders.Encode():
                behind = self.holding.versions.get(order.encoder, -1) < order.version
                return answer(behind=behind, digest=None if behind else self._encode(order))
            case orders.Issue():
                self._beside(lambda: self._issue(order))
            case orders.Read():
                return answer(data=self.holding.slice(order.encoder, order.index))
            case orders.Take():
                raise AssertionError("it is taken where its delivery is")
            case _:
                assert_never(order)
        return None

    def _begin(self, order: orders.Begin) -> int:
        if (version := self.holding.versions.get(order.encoder)) is not None:
            return version
        if (before := self._placing.pop(order.encoder, None)) is not None:
            before[0].discard()  # of a master that did not live to end it
        part = part_of(order.size, self.number, self.shards)
        incoming = self._store.payloads.receive(sum(encoded_size(slice_length(order.size, i), "float32") for i in part))
        self._placing[order.encoder] = incoming, part.start
        if not part:
            self._placed(order.encoder, order.size)
            return 0
        return -1

    def _place(self, order: orders.Place) -> None:
        """A slice that was placed already, or is not the next, changes nothing: it is one that was given again."""
        if order.encoder not in self._placing:
            return
        incoming, index = self._placing[order.encoder]
        if order.index != index:
            return
        incoming.add(order.data)
        self._placing[order.encoder] = incoming, index + 1
        reached("shard after place")
        if index + 1 == part_of(order.size, self.number, self.shards).stop:
            self._placed(order.encoder, order.size)

    def _placed(self, encoder: str, size: int) -> None:
        incoming, _ = self._placing.pop(encoder)
        self.holding.begin(encoder, size, incoming.keep())
        log.info("an encoder has begun", encoder=encoder, parameters=size, shard=f"{self.number + 1}/{self.shards}")

    def _compute(self, order: orders.Compute) -> Done:
        answer = partial(Done, shard=self.number, request=order.request)
        here = self.holding.versions.get(order.encoder, -1)
        if order.version > here + 1 or here < 0:
            return answer(behind=True)
        try:
            stepped = self.holding.step(order)
        except PayloadsLost as error:
            log.error("payloads are damaged or missing; their nodes are asked to send again", problem=str(error))
            return answer(lost=error.lost)
        reached("shard after step")
        if stepped is None:
            return answer(differs=True)
        return answer(version=stepped.version, digest=stepped.digest, squares=stepped.squares)

    def _encode(self, order: orders.Encode) -> str | None:
        """Of the version that is here now: an order that comes late finds what was encoded for it, or nothing."""
        kept = self._encoded.setdefault(order.encoder, OrderedDict())
        if order.version not in kept:
            if self.holding.versions.get(order.encoder) != order.version:
                return None
            kept[order.version] = self.holding.encoded(order.encoder, order.encoding)
            while len(kept) > _ENCODED:
                kept.popitem(last=False)
        return payload_digest(kept[order.version])

    def _issue(self, order: orders.Issue) -> None:
        kept = self._encoded.get(order.encoder, OrderedDict())
        bodies = kept.get(order.version)
        reached("shard before issue")
        answer = partial(Done, shard=self.number, request=order.request)
        if self._issued.get(order.encoder) == (order.epoch, order.version):
            self._say(answer())  # the answer was lost
            return
        if bodies is None:
            self._say(answer(gone=True))
            return
        try:
            chunks, size = slice_count(order.elements), payload_size(order.elements, order.encoding)
            self._persist(
                lambda: publish_version(
                    self._broker,
                    self._topology,
                    encoder=order.encoder,
                    epoch=order.epoch,
                    version=order.version,
                    encoding=order.encoding,
                    layout_digest=order.layout_digest,
                    bodies=bodies,
                    progress=order.progress,
                    declare=False,
                    digest=order.digest,
                    part=part_of(order.elements, self.number, self.shards),
                    whole=(chunks, size),
                    clock=self._clock,
                ),
                unroutable=True,
            )
        except Unroutable as error:
            log.warning("there is no stream to write a version to", encoder=order.encoder, problem=str(error))
            self._say(answer(unroutable=True))
            return
        reached("shard after issue")
        self._issued[order.encoder] = order.epoch, order.version
        kept.pop(order.version, None)  # it is large
        self._say(answer())

    # --- what leaves -------------------------------------------------------------------------------------------------

    def _say(self, report: Report) -> None:
        said = Publication(self._topology.shard, "master", encode(report), persistent=False)
        self._persist(lambda: self._broker.publish(said))

    def _persist(self, action: Callable[[], object], *, unroutable: bool = False) -> None:
        """Try until the broker takes it. Raises its last error once the service is to end, and where it is to raise
        `unroutable`, that."""
        while True:
            try:
                action()
                return
            except (BrokerUnavailable, PublishRejected, Unroutable) as error:
                if unroutable and isinstance(error, Unroutable):
                    raise
                log.warning("the broker does not take messages, trying again", problem=str(error))
                if self._clock.wait(1.0, self.ending):
                    raise BrokerUnavailable(str(error)) from None
