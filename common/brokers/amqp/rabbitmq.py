"""RabbitMQ through pika; the only file that knows the driver.

Two connections, each with its own thread: one consumes, acks and holds locks, the other only publishes. Under a memory
or disk alarm RabbitMQ stops reading a connection that has published, acks included; apart, a full disk can drain. Both
are reopened with backoff for ever. What is asked of the broker (declare, lock) goes over the first, each on a channel
of its own; a short third one tries the address and the account at the start, and carries the notes of who holds a lock.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

import pika
import structlog
from pika.exceptions import (
    AMQPChannelError,
    AMQPConnectionError,
    AMQPError,
    ChannelClosedByBroker,
)

from common.brokers.amqp.arguments import queue_arguments, version_of
from common.brokers.amqp.link import Link
from common.brokers.amqp.locks import Locks, Step
from common.brokers.amqp.publisher import Publisher
from common.brokers.amqp.subscription import LinkSubscription
from common.clock import SYSTEM
from common.errors import (
    AccessRefused,
    BrokerUnavailable,
    LockHeld,
    SharedEncoderError,
    Unroutable,
    UserError,
)
from common.wire.broker import BrokerStatus, Delivery, OnDelivery, Publication, StreamPosition, dead_letter
from common.wire.topology import Declarations

log = structlog.get_logger()
# pika logs every failed attempt with a stack; what matters of it is said here, in one line
logging.getLogger("pika").setLevel(logging.CRITICAL)

_HEARTBEAT_SECONDS = 30
#: What ends a connection.
FAILURES = (AMQPError, OSError)
#: The lock of a connection that broke is freed once the broker misses its heartbeats, which takes it two to three
#: intervals; until then it is our own ghost.
_LOCK_PATIENCE_SECONDS = 3.5 * _HEARTBEAT_SECONDS
#: To make quorum queues and streams takes the broker longer than other answers.
_DECLARE_SECONDS = 30.0
#: An alarm may keep a note from being written; nobody waits for it longer than this.
_NOTE_BLOCKED_SECONDS = 3.0


def _connecting(parameters: Any, opened: Callable[[Any], None], gone: Callable[[Any, BaseException], None]) -> Any:
    """Begin to open a connection; its loop is to be started in the thread that will own it."""
    return pika.SelectConnection(
        parameters, on_open_callback=opened, on_open_error_callback=gone, on_close_callback=gone
    )


class RabbitMQBroker:
    """One party's two connections to a RabbitMQ."""

    def __init__(self, url: str, *, client_name: str, dead_letters: str, connect_timeout: float = 10.0) -> None:
        try:
            self._parameters = pika.URLParameters(url)
        except ValueError as error:
            raise UserError(f"broker URL: {error}") from None
        self._parameters.heartbeat = _HEARTBEAT_SECONDS
        self._parameters.blocked_connection_timeout = None
        self._parameters.client_properties = {"connection_name": f"shared-encoder {client_name}"}
        self._dead_letters = dead_letters
        self._declared: list[Declarations] = []
        self._subscriptions: set[LinkSubscription] = set()
        self._consuming = False
        self._bytes_in = 0
        self._server_version: tuple[int, ...] = ()
        self._connect(connect_timeout)
        self._consumer = Link("consume", partial(_connecting, self._parameters), FAILURES, self._consumer_open)
        properties = partial(pika.BasicProperties, delivery_mode=2, user_id=self._parameters.credentials.username)
        self._locks = Locks(
            self._consumer, self._in_turn, self._short_connection, properties, patience=_LOCK_PATIENCE_SECONDS
        )
        self._publisher = Publisher(
            partial(_connecting, self._parameters),
            FAILURES,
            properties,
            lambda reason: _explained(reason) if isinstance(reason, ChannelClosedByBroker) else None,
        )
        self._consumer.start()
        self._publisher.link.start()

    # --- the protocol ------------------------------------------------------------------------------------------------

    def declare(self, declarations: Declarations) -> None:
        self._consumer.call(partial(self._in_turn, partial(self._declaring, declarations)), timeout=_DECLARE_SECONDS)
        if declarations not in self._declared:
            self._declared.append(declarations)

    def delete_queue(self, name: str) -> None:
        self._declared = [_without_queue(each, name) for each in self._declared]
        self._consumer.call(partial(self._in_turn, lambda channel: [partial(channel.queue_delete, name)]))

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        self._publisher.publish(publications, timeout)

    def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> LinkSubscription:
        return self._subscribe(queue, on_delivery, prefetch, None)

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, start: StreamPosition, prefetch: int = 16
    ) -> LinkSubscription:
        return self._subscribe(stream, on_delivery, prefetch, start)

    def ack(self, *deliveries: Delivery) -> None:
        def work() -> None:
            for delivery in deliveries:
                subscription, channel, tag = cast(tuple[LinkSubscription, Any, int], delivery.handle)
                subscription.ack(channel, tag)

        self._consumer.post(work)

    def dead_letter(self, delivery: Delivery, reason: str, detail: str) -> None:
        self.publish(dead_letter(self._dead_letters, delivery, reason, detail))
        self.ack(delivery)

    def lock(self, name: str, on_lost: Callable[[], None]) -> None:
        self._locks.take(name, on_lost)

    def status(self) -> BrokerStatus:
        links = (self._consumer, self._publisher.link)
        return BrokerStatus(
            connected=all(link.connected for link in links),
            blocked=self._publisher.link.blocked,
            reconnects=max(0, max(link.generation for link in links) - 1),
            bytes_out=self._publisher.bytes_out,
            bytes_in=self._bytes_in,
        )

    def close(self) -> None:
        self._publisher.link.close()
        self._locks.release_notes()
        self._consumer.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _subscribe(
        self, queue: str, on_delivery: OnDelivery, prefetch: int, start: StreamPosition | None
    ) -> LinkSubscription:
        def counted(delivery: Delivery) -> None:
            self._bytes_in += len(delivery.body)
            on_delivery(delivery)

        subscription = LinkSubscription(
            self._consumer, queue, counted, prefetch, start, on_close=self._subscriptions.discard
        )
        self._subscriptions.add(subscription)
        # before the locks are ours again nothing is consumed; all subscriptions are opened then
        self._consumer.post(lambda: subscription.open() if self._consuming else None)
        return subscription

    def _consumer_open(self) -> None:
        """In the consuming thread, at every opening: what was declared, the locks, then the consumers."""
        self._consuming = False
        self._declare_again(list(self._declared), then=lambda: self._locks.take_again(then=self._consume))

    def _consume(self) -> None:
        """Only once every lock is ours again: another may have taken over while the connection was away."""
        self._consuming = True
        for subscription in list(self._subscriptions):
            subscription.open()

    def _declare_again(self, left: list[Declarations], then: Callable[[], None]) -> None:
        """One after the other, without making the loop wait. A queue whose part of the broker is not up yet is tried
        again beside what follows."""
        if not left:
            then()
            return
        declarations, *others = left
        declared: Future[None] = Future()

        def done(future: Future[None]) -> None:
            if not self._consumer.connection.is_open:
                return  # the next opening begins again
            problem = future.exception()
            if isinstance(problem, UserError):
                log.warning("could not declare again", problem=str(problem))
            elif problem is not None:
                again = partial(self._declare_again, [declarations], then=lambda: None)
                self._consumer.connection.ioloop.call_later(1.0, again)
            self._declare_again(others, then)

        declared.add_done_callback(done)
        self._in_turn(partial(self._declaring, declarations), declared)

    def _in_turn(self, steps: Callable[[Any], Iterable[Step]], done: Future[None]) -> None:
        """In the consuming thread: one step after the other on a channel of their own, which an error closes."""

        def closed(channel: Any, reason: Exception) -> None:
            if not done.done():
                refused = isinstance(reason, ChannelClosedByBroker)
                done.set_exception(_explained(reason) if refused else _went_away(reason))

        def opened(channel: Any) -> None:
            left = iter(steps(channel))

            def go_on(frame: Any = None) -> None:
                step = next(left, None)
                if step is not None:
                    step(callback=go_on)
                else:
                    channel.close()
                    done.set_result(None)

            go_on()

        connection = self._consumer.connection
        if connection.is_open:
            connection.channel(on_open_callback=opened).add_on_close_callback(closed)
        else:
            done.set_exception(BrokerUnavailable("the connection to the broker is away"))

    def _declaring(self, declarations: Declarations, channel: Any) -> Iterator[Step]:
        for exchange in declarations.exchanges:
            yield partial(channel.exchange_declare, exchange.name, exchange.kind, durable=True)
        for queue in declarations.queues:
            arguments = queue_arguments(queue, self._server_version)
            yield partial(channel.queue_declare, queue.name, durable=True, arguments=arguments)
        for binding in declarations.bindings:
            yield partial(channel.queue_bind, binding.queue, binding.exchange, binding.routing_key)

    def _connect(self, timeout: float) -> None:
        """Try for `timeout` seconds; what cannot get better by waiting is raised at once."""
        deadline = SYSTEM.monotonic() + timeout
        while True:
            try:
                with self._short_connection() as connection:
                    properties = connection._impl.server_properties or {}
                    version = properties.get("version", "")
                    self._server_version = version_of(version.decode() if isinstance(version, bytes) else version)
                return
            except BrokerUnavailable:
                if SYSTEM.monotonic() > deadline:
                    raise
                SYSTEM.wait(0.3)

    def _short_connection(self) -> _ShortConnection:
        return _ShortConnection(self._parameters)


