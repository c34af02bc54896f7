"""Receiving one update: its manifest is here, its chunks are fetched from the node's own queue.

One manifest at a time, so that one update is in memory whatever the number of nodes; the rest waits in the broker. The
chunks are acked only after the update is in the message log, so a master that dies in between finds them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.clock import Clock
from common.errors import Poison
from common.numbers.slicing import slice_bytes
from common.wire.broker import Broker, Delivery, OnDelivery, Subscription
from common.wire.codec import decode
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

#: Of an update's chunks: node's incarnation, sequence, attempt.
Attempt = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class CompleteUpdate:
    """An update that is wholly here. `deliveries` are to be acked once it is durable."""

    manifest: UpdateManifest
    payload: bytes
    deliveries: tuple[Delivery, ...]


class Intake:
    """Fetches the chunks of one manifest; what was delivered is handed to `add`, in the thread that made it.

    Of an update that is refused anyway (`wanted` False) the chunks are fetched too, and thrown away: left where they
    are, they would fill the node's queue. `is_done` tells whether a chunk of a lower number is of no use to anybody.
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
        is_done: Callable[[UpdateChunk], bool],
    ) -> None:
        """`patience`: seconds without a further chunk after which the update counts as overdue."""
        self.manifest = manifest
        self.wanted = wanted
        #: The delivery of the manifest.
        self.announcement = delivery
        self.passed: set[Attempt] = set()
        self._broker = broker
        self._clock = clock
        self._is_done = is_done
        # on a slow line one chunk alone takes a while
        chunk_seconds = min(manifest.size, slice_bytes(manifest.encoding)) / SLOW_LINE
        self._patience = patience + chunk_seconds if wanted else _DISCARD_SECONDS[0]
        self._begun = clock.monotonic()
        self._deadline = self._begun + self._patience
        self._assembly = UpdateAssembly(manifest, keep=wanted)
        self._taken: dict[int, Delivery] = {}
        self._newer: list[Delivery] = []
        self._prefetch = manifest.chunks if wanted else _DISCARD_PREFETCH
        self._queue = topology.chunk_queue(manifest.node)
        self._subscription: Subscription = broker.consume(self._queue, on_delivery, prefetch=self._prefetch)

    def is_for(self, delivery: Delivery) -> bool:
        """Whether a delivery is a chunk of the node whose update is fetched here."""
        return delivery.queue == self._queue

    def add(self, delivery: Delivery) -> CompleteUpdate | None:
        """Take one chunk; the update, once it is whole. What is older is discarded, what is newer is left, unless it
        takes the place of what is wanted: a node that was restored from a backup may have begun with higher numbers.

        Raises Poison; then the delivery is still to be set aside.
        """
        chunk = decode(delivery.body)
        if not isinstance(chunk, UpdateChunk):
            raise Poison("unexpected-kind", f"a {type(chunk).__name__} came through a chunk queue")
        taken = self._assembly.add(chunk)
        if not self.wanted:
            self._deadline = min(self._clock.monotonic() + _DISCARD_SECONDS[0], self._begun + _DISCARD_SECONDS[1])
        if taken and self.wanted:
            if chunk.index in self._taken:
                self._broker.ack(self._taken[chunk.index])  # published twice: it would take the place of another
            else:
                self._deadline = self._clock.monotonic() + self._patience
            self._taken[chunk.index] = delivery
        elif taken or self._is_older(chunk):
            self._broker.ack(delivery)
        elif chunk.sequence >= self.manifest.sequence:
            self._newer.append(delivery)
        else:
            self.passed.add((chunk.incarnation, chunk.sequence, chunk.attempt))
        if not self._assembly.complete and len(self._taken) + len(self._newer) >= self._prefetch:
            # should their manifest come, they will be missed and asked for again
            self._broker.ack(*self._newer)
            self._newer = []
        return self.update() if self._assembly.complete else None

    def update(self) -> CompleteUpdate:
        """What is here of it: of an update that is not wanted no payload."""
        payload = self._assembly.payload() if self.wanted else b""
        return CompleteUpdate(self.manifest, payload, (*self._taken.values(), self.announcement))

    def seconds_left(self) -> float:
        """Until chunks are missed."""
        return max(0.0, self._deadline - self._clock.monotonic())

    @property
    def progress(self) -> str:
        """How much of it is here, in words."""
        return f"{len(self._taken)} of {self.manifest.chunks} chunks came"

    def close(self) -> None:
        """Stop fetching; what was not acked goes back to its queue."""
        self._subscription.close()

    def _is_older(self, chunk: UpdateChunk) -> bool:
        wanted = self.manifest
        if chunk.incarnation != wanted.incarnation:
            # a wanted update is of the node's current incarnation, so another one came before; what a broker that dies
            # puts into another order is missed here, and asked for again
            return self.wanted
        if chunk.sequence == wanted.sequence:
            return chunk.attempt < wanted.attempt
        # of a lower number that was asked for again, the manifest is on its way
        return chunk.sequence < wanted.sequence and self._is_done(chunk)
