"""What may come to the master: decoded, from whom it says it is, and where it belongs. Pure."""

from __future__ import annotations

import hashlib

from common.errors import Poison
from common.wire.broker import Delivery
from common.wire.codec import received
from common.wire.messages import Message, UpdateChunk
from common.wire.topology import Topology

#: Kinds that a node or an observer may send to the master's inbox.
_INBOX = (
    "request.join",
    "request.get",
    "request.update",
    "request.fetch",
    "request.assets",
    "request.words",
    "request.finished",
    "request.leave",
    "request.stop",
    "ack",
    "request.alive",
    "request.status",
)


def understood(delivery: Delivery, topology: Topology) -> Message:
    """The message of a delivery. The routing key names the sender; what is in the message must not claim another.

    Raises Poison.
    """
    message = received(delivery)
    claimed = getattr(message, "node", None) or getattr(message, "sender", None)
    if claimed != delivery.routing_key.partition(".")[0]:
        raise Poison("sender", f"a message of {claimed!r} came with the routing key {delivery.routing_key!r}")
    kind = getattr(message, "kind", "")
    if (kind == "update") != (delivery.queue == topology.master_updates) or isinstance(message, UpdateChunk):
        raise Poison("unexpected-kind", f"a message of kind {kind!r} does not belong into {delivery.queue}")
    if kind not in (*_INBOX, "update"):
        raise Poison("unexpected-kind", f"a message of kind {kind!r} is not for the master")
    return message


def identity(delivery: Delivery) -> str:
    """What a delivery is known by when it comes again."""
    name = f"{delivery.routing_key}:{delivery.message_id}".encode() if delivery.message_id else delivery.body
    return f"delivery {hashlib.sha256(name).hexdigest()}"
