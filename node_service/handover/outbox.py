"""What a node sends leaves on a thread of its own, so that training never waits for a confirm.

In order, one batch at a time, and each batch until the broker has it: a broker that is away, full or without a master
is waited for.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Sequence

import structlog

from common.errors import BrokerUnavailable, PublishRejected, Unroutable
from common.wire.broker import Broker, Publication
from common.wire.codec import encode
from common.wire.messages import InstructionAck, Message, UpdateManifest
from common.wire.topology import Topology
from common.wire.transfer import update_chunks

log = structlog.get_logger()

_RETRY_SECONDS = 1.0


class Outbox:
    """A queue of batches and the thread that publishes them."""

    def __init__(self, broker: Broker, topology: Topology, node: str) -> None:
        self._broker = broker
        self._topology = topology
        self._node = node
        self._batches: queue.SimpleQueue[list[Publication] | None] = queue.SimpleQueue()
        self._abandon = threading.Event()
        self.problem = ""
        self._thread = threading.Thread(target=self._work, name=f"outbox-{node}", daemon=True)
        self._thread.start()

    def say(self, message: Message) -> None:
        """Send a small message to the master."""
        if isinstance(message, InstructionAck):
            exchange, key = self._topology.ack, self._node
        else:
            kind = str(getattr(message, "kind", "")).removeprefix("request.")
            exchange, key = self._topology.request, f"{self._node}.{kind}"
        self._batches.put([Publication(exchange, key, encode(message), message_id=uuid.uuid4().hex)])

    def update(self, manifest: UpdateManifest, bodies: Sequence[bytes]) -> None:
        """Send an update: its chunks, then, once all of them are confirmed, its manifest."""
        exchange = self._topology.update
        chunks = update_chunks(manifest, bodies)
        self._batches.put([Publication(exchange, f"{self._node}.chunk", encode(chunk)) for chunk in chunks])
        delivery_id = f"{manifest.update_id}/{manifest.attempt}"
        self._batches.put([Publication(exchange, f"{self._node}.ready", encode(manifest), message_id=delivery_id)])

    def close(self, timeout: float) -> bool:
        """Send what waits, for at most `timeout` seconds; whether all of it left."""
        self._batches.put(None)
        self._thread.join(timeout)
        left = not self._thread.is_alive()
        self._abandon.set()
        return left

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            while not self._abandon.is_set():
                try:
                    self._broker.publish(*batch)
                    self.problem = ""
                    break
                except Unroutable:
                    self._wait("no master serves this namespace yet")
                except PublishRejected:
                    self._wait("the chunk queue is full until the master has caught up")
                except BrokerUnavailable as error:
                    self._wait(str(error))

    def _wait(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("cannot send yet, trying again", node=self._node, problem=problem)
        self.problem = problem
        self._abandon.wait(_RETRY_SECONDS)
