"""What the system needs of a message broker. `brokers/` holds the implementations; one contract suite runs on all.

Threads: every method may be called from any thread. Deliveries arrive on a thread of the broker's own, in the order of
their queue; a callback must return quickly (put the delivery into a queue of yours) and must not block on `publish`.
A callback that raises is a bug: its consumer is closed, `status` says so, and what is asked of the broker from then on
(`publish`, `declare`, `lock`) raises InternalError, so that nobody believes that it still hears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from common.errors import AccessRefused, InternalError
from common.wire.topology import Declarations

#: Where a stream is read from: an offset (inclusive), a broker timestamp, or a named position.
#: `last` is the last chunk as the broker stores it, which may hold several messages; `next` is what comes from now on.


@dataclass(frozen=True, slots=True)
class Timestamp:
    """Broker time in seconds since 1970; RabbitMQ's streams know it to one second."""

    seconds: float


StreamPosition = Literal["first", "last", "next"] | int | Timestamp


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to publish. `mandatory`: an exchange that finds no queue for it raises `Unroutable`. `user_id`: the
    account that it is said to be from, by default the connection's own; the broker takes it from no other.
    `persistent`: it outlives a restart of the broker. Quorum queues and streams keep what is not, too; a classic queue
    loses it, and moves it with half the work."""

    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, str | int] = field(default_factory=dict)
    message_id: str | None = None
    mandatory: bool = True
    user_id: str | None = None
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it came. `handle` is the broker's own; a handle of a lost connection is acked without effect.
    `unreadable`: what beside the body could not be read, in words; such a message is to be set aside."""

    queue: str
    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any]
    message_id: str | None
    user_id: str | None
    redelivered: bool
    timestamp: float | None
    offset: int | None
    handle: object = field(repr=False)
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class BrokerStatus:
    """What the user is shown of the connection. `blocked` is the broker's reason while an alarm stops publishers.

    `problem`: what does not work right now, in the broker's words; empty when all is well. `refused`: what the broker
    has refused for so long that waiting will not help; the party ends with AccessRefused. `failed`: what a bug has
    ended, such as a consumer whose callback raised; the party ends with InternalError.
    """

    connected: bool
    blocked: str | None
    reconnects: int
    bytes_out: int
    bytes_in: int
    problem: str = ""
    refused: str = ""
    failed: str = ""

    def check(self) -> None:
        """Raises InternalError or AccessRefused if it is no use going on. Whoever waits calls this now and then."""
        if self.failed:
            raise InternalError(self.failed)
        if self.refused:
            raise AccessRefused(self.refused)


def dead_letter(exchange: str, delivery: Delivery, reason: str, detail: str) -> Publication:
    """What is published of a delivery that cannot be processed: its body as it came, and why and where from."""
    headers = {
        "x-reason": reason,
        "x-detail": detail[:500],
        "x-exchange": delivery.exchange,
        "x-routing-key": delivery.routing_key,
    }
    return Publication(exchange, reason, delivery.body, headers, delivery.message_id)


OnDelivery = Callable[[Delivery], None]


class Subscription(Protocol):
    """A running consumer."""

    def stop(self) -> None:
        """Deliver nothing more. What was delivered may still be acked; then `close`, which need not wait."""

    def close(self) -> None:
        """Stop. Deliveries that are not acked go back to the head of their queue, marked as redelivered."""


class Broker(Protocol):
    """One party's connection to a broker."""

    def declare(self, declarations: Declarations) -> None:
        """Make what is not there yet, or look whether what was made for this party is; again after every reconnect.

        Raises AccessRefused, UserError for what is there with other arguments or was not made, BrokerUnavailable.
        """

    def delete_queue(self, name: str) -> None:
        """Delete a queue or stream with what is in it; nothing happens if there is none. Raises BrokerUnavailable."""

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        """Publish in order, and return when the broker has confirmed all of them.

        Waits while the connection is away or blocked. After an error any subset may have arrived; after Unroutable, all
        that has a queue.
        What the broker closes the channel for (no permission, no exchange, too large) fails its own call alone.
        Raises Unroutable, PublishRejected, AccessRefused, Unpublishable, or BrokerUnavailable after `timeout` seconds
        without progress, and for what finds no queue just after a reconnect: the queue may not be up yet.
        """

    def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> Subscription:
        """Consume with at most `prefetch` unacked deliveries; resumed after a reconnect.

        Tried again as long as the queue is not there or the account may not read it; `status` says so meanwhile.
        """

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, start: StreamPosition, prefetch: int = 16
    ) -> Subscription:
        """Read a stream without consuming it; each delivery carries its offset and must be acked for credit.

        After a reconnect it goes on behind the last delivery; if there was none yet, from `start` as it is then.
        """

    def stream_end(self, stream: str) -> int | None:
        """An offset below which nothing lies that is published from now on; where the last message was confirmed before
        the next was published, that of the next one. None for an empty stream, or if the broker does not say soon."""

    def ack(self, *deliveries: Delivery) -> None:
        """Remove deliveries from their queue. Those of an earlier connection or a closed consumer have no effect."""

    def dead_letter(self, delivery: Delivery, reason: str, detail: str) -> None:
        """Publish a delivery to the dead letters with its reason, wait for the confirm, then ack it. A party that may
        not write there only acks."""

    def lock(self, name: str, on_lost: Callable[[], None]) -> None:
        """Hold a name for as long as the connection lives; taken again after a reconnect.

        `on_lost` is called if another has taken it meanwhile; this connection consumes nothing from then on.
        A lock that may not be taken again (no permission) is not lost: it is tried again, and `status` says so.
        Raises LockHeld, which names the holder's user, process and host where the broker knows them; AccessRefused,
        BrokerUnavailable.
        """

    def status(self) -> BrokerStatus:
        """The state of the connection, without asking the broker."""

    def close(self) -> None:
        """Close; unacked deliveries go back to their queues, locks are released."""
