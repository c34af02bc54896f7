"""What a node sends, in order: stepped by `flush_one`, which a thread of the service calls, so that training never
waits for a confirm.

An update's chunks are read from the state directory as they leave, a window at a time: what waits here is small,
however large the updates and however slow the line.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from common.crash_points import reached
from common.errors import BrokerUnavailable, PublishRejected, Unroutable
from common.numbers.slicing import shard_of, slice_bytes
from common.wire.base import Message
from common.wire.broker import Broker, Publication
from common.wire.codec import encode
from common.wire.fields import INLINE_BYTES
from common.wire.to_master import InstructionAck, UpdateManifest
from common.wire.topology import MIB, Topology
from common.wire.transfer import update_chunk

log = structlog.get_logger()

#: Payload that is encoded and unconfirmed at a time.
_WINDOW_BYTES = 16 * MIB

#: A slice of an owed update by its index; None once the update is answered.
ReadChunk = Callable[[UpdateManifest, int], bytes | None]


@dataclass
class _Update:
    """An update on its way: `sent` chunks are confirmed."""

    manifest: UpdateManifest
    sent: int = 0


class Outbox:
    """What waits to leave. Filled by one thread and flushed by one, which may be another.

    `problem` says what keeps it from leaving, and is empty while nothing does.
    """

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        node: str,
        read_chunk: ReadChunk,
        *,
        inline_bytes: int = INLINE_BYTES,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        on_leaving: Callable[..., None] | None = None,
    ) -> None:
        """`inline_bytes`: a payload that is no longer travels in its manifest. `on_leaving` is told the publications
        that are about to leave; if it raises, they do not."""
        self.problem = ""
        self._broker = broker
        self._topology = topology
        self._node = node
        self._read_chunk = read_chunk
        self._inline_bytes = inline_bytes
        self._new_id = new_id
        self._on_leaving = on_leaving
        self._waiting: deque[Publication | _Update] = deque()
        self._some = threading.Event()

    def say(self, message: Message) -> None:
        """Send a small message to the master."""
        if isinstance(message, InstructionAck):
            exchange, key = self._topology.ack, self._node
        else:
            kind = str(getattr(message, "kind", "")).removeprefix("request.")
            exchange, key = self._topology.request, f"{self._node}.{kind}"
        self._put(Publication(exchange, key, encode(message), message_id=self._new_id()))

    def update(self, manifest: UpdateManifest) -> None:
        """Send an owed update: its chunks, then, once all of them are confirmed, its manifest; a small one as one
        message."""
        self._put(_Update(manifest))

    @property
    def empty(self) -> bool:
        return not self._waiting

    def wait(self, seconds: float) -> None:
        """Wait until there is something to send, for at most so many seconds."""
        self._some.wait(seconds)

    def flush_one(self) -> bool:
        """Publish what waits first, or a window of it. False if nothing waits, or nothing can leave now; then `problem`
        says why, and it is worth trying again later.

        Raises what no waiting mends, such as AccessRefused; what waits stays.
        """
        self._some.clear()
        if not self._waiting:
            return False
        self._some.set()
        first = self._waiting[0]
        try:
            done = self._send_update(first) if isinstance(first, _Update) else self._send(first)
        except Unroutable:
            self._hindered("no master serves this namespace yet")
            return False
        except PublishRejected:
            self._hindered("the chunk queue is full until the master has caught up")
            return False
        except BrokerUnavailable as error:
            self._hindered(str(error))
            return False
        self.problem = ""
        if done:
            self._waiting.popleft()
            reached("node after send")
        return True

    def _send(self, publication: Publication) -> bool:
        self._publish(publication)
        return True

    def _send_update(self, update: _Update) -> bool:
        """The next window of chunks, or, after the last, the manifest; whether that was the manifest. A small payload
        travels in that."""
        manifest, exchange = update.manifest, self._topology.update
        if manifest.shards == 1 and manifest.size <= self._inline_bytes:
            slices = [self._read_chunk(manifest, index) for index in range(manifest.chunks)]
            here = [body for body in slices if body is not None]
            if len(here) < len(slices):
                return True  # answered meanwhile
            return self._announce(manifest.model_copy(update={"data": b"".join(here)}))
        if update.sent == manifest.chunks:
            return self._announce(manifest)
        window = max(1, _WINDOW_BYTES // slice_bytes(manifest.encoding))
        until = min(update.sent + window, manifest.chunks)
        publications = []
        for index in range(update.sent, until):
            body = self._read_chunk(manifest, index)
            if body is None:
                return True  # answered meanwhile: an attempt before this one has arrived
            chunk = update_chunk(manifest, index, body)
            # the node has it on disk until the receipt: if a restart of the broker empties the queue, it is sent again
            key = self._topology.chunk_key(self._node, shard_of(index, manifest.chunks, manifest.shards))
            publications.append(Publication(exchange, key, encode(chunk), persistent=False))
        self._publish(*publications)
        update.sent = until
        return False

    def _announce(self, manifest: UpdateManifest) -> bool:
        key, delivery_id = f"{self._node}.ready", f"{manifest.update_id}/{manifest.attempt}"
        return self._send(Publication(self._topology.update, key, encode(manifest), message_id=delivery_id))

    def _publish(self, *publications: Publication) -> None:
        if self._on_leaving is not None:
            self._on_leaving(*publications)
        self._broker.publish(*publications)

    def _put(self, item: Publication | _Update) -> None:
        self._waiting.append(item)
        self._some.set()

    def _hindered(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("cannot send yet, trying again", node=self._node, problem=problem)
        self.problem = problem
