"""Updates on their way to the master: manifests wait in order, and one update at a time is fetched, whoever sent it.

What to do with one is decided by whoever asks here: this only says whose turn it is, and what has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from common.clock import Clock
from common.wire.broker import Broker, Delivery, OnDelivery
from common.wire.messages import UpdateChunk, UpdateManifest
from common.wire.topology import Topology
from master_service.wire.intake import Attempt, CompleteUpdate, Intake


class Updates:
    """The master's queue of manifests and the intake of the first. All in one thread, but for `on_delivery`, which the
    broker calls in one of its own."""

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        *,
        patience: float,
        clock: Clock,
        on_delivery: OnDelivery,
        is_done: Callable[[UpdateChunk], bool],
    ) -> None:
        """`patience`: seconds without a further chunk after which a node is asked to send its update again. `is_done`:
        whether the update of a chunk is answered, or not of a member."""
        self._broker = broker
        self._topology = topology
        self._patience = patience
        self._clock = clock
        self._on_delivery = on_delivery
        self._answered = is_done
        self._manifests: deque[tuple[UpdateManifest, Delivery]] = deque()
        self._intake: Intake | None = None
        #: By node: chunks that the last intake in vain has passed by.
        self._passed: dict[str, set[Attempt]] = {}

    def announced(self, manifest: UpdateManifest, delivery: Delivery) -> None:
        """A manifest has come; its turn comes after those before it."""
        self._manifests.append((manifest, delivery))

    def turn(self) -> UpdateManifest | None:
        """The manifest whose turn it is, if nothing is fetched."""
        return self._manifests[0][0] if self._manifests and self._intake is None else None

    def fetch(self, *, wanted: bool) -> None:
        """Begin to fetch the update whose turn it is; not `wanted`: to throw it away."""
        manifest, delivery = self._manifests.popleft()
        self._intake = Intake(
            self._broker,
            self._topology,
            manifest,
            delivery,
            wanted=wanted,
            patience=self._patience,
            clock=self._clock,
            on_delivery=self._on_delivery,
            is_done=self._is_done,
        )

    @property
    def intake(self) -> Intake | None:
        """What is fetched now."""
        return self._intake

    def is_chunk(self, delivery: Delivery) -> bool:
        """Whether a delivery is a chunk of the node whose update is fetched now."""
        return self._intake is not None and self._intake.is_for(delivery)

    def add(self, delivery: Delivery) -> CompleteUpdate | None:
        """Take such a chunk; the update, once it is whole. Raises Poison."""
        return self._intake.add(delivery) if self._intake is not None else None

    def seconds_left(self) -> float:
        """Until chunks are missed; infinite while none are waited for."""
        return self._intake.seconds_left() if self._intake is not None else float("inf")

    def overdue(self) -> Intake | None:
        """The intake whose chunks are missed."""
        return self._intake if self.seconds_left() <= 0 else None

    def done(self) -> None:
        """What was fetched is dealt with."""
        if (intake := self._intake) is not None:
            intake.close()
            self._intake = None

    def gave_up(self) -> None:
        """What was fetched is asked for again."""
        if (intake := self._intake) is not None:
            self._passed[intake.manifest.node] = intake.passed
            self.done()

    def _is_done(self, chunk: UpdateChunk) -> bool:
        """Whether a chunk of a lower number is of no use: its update is answered, or an intake before this one had to
        pass it by already, so that its manifest should have come."""
        passed = (chunk.incarnation, chunk.sequence, chunk.attempt) in self._passed.get(chunk.node, set())
        return passed or self._answered(chunk)
