"""Updates on their way into the log: manifests wait in order, and one update at a time is fetched, whoever sent it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from common.crash_points import reached
from common.errors import Poison
from common.wire.broker import Broker, Delivery, OnDelivery
from common.wire.messages import UpdateChunk, UpdateManifest
from common.wire.topology import Topology
from master_service.arithmetic.aggregator import measure
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.messages_out import resend
from master_service.decisions.records import UpdateFacts
from master_service.history.state_directory import Journal
from master_service.wire.intake import Intake
from master_service.wire.publisher import Publisher

log = structlog.get_logger()

#: An update that does not count is answered at once; its chunks, which were there before its manifest, are thrown away
#: until none has come for so long, or for the longer time in all: what else a node sends must not hold up the others.
#: What is left is thrown away with those of the node's next update that counts.
_DISCARD_SECONDS = (0.1, 1.0)


class RecordUpdate(Protocol):
    """Append an update to the log, with its payload if that was fetched; fold, and carry out what follows."""

    def __call__(
        self,
        body: UpdateManifest,
        *,
        message_id: str,
        delivery: str,
        facts: UpdateFacts | None = None,
        payload: str | None = None,
    ) -> None: ...


class Updates:
    """The master's queue of manifests and the intake of the first.

    All in the service's thread, but for `on_delivery`, which the broker calls in one of its own.
    """

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        journal: Journal,
        coordinator: Coordinator,
        publisher: Publisher,
        *,
        patience: float,
        record: RecordUpdate,
        on_delivery: OnDelivery,
        on_poison: Callable[[Delivery, Poison], None],
    ) -> None:
        """`patience`: seconds without a whole update after which its node is asked to send it again."""
        self.intake: Intake | None = None
        self._broker = broker
        self._topology = topology
        self._journal = journal
        self._coordinator = coordinator
        self._publisher = publisher
        self._patience = patience
        self._record = record
        self._on_delivery = on_delivery
        self._on_poison = on_poison
        self._manifests: deque[tuple[UpdateManifest, Delivery]] = deque()
        #: By node: chunks that the last intake in vain has passed by.
        self._passed: dict[str, set[tuple[str, int, int]]] = {}

    def announced(self, manifest: UpdateManifest, delivery: Delivery) -> None:
        """A manifest has come; its turn comes after those before it."""
        self._manifests.append((manifest, delivery))
        self._next()

    def took(self, delivery: Delivery) -> bool:
        """Whether a delivery is a chunk of the node whose update is fetched now; then it is taken."""
        intake = self.intake
        if intake is None or delivery.queue != self._topology.chunk_queue(intake.manifest.node):
            return False
        if intake.add(delivery):
            self._take(intake)
        elif not intake.wanted:
            intake.deadline = min(time.monotonic() + _DISCARD_SECONDS[0], intake.begun + _DISCARD_SECONDS[1])
        return True

    def seconds_left(self) -> float:
        """Until chunks are missed; infinite while none are waited for."""
        return max(0.0, self.intake.deadline - time.monotonic()) if self.intake is not None else float("inf")

    def look(self) -> None:
        """Give up waiting for chunks that are overdue: of an update that does not count they are not missed; of another
        the node has them still."""
        intake = self.intake
        if intake is None or time.monotonic() <= intake.deadline:
            return
        if intake.wanted:
            self.ask_again(intake)
        else:
            self._take(intake)

    def ask_again(self, intake: Intake) -> None:
        """The node sends the chunks again as another attempt."""
        manifest = intake.manifest
        log.warning("chunks missing, asking the node to send again", update=manifest.update_id)
        self._passed[manifest.node] = intake.passed
        self._publisher.send(manifest.node, resend(manifest.encoder, manifest))
        self._broker.ack(intake.delivery)
        self._end(intake)

    def close(self) -> None:
        """Give back what was fetched and not recorded."""
        if self.intake is not None:
            self.intake.close()

    def _next(self) -> None:
        """Begin with the next update, if none is being fetched. One that does not count is answered here."""
        if self.intake is not None or not self._manifests:
            return
        manifest, delivery = self._manifests.popleft()
        # one that kills the master is not fetched any more, and is refused for want of its payload
        deadly = self._journal.attempts.fatal(_work(manifest))
        wanted = not deadly and self._coordinator.wants_payload(manifest)
        if not wanted:
            self._record(manifest, message_id=_delivery_id(manifest), delivery=_work(manifest))
        self.intake = Intake(
            self._broker,
            self._topology,
            manifest,
            delivery,
            wanted=wanted,
            begun=time.monotonic(),
            patience=self._patience if wanted else _DISCARD_SECONDS[0],
            on_delivery=self._on_delivery,
            on_poison=self._on_poison,
            is_done=self._is_done,
        )

    def _take(self, intake: Intake) -> None:
        """All chunks are here: make the update durable, then decide on it, then remove it from the broker."""
        manifest = intake.manifest
        if intake.wanted:
            if self._coordinator.wants_payload(manifest) and self._is_spent(_delivery_id(manifest)):
                self.ask_again(intake)
                return
            payload = intake.payload()
            size = self._coordinator.state.encoders[manifest.encoder].size
            with self._journal.attempts.at(_work(manifest)):
                finite, norm = measure(payload, size, manifest.encoding)
            digest = self._journal.write_payload(payload)
            facts = UpdateFacts(digest=digest, size=len(payload), finite=finite, norm=norm)
            self._record(
                manifest, message_id=_delivery_id(manifest), facts=facts, payload=digest, delivery=_work(manifest)
            )
        reached("before ack of an update")
        intake.settle()
        reached("after ack of an update")
        self._end(intake)

    def _is_done(self, chunk: UpdateChunk) -> bool:
        """Whether a chunk of a lower number is of no use: its update is answered, or an intake before this one had to
        pass it by already, so that its manifest should have come."""
        passed = (chunk.incarnation, chunk.sequence, chunk.attempt) in self._passed.get(chunk.node, set())
        return passed or self._coordinator.is_done(chunk)

    def _is_spent(self, delivery_id: str) -> bool:
        """Whether this very delivery is in the log to no effect: its node was not known then, or its payload was lost.
        One that was skipped is not asked for again; it is refused."""
        entry = self._journal.log.find(delivery_id)
        return entry is not None and not entry.skipped

    def _end(self, intake: Intake) -> None:
        intake.close()
        self.intake = None
        self._next()


def _delivery_id(manifest: UpdateManifest) -> str:
    return f"{manifest.update_id}/{manifest.attempt}"


def _work(manifest: UpdateManifest) -> str:
    """What the work on an update is known by, however often it is sent."""
    return f"update {manifest.update_id}"
