"""Receiving one update: its manifest is here, its chunks are fetched from the node's own queue.

One manifest at a time, so that one update is in memory whatever the number of nodes; the rest waits in the broker. The
chunks are acked only after the update is in the message log, so a master that dies in between finds them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.clock import Clock
from common.errors import Poison
from common.numbers.slicing import slice_bytes
from common.wire.accounts import expect
from common.wire.broker import Broker, Delivery, OnDelivery, Subscription
from common.wire.codec import received
from common.wire.messages import UpdateChunk, UpdateManifest
from common.wire.topology import Topology
from common.wire.transfer import UpdateAssembly
from common.wire.versions import SLOW_LINE

#: Chunks in flight while an update is thrown away.
_DISCARD_PREFETCH = 4
#: An update that does not count is answered at once; its chunks, which were there before its manifest, are thrown away
#: until none has come for so long, or for the longer time in all: what else a node sends must not hold up the others.
#: What is left is thrown away with those of the node's next update that counts.
_DISCARD_SECONDS = (0.1, 1.0)


@dataclass(frozen=True, slots=True)
class CompleteUpdate:
    """An update whose chunks are all here. `deliveries` are to be acked once it is durable."""

    manifest: UpdateManifest
    payload: bytes
    deliveries: tuple[Delivery, ...]


class Intake:
    """Fetches the chunks of one manifest; what was delivered is handed to `add`, in the thread that made it.

    Chunks lie in a node's queue in the order in which it sent them. Those of a lower order than the manifest's are of
    no use any more: their own manifest came before this one. One of a higher order means that this update's are not
    there (a broker has lost them): then `overtaken` is that order, and the chunk is left where it is.

    Of an update that is refused anyway (`wanted` False) the chunks are fetched too, and thrown away: left where they
    are, they would fill the node's queue.
    """

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        manifest: UpdateManifest,
        delivery: Delivery,
        *,
        wanted: bool,
        patience: float,
        clock: Clock,
        on_delivery: OnDelivery,
    ) -> None:
        """`patience`: seconds without a further chunk after which the update counts as overdue."""
        self.manifest = manifest
        self.wanted = wanted
        #: The delivery of the manifest.
        self.announcement = delivery
        self.overtaken = 0
        self._broker = broker
        self._topology = topology
        self._clock = clock
        # on a slow line one chunk alone takes a while
        chunk_seconds = min(manifest.size, slice_bytes(manifest.encoding)) / SLOW_LINE
        self._patience = patience + chunk_seconds if wanted else _DISCARD_SECONDS[0]
        self._begun = clock.monotonic()
        self._deadline = self._begun + self._patience
        self._assembly = UpdateAssembly(manifest, keep=wanted)
        self._taken: dict[int, Delivery] = {}
        self._queue = topology.chunk_queue(manifest.node)
        prefetch = manifest.chunks if wanted else _DISCARD_PREFETCH
        self._subscription: Subscription = broker.consume(self._queue, on_delivery, prefetch=prefetch)

    def is_for(self, delivery: Delivery) -> bool:
        """Whether a delivery is a chunk of the node whose update is fetched here."""
        return delivery.queue == self._queue

    def add(self, delivery: Delivery) -> CompleteUpdate | None:
        """Take one chunk; the update, once it is whole. Raises Poison; then the delivery is still to be set aside."""
        expect(self._topology, delivery, self.manifest.node)
        chunk = received(delivery)
        if not isinstance(chunk, UpdateChunk):
            raise Poison("unexpected-kind", f"a {type(chunk).__name__} came through a chunk queue")
        if chunk.incarnation == self.manifest.incarnation and chunk.order > self.manifest.order:
            self.overtaken = chunk.order
            return None
        taken = self._assembly.add(chunk)
        if not self.wanted:
            self._deadline = min(self._clock.monotonic() + _DISCARD_SECONDS[0], self._begun + _DISCARD_SECONDS[1])
        if not (taken and self.wanted):
            # of a lower order, of another incarnation, which came before, or of an update that does not count
            self._broker.ack(delivery)
        elif chunk.index in self._taken:
            self._broker.ack(delivery)  # published twice
        else:
            self._deadline = self._clock.monotonic() + self._patience
            self._taken[chunk.index] = delivery
        return self.update() if self._assembly.complete else None

    def update(self) -> CompleteUpdate:
        """The update as far as it is here; without payload if it is not wanted."""
        payload = self._assembly.payload() if self.wanted else b""
        return CompleteUpdate(self.manifest, payload, (*self._taken.values(), self.announcement))

    def seconds_left(self) -> float:
        """Seconds until its missing chunks are overdue."""
        return max(0.0, self._deadline - self._clock.monotonic())

    @property
    def progress(self) -> str:
        """How much of it is here, in words."""
        return f"{len(self._taken)} of {self.manifest.chunks} chunks came"

    def close(self) -> None:
        """Stop fetching; what was not acked goes back to its queue."""
        self._subscription.close()
