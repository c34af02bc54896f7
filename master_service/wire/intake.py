"""Receiving one update: its manifest is here, its chunks are fetched from the node's own queue.

The chunks are acked only after the update is in the message log, so a master that dies in between finds them again.
Those of an update that does not count are thrown away, so that they do not fill the node's queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from common.clock import Clock
from common.errors import Poison
from common.numbers.slicing import shard_slices
from common.wire.accounts import expect
from common.wire.broker import Broker, Delivery, OnDelivery, Subscription
from common.wire.codec import received
from common.wire.to_master import UpdateChunk, UpdateManifest
from common.wire.topology import Topology
from common.wire.transfer import UpdateAssembly
from master_service.wire.arriving import Arriving

#: Chunks in flight while they are thrown away.
_DISCARD_PREFETCH = 4
#: That ends when none has come for so long, or after the longer time in all, seconds.
_DISCARD_SECONDS = (0.1, 1.0)


@dataclass(frozen=True, slots=True)
class CompleteUpdate:
    """An update that is here as a whole. `deliveries` are to be acked once it is durable; the last is its manifest."""

    manifest: UpdateManifest
    arrived: Arriving
    deliveries: tuple[Delivery, ...]


class Fetching(Protocol):
    """An update that is being fetched. `announcement`: the delivery of its manifest; `overtaken`: the order of one that
    came in its place, 0 as long as none has."""

    manifest: UpdateManifest
    announcement: Delivery
    overtaken: int

    @property
    def here(self) -> int:
        """How many of its chunks have come."""

    @property
    def progress(self) -> str:
        """How much of it is here, in words."""

    def stop(self) -> None:
        """All has come: fetch nothing more. What was delivered may still be acked; then `close`."""

    def close(self) -> None:
        """Stop fetching; what was not acked goes back to its queue."""


class Intake:
    """Fetches the chunks of one manifest; what was delivered is handed to `add`, in the thread that made it.

    Chunks lie in a node's queue in the order in which it sent them. Those of a lower order than the manifest's are of
    no use any more: their own manifest came before this one. One of a higher order means that this update's are not
    there (a broker has lost them): then `overtaken` is that order, and the chunk is left where it is.
    """

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        manifest: UpdateManifest,
        delivery: Delivery,
        on_delivery: OnDelivery,
        arriving: Arriving,
        *,
        shard: int | None = None,
    ) -> None:
        """`arriving` is whoever's gets the complete update, and discarded if it does not come to that. `shard`: this
        one's part alone is fetched, from the queue for that."""
        self.manifest = manifest
        #: The delivery of the manifest.
        self.announcement = delivery
        self.overtaken = 0
        self._broker = broker
        self._topology = topology
        self._arriving: Arriving | None = arriving
        part = shard_slices(manifest.chunks, manifest.shards)[shard] if shard is not None else range(manifest.chunks)
        self._assembly = UpdateAssembly(manifest, part)
        self._taken: dict[int, Delivery] = {}
        queue = topology.chunk_queue(manifest.node, shard)
        self._subscription: Subscription = broker.consume(queue, on_delivery, prefetch=max(1, len(part)))

    def add(self, delivery: Delivery) -> CompleteUpdate | None:
        """Take one chunk; the update, once it is whole. Raises Poison; then the delivery is still to be set aside."""
        chunk = _chunk(self._topology, delivery, self.manifest.node)
        if chunk.incarnation == self.manifest.incarnation and chunk.order > self.manifest.order:
            self.overtaken = chunk.order
            return None
        slices = self._assembly.add(chunk)
        if slices is None or self._arriving is None:
            self._broker.ack(delivery)  # of a lower order, or of another incarnation, which came before
            return None
        if (before := self._taken.get(chunk.index)) is not None:
            # published twice, or given back and delivered anew: then what came before is acked without effect
            self._broker.ack(before)
        self._taken[chunk.index] = replace(delivery, body=b"")
        for body in slices:
            self._arriving.add(body)
        if not self._assembly.complete:
            return None
        arrived, self._arriving = self._arriving, None
        return CompleteUpdate(self.manifest, arrived, (*self._taken.values(), self.announcement))

    @property
    def here(self) -> int:
        """How many of its chunks have come."""
        return len(self._taken)

    @property
    def progress(self) -> str:
        """How much of it is here, in words."""
        return f"{self.here} of {self.manifest.chunks} chunks came"

    def stop(self) -> None:
        """All has come: fetch nothing more. What was delivered may still be acked; then `close`."""
        self._subscription.stop()

    def close(self) -> None:
        """Stop fetching; what was not acked goes back to its queue."""
        self._subscription.close()
        if self._arriving is not None:
            self._arriving.discard()


class Discard:
    """Throws away a node's chunks up to those of a refused update, for a short while.

    `current` gives the node's incarnation as the master knows it: of another one nothing is of use. What the node sent
    after the refused update stays where it is; its manifest is still to come.
    """

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        manifest: UpdateManifest,
        current: Callable[[str], str | None],
        clock: Clock,
        on_delivery: OnDelivery,
        *,
        shard: int | None = None,
    ) -> None:
        self.manifest = manifest
        self._current = current
        self._broker = broker
        self._topology = topology
        self._clock = clock
        self._begun = self._last = clock.monotonic()
        self._at_end = False
        queue = topology.chunk_queue(manifest.node, shard)
        self._subscription: Subscription = broker.consume(queue, on_delivery, prefetch=_DISCARD_PREFETCH)

    def add(self, delivery: Delivery) -> None:
        """Take one chunk. Raises Poison; then the delivery is still to be set aside."""
        chunk = _chunk(self._topology, delivery, self.manifest.node)
        refused = chunk.incarnation == self.manifest.incarnation and _place(chunk) <= _place(self.manifest)
        current = self._current(self.manifest.node) or self.manifest.incarnation
        if chunk.incarnation == current and not refused:
            self._at_end = True
            return
        self._last = self._clock.monotonic()
        self._broker.ack(delivery)

    def seconds_left(self) -> float:
        """Until it ends; 0 once it has come to its end."""
        if self._at_end:
            return 0.0
        quiet, most = _DISCARD_SECONDS
        return max(0.0, min(self._last + quiet, self._begun + most) - self._clock.monotonic())

    @property
    def is_cut_short(self) -> bool:
        """Whether its time was over while chunks still came."""
        return not self._at_end and self._last + _DISCARD_SECONDS[0] > self._clock.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was begun."""
        return self._clock.monotonic() - self._begun

    def close(self) -> None:
        """Stop; what was not acked goes back to its queue."""
        self._subscription.close()


def _place(sent: UpdateChunk | UpdateManifest) -> tuple[int, int, int]:
    """Where in what an incarnation sent; senders of old have no orders."""
    return sent.order, sent.sequence, sent.attempt


def _chunk(topology: Topology, delivery: Delivery, node: str) -> UpdateChunk:
    """What came through a node's chunk queue. Raises Poison."""
    expect(topology, delivery, node)
    chunk = received(delivery)
    if not isinstance(chunk, UpdateChunk):
        raise Poison("unexpected-kind", f"a {type(chunk).__name__} came through a chunk queue")
    return chunk
