"""What may come to the master: decoded, from whom it says it is, where it belongs, and whether that one may ask for it.
Pure."""

from __future__ import annotations

import hashlib

from common.errors import Poison
from common.wire.accounts import expect, operator_of, party_of
from common.wire.base import Message
from common.wire.broker import Delivery
from common.wire.codec import received
from common.wire.to_master import Continue, Get, Operation, Stop, UpdateChunk
from common.wire.topology import Topology
from master_service.config import MasterConfig

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
    "request.set",
    "request.kick",
    "request.admit",
    "request.pause",
    "request.resume",
    "ack",
    "request.alive",
    "request.status",
)


def understood(delivery: Delivery, topology: Topology) -> Message:
    """The message of a delivery. The routing key names the sender; what is in the message must not claim another, and
    where accounts are required it came from that one's. A command of an operator has a name of its own (`operator_of`),
    and may say nothing but what is neither a node's nor an update.

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
    key = {"ack": claimed, "update": f"{claimed}.ready"}.get(kind, f"{claimed}.{kind.removeprefix('request.')}")
    if delivery.routing_key != key:  # permissions at the broker are for keys
        raise Poison("sender", f"a message of kind {kind!r} came with the routing key {delivery.routing_key[:300]!r}")
    expect(topology, delivery, claimed, operator_of(claimed) if hasattr(message, "sender") else None)
    return message


def refusal(message: Message, delivery: Delivery, topology: Topology, config: MasterConfig) -> str:
    """Why a request is not for its sender to make, in one line; empty if it is. A matter of accounts alone: where all
    share one, everyone may do everything. `message` is what was `understood` of the delivery."""
    if not topology.own_accounts or not isinstance(message, Get | Continue | Stop | Operation):
        return ""
    party = party_of(topology, delivery.user_id)
    if party in config.operators:
        return ""
    if isinstance(message, Stop):
        return f"only operators may end a training here, and {party} is none (see master.operators)"
    if isinstance(message, Operation):
        return f"only operators may change how this runs, and {party} is none (see master.operators)"
    if config.nodes_may_request:
        return ""
    return (
        f"only operators may ask for encoders here, and {party} is none "
        "(see master.operators, or master.nodes_may_request = true)"
    )


def identity(delivery: Delivery) -> str:
    """What a delivery is known by when it comes again."""
    return named(f"{delivery.routing_key}:{delivery.message_id}" if delivery.message_id else delivery.body)


def named(name: str | bytes) -> str:
    """The same of a delivery of which only sender, kind and message id are there, or only its bytes."""
    return f"delivery {hashlib.sha256(name.encode() if isinstance(name, str) else name).hexdigest()}"
