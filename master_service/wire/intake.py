"""Receiving one update: its manifest is here, its chunks are fetched from the node's own queue.

One manifest at a time, so that one update is in memory whatever the number of nodes; the rest waits in the broker. The
chunks are acked only after the update is in the message log, so a master that dies in between finds them again.
"""

from __future__ import annotations

from collections.abc import Callable

from common.errors import Poison
from common.wire.broker import Broker, Delivery, OnDelivery, Subscription
from common.wire.codec import decode
from common.wire.messages import UpdateChunk, UpdateManifest
from common.wire.topology import Topology
from common.wire.transfer import UpdateAssembly

#: Chunks in flight while an update is thrown away.
_DISCARD_PREFETCH = 4


class Intake:
    """Fetches the chunks of one manifest; the service's thread hands what was delivered to `add`.

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
        begun: float,
        patience: float,
        on_delivery: OnDelivery,
        on_poison: Callable[[Delivery, Poison], None],
        is_done: Callable[[UpdateChunk], bool],
    ) -> None:
        self.manifest = manifest
        self.delivery = delivery
        self.wanted = wanted
        self.begun = begun
        self.deadline = begun + patience
        self._broker = broker
        self._on_poison = on_poison
        self._is_done = is_done
        self._assembly = UpdateAssembly(manifest, keep=wanted)
        self._taken: dict[int, Delivery] = {}
        self._newer: list[Delivery] = []
        self.passed: set[tuple[str, int, int]] = set()
        self._prefetch = manifest.chunks if wanted else _DISCARD_PREFETCH
        self._subscription: Subscription = broker.consume(
            topology.chunk_queue(manifest.node), on_delivery, prefetch=self._prefetch
        )

    def add(self, delivery: Delivery) -> bool:
        """Take one chunk; True once the update is whole. What is older is discarded, what is newer is left, unless it
        takes the place of what is wanted: a node that was restored from a backup may have begun with higher numbers."""
        try:
            chunk = decode(delivery.body)
            if not isinstance(chunk, UpdateChunk):
                raise Poison("unexpected-kind", f"a {type(chunk).__name__} came through a chunk queue")
            taken = self._assembly.add(chunk)
        except Poison as poison:
            self._on_poison(delivery, poison)
            return False
        if taken and self.wanted:
            if chunk.index in self._taken:
                self._broker.ack(self._taken[chunk.index])  # published twice: it would take the place of another
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
        return self._assembly.complete

    def payload(self) -> bytes:
        """The whole encoded update."""
        return self._assembly.payload()

    def settle(self) -> None:
        """The update is durable: remove it from the broker."""
        self._broker.ack(*self._taken.values(), self.delivery)

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