def _without_queue(declarations: Declarations, name: str) -> Declarations:
    """The same, but for one queue and its bindings."""
    return Declarations(
        declarations.exchanges,
        tuple(queue for queue in declarations.queues if queue.name != name),
        tuple(binding for binding in declarations.bindings if binding.queue != name),
    )


class _ShortConnection:
    """A blocking connection for a moment, with pika's errors as ours."""

    def __init__(self, parameters: Any) -> None:
        self._parameters = copy.copy(parameters)
        self._parameters.blocked_connection_timeout = _NOTE_BLOCKED_SECONDS

    def __enter__(self) -> Any:
        where = f"{self._parameters.host}:{self._parameters.port}"
        user, vhost = self._parameters.credentials.username, self._parameters.virtual_host
        try:
            self._connection = pika.BlockingConnection(self._parameters)
        except (AMQPConnectionError, OSError) as error:
            if _is_refusal(error):
                raise AccessRefused(
                    f"the broker at {where} does not let user {user!r} in to vhost {vhost!r}: "
                    f"check user, password and vhost of the URL ({_first_line(error)})"
                ) from None
            raise BrokerUnavailable(
                f"no broker answers at {where}: is RabbitMQ running there, and the port open? ({_first_line(error)})"
            ) from None
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if self._connection.is_open:
                self._connection.close()
        except AMQPError:
            log.debug("closing a short connection failed")
        if isinstance(error, ChannelClosedByBroker):
            raise _explained(error) from None
        if isinstance(error, AMQPConnectionError | AMQPChannelError):
            raise _went_away(error) from None


def _is_refusal(error: Exception) -> bool:
    """Whether the broker said no (ACCESS_REFUSED, NOT_ALLOWED). The driver takes every end of a connection that is
    being opened for a refusal, also a broker that is just being stopped or killed; what was said is in its text."""
    return "(403)" in repr(error) or "(530)" in repr(error)


def _went_away(error: BaseException) -> BrokerUnavailable:
    return BrokerUnavailable(f"the broker went away: {_first_line(error)}")


def _explained(error: ChannelClosedByBroker) -> SharedEncoderError:
    """What the broker said when it closed a channel, as one of ours."""
    text = str(error.reply_text)
    if error.reply_code == 403:
        return AccessRefused(f"the broker account lacks a permission: {text}")
    if error.reply_code == 404 and "down or inaccessible" not in text:
        return Unroutable(text)  # else the queue is still coming up after a restart of the broker
    if error.reply_code == 405:
        return LockHeld(text)
    if error.reply_code == 406:
        return UserError(f"{text}; delete what is there with the same name, or use another --namespace")
    return BrokerUnavailable(text)


def _first_line(error: BaseException) -> str:
    return next(iter((str(error) or repr(error)).splitlines()))[:200]
