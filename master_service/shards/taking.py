"""The updates of nodes at one aggregator: its part of each is fetched, measured and kept; chunks of what does not count
are thrown away. Stepped by hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext

import structlog

from common.clock import Clock
from common.crash_points import reached
from common.numbers.slicing import encoded_size, shard_slices, slice_length
from common.wire.broker import Broker, Delivery, OnDelivery
from common.wire.to_master import UpdateManifest
from common.wire.topology import Topology
from master_service.arithmetic.measuring import Measurement, scratch
from master_service.log.deadly import Attempts
from master_service.shards.holding import part_of
from master_service.shards.store import ShardStore, Taken
from master_service.wire import intake, orders
from master_service.wire.arriving import Arrived
from master_service.wire.orders import Arriving, Report

log = structlog.get_logger()

#: How often it is told how far an update is, seconds.
_TOLD_SECONDS = 1.0
#: After an update's chunks were thrown away for some time, for so many times as long none are.
_DISCARD_PAUSE = 4.0


class _Fetched:
    """An update whose part, these of its chunks, is being fetched."""

    def __init__(self, fetched: intake.Intake, part: Arrived, measuring: Measurement, chunks: range) -> None:
        self.fetched, self.part, self.measuring, self.chunks = fetched, part, measuring, chunks
        self.told_at = float("-inf")


class Taking:
    """What aggregator `number` of `shards` takes of nodes' updates."""

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
        on_delivery: OnDelivery,
        say: Callable[[Report], None],
    ) -> None:
        """`say` tells the master; `attempts`: what this process works on, in case that kills it."""
        self._number, self._shards = number, shards
        self._broker = broker
        self._topology = topology
        self._store = store
        self._attempts = attempts
        self._clock = clock
        self._on_delivery = on_delivery
        self._say = say
        self._room = scratch()
        #: By node.
        self._taking: dict[str, _Fetched] = {}
        #: By node: the newest update whose chunks are of no use, and its incarnation; what is thrown away now, and when
        #: the next may be.
        self._refused: OrderedDict[str, tuple[UpdateManifest, str]] = OrderedDict()
        self._discarding: intake.Discard | None = None
        self._discarded: tuple[UpdateManifest, str]
        self._discard_at = 0.0

    def hear(self, delivery: Delivery) -> None:
        """A chunk. What is not fetched any more went back to its queue. Raises Poison."""
        taking = next((each for each in self._taking.values() if self._queue(each) == delivery.queue), None)
        if taking is not None:
            self._add(taking, delivery)
        elif (discarding := self._discarding) is not None and delivery.queue == self._queue(discarding):
            discarding.add(delivery)

    def look(self) -> float:
        """Do what time has made due; gives the seconds until this is wanted again."""
        if self._discarding is not None and self._discarding.seconds_left() <= 0:
            self._end_discard()
        if self._discarding is None and self._clock.monotonic() >= self._discard_at:
            self._discard_next()
        return self._discarding.seconds_left() + 0.001 if self._discarding is not None else float("inf")

    def close(self) -> None:
        """Give back what was fetched and is not whole."""
        for taking in self._taking.values():
            taking.fetched.close()
        if self._discarding is not None:
            self._discarding.close()

    def take(self, manifest: UpdateManifest, delivery: Delivery) -> None:
        """Fetch the part of an update; the order for it is acked once it is here. Raises OSError for want of room."""
        taken = self._store.taken(manifest.update_id)
        if taken is not None and taken.claimed == manifest.digest and not self._store.payloads.damage(taken.part):
            self.throw_away(manifest, manifest.incarnation)  # it was sent once more
            self._tell_taken(manifest, taken)
            self._broker.ack(delivery)
            return
        if (taking := self._taking.get(manifest.node)) is not None:
            same = taking.fetched.manifest
            if (same.update_id, same.attempt) == (manifest.update_id, manifest.attempt):
                self._broker.ack(taking.fetched.announcement)
                taking.fetched.announcement = delivery
                self._tell_progress(taking)
                return
            self.leave(manifest.node)
        if self._discarding is not None and self._discarding.manifest.node == manifest.node:
            self._end_discard()
        self._refused.pop(manifest.node, None)  # an intake throws away what was sent before its own
        if self._attempts.fatal(manifest.update_id):
            log.error("an update has killed this aggregator twice; it is given up", update=manifest.update_id)
            self._give_up(manifest)
            self._broker.ack(delivery)
            return
        begun = next((each for each in self._store.encoders() if each.encoder == manifest.encoder), None)
        if begun is None:  # of a master whose log this one is not of
            log.error("an update of an encoder that was not begun here", update=manifest.update_id)
            self._broker.ack(delivery)
            return
        part = part_of(begun.size, self._number, self._shards)
        lengths = [slice_length(begun.size, index) for index in part]
        size = sum(encoded_size(length, manifest.encoding) for length in lengths)
        measuring = Measurement(sum(lengths), manifest.encoding, self._room)
        incoming = self._store.payloads.receive(size)
        # what kills is marked around all that is done with a chunk
        arriving = Arrived(incoming, measuring, keep=lambda whole: whole.keep(), marked=nullcontext)
        fetched = intake.Intake(
            self._broker, self._topology, manifest, delivery, self._on_delivery, arriving, shard=self._number
        )
        taking = self._taking[manifest.node] = _Fetched(fetched, arriving, measuring, part)
        if not part:
            self._complete(taking, (delivery,))

    def _add(self, taking: _Fetched, delivery: Delivery) -> None:
        with self._attempts.at(taking.fetched.manifest.update_id):
            update = taking.fetched.add(delivery)
        if update is not None:
            self._complete(taking, update.deliveries)
        elif taking.fetched.overtaken or self._clock.monotonic() - taking.told_at >= _TOLD_SECONDS:
            self._tell_progress(taking)

    def _complete(self, taking: _Fetched, deliveries: tuple[Delivery, ...]) -> None:
        """All of the part is here: durable, then told, then acked."""
        manifest, part = taking.fetched.manifest, taking.part
        del self._taking[manifest.node]
        taking.fetched.stop()
        facts = part.kept()
        fits = taking.measuring.complete or not len(taking.chunks)
        squares = orders.packed(taking.measuring.squares)
        taken = Taken(manifest.digest, facts.digest, facts.size, fits, squares)
        reached("shard before taken")
        self._store.take(manifest.update_id, taken)
        reached("shard after take")
        self._tell_taken(manifest, taken)
        self._broker.ack(*deliveries)
        reached("shard after ack")
        taking.fetched.close()

    def _give_up(self, manifest: UpdateManifest) -> None:
        """Nothing is taken of an update: what is told of it fits no manifest."""
        empty = self._store.payloads.receive(0)
        taken = Taken(manifest.digest, empty.keep(), 0, False, b"")
        self._store.take(manifest.update_id, taken)
        self.throw_away(manifest, manifest.incarnation)
        self._tell_taken(manifest, taken)

    def leave(self, node: str) -> None:
        """What is fetched of a node is not wanted."""
        if (taking := self._taking.pop(node, None)) is not None:
            taking.fetched.close()
            self._broker.ack(taking.fetched.announcement)

    def _tell_progress(self, taking: _Fetched) -> None:
        taking.told_at = self._clock.monotonic()
        manifest, fetched = taking.fetched.manifest, taking.fetched
        self._say(self._arriving(manifest, here=fetched.here, overtaken=fetched.overtaken))

    def _tell_taken(self, manifest: UpdateManifest, taken: Taken) -> None:
        here = len(shard_slices(manifest.chunks, self._shards)[self._number])
        self._say(
            self._arriving(
                manifest, here=here, digest=taken.part, size=taken.size, fits=taken.fits, squares=taken.squares
            )
        )

    def _arriving(self, manifest: UpdateManifest, **fields: object) -> Arriving:
        return Arriving.model_validate(
            {
                "shard": self._number,
                "node": manifest.node,
                "update": manifest.update_id,
                "attempt": manifest.attempt,
                **fields,
            }
        )

    def _discard_next(self) -> None:
        node = next((node for node in self._refused if node not in self._taking), None)
        if node is None:
            return
        self._discarded = manifest, incarnation = self._refused.pop(node)
        self._discarding = intake.Discard(
            self._broker,
            self._topology,
            manifest,
            lambda _: incarnation,
            self._clock,
            self._on_delivery,
            shard=self._number,
        )

    def throw_away(self, manifest: UpdateManifest, incarnation: str) -> None:
        """An update's chunks, and those before them, when there is time for it."""
        self._refused.pop(manifest.node, None)
        self._refused[manifest.node] = manifest, incarnation

    def _end_discard(self) -> None:
        discarding, self._discarding = self._discarding, None
        if discarding is None:
            return
        discarding.close()
        self._discard_at = self._clock.monotonic() + _DISCARD_PAUSE * discarding.seconds
        if discarding.is_cut_short:  # there is more, for its next turn
            self._refused.setdefault(discarding.manifest.node, self._discarded)

    def _queue(self, of: _Fetched | intake.Discard) -> str:
        manifest = of.fetched.manifest if isinstance(of, _Fetched) else of.manifest
        return self._topology.chunk_queue(manifest.node, self._number)
