"""Updates on their way to the master: manifests wait in order, and one update at a time is fetched, whoever sent it.

What to do with one is decided by whoever asks here: this only says whose turn it is, and what has come.
"""

from __future__ import annotations

from collections import deque

from common.clock import Clock
from common.wire.broker import Broker, Delivery, OnDelivery
from common.wire.messages import UpdateManifest
from common.wire.topology import Topology
from master_service.wire.intake import CompleteUpdate, Intake


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
    ) -> None:
        """`patience`: seconds without a further chunk after which a node is asked to send its update again."""
        self._broker = broker
        self._topology = topology
        self._patience = patience
        self._clock = clock
        self._on_delivery = on_delivery
        self._manifests: deque[tuple[UpdateManifest, Delivery]] = deque()
        self._intake: Intake | None = None

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
        """Seconds until missing chunks are overdue; infinite while no update is fetched."""
        return self._intake.seconds_left() if self._intake is not None else float("inf")

    def in_vain(self) -> Intake | None:
        """The intake, if there is no use in waiting for it: its chunks are overdue, or overtaken; else None."""
        intake = self._intake
        return intake if intake is not None and (intake.overtaken or intake.seconds_left() <= 0) else None

    def done(self) -> None:
        """What was fetched is dealt with."""
        if (intake := self._intake) is not None:
            intake.close()
            self._intake = None
