"""Receiving one update: its manifest is here, its chunks are fetched from the node's own queue.

One manifest at a time, so that one update is in memory whatever the number of nodes; the rest waits in the broker. The
chunks are acked only after the update is in the message log, so a master that dies in between finds them again.
"""

from __future__ import annotations

from collections.abc import Callable

from common.broker import Broker, Delivery, OnDelivery, Subscription
from common.codec import decode
from common.errors import Poison
from common.messages import UpdateChunk, UpdateManifest
from common.topology import Topology
from common.transfer import UpdateAssembly

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
        deadline: float,
        on_delivery: OnDelivery,
        on_poison: Callable[[Delivery, Poison], None],
    ) -> None:
        self.manifest = manifest
        self.delivery = delivery
        self.wanted = wanted
        self.deadline = deadline
        self._broker = broker
        self._on_poison = on_poison
        self._assembly = UpdateAssembly(manifest, keep=wanted)
        self._taken: list[Delivery] = []
        self._newer: list[Delivery] = []
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
            self._taken.append(delivery)
        elif taken or self._is_older(chunk):
            self._broker.ack(delivery)
        else:
            self._newer.append(delivery)
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
        self._broker.ack(*self._taken, self.delivery)

    def close(self) -> None:
        """Stop fetching; what was not acked goes back to its queue."""
        self._subscription.close()

    def _is_older(self, chunk: UpdateChunk) -> bool:
        wanted = self.manifest
        if chunk.incarnation != wanted.incarnation:
            # a wanted update is of the node's current incarnation; a queue is FIFO, so another one came before
            return self.wanted
        return (chunk.sequence, chunk.attempt) < (wanted.sequence, wanted.attempt)
