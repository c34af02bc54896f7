"""RabbitMQ through pika; the only file that knows the driver.

Two connections, each with its own thread: one consumes, acks and holds locks, the other only publishes. Under a memory
or disk alarm RabbitMQ stops reading a connection that has published, acks included; apart, a full disk can drain. Both
are reopened with backoff for ever. Declaring is rare and goes through a short connection of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
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
    ConnectionClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from common.broker import BrokerStatus, Delivery, OnDelivery, Publication, StreamPosition, dead_letter
from common.brokers.arguments import queue_arguments, stream_offset, version_of
from common.brokers.batch import Batch
from common.brokers.link import Link
from common.errors import (
    AccessRefused,
    BrokerUnavailable,
    LockHeld,
    PublishRejected,
    SharedEncoderError,
    Unroutable,
    UserError,
)
from common.topology import Declarations

log = structlog.get_logger()
# pika logs every failed attempt with a stack; what matters of it is said here, in one line
logging.getLogger("pika").setLevel(logging.CRITICAL)

_HEARTBEAT_SECONDS = 30
#: What ends a connection.
FAILURES = (AMQPError, OSError)
#: The lock of a connection that broke is freed once the broker misses its heartbeats; until then it is our own ghost.
_LOCK_PATIENCE_SECONDS = 2.5 * _HEARTBEAT_SECONDS


def _connecting(parameters: Any, opened: Callable[[Any], None], gone: Callable[[Any, BaseException], None]) -> Any:
    """Begin to open a connection; its loop is to be started in the thread that will own it."""
    return pika.SelectConnection(
        parameters, on_open_callback=opened, on_open_error_callback=gone, on_close_callback=gone
    )


class _Publisher:
    """Publishes batches in confirm mode; what had no confirm when the connection went is published again."""

    def __init__(self, parameters: Any) -> None:
        self.bytes_out = 0
        self._user = parameters.credentials.username
        self._guard = threading.Lock()
        self._batches: list[Batch] = []
        self._channel: Any = None
        self._tag = 0
        self._unconfirmed: dict[int, tuple[Batch, int]] = {}
        self.link = Link("publish", partial(_connecting, parameters), FAILURES, self._open_channel)

    def publish(self, publications: tuple[Publication, ...], timeout: float) -> None:
        batch = Batch(publications)
        if not publications:
            return
        with self._guard:
            self._batches.append(batch)
        self.link.post(lambda: self._send(batch))
        try:
            while not batch.done.wait(0.2):
                if self.link.blocked is not None:
                    batch.progress_at = time.monotonic()  # an alarm is waited out, however long
                elif time.monotonic() - batch.progress_at > timeout:
                    raise BrokerUnavailable(f"the broker has confirmed nothing for {timeout:.0f} s")
                elif self.link.closing.is_set():
                    raise BrokerUnavailable("the connection is closed")
        finally:
            with self._guard:
                self._batches.remove(batch)
        if batch.error is not None:
            raise batch.error

    def _open_channel(self) -> None:
        self._channel = None
        self.link.connection.channel(on_open_callback=self._channel_open)

    def _channel_open(self, channel: Any) -> None:
        channel.add_on_return_callback(self._returned)
        channel.add_on_close_callback(self._channel_closed)
        channel.confirm_delivery(self._confirmed, callback=lambda frame: self._ready(channel))

    def _ready(self, channel: Any) -> None:
        self._channel, self._tag, self._unconfirmed = channel, 0, {}
        with self._guard:
            waiting = list(self._batches)
        for batch in waiting:
            self._send(batch)

    def _send(self, batch: Batch) -> None:
        """Publish what of a batch is unconfirmed; called once per batch and channel."""
        if self._channel is None or not self._channel.is_open:
            return
        if any(each is batch for each, _ in self._unconfirmed.values()):
            return
        for index, publication in list(batch.left.items()):
            self._tag += 1
            self._unconfirmed[self._tag] = (batch, index)
            properties = pika.BasicProperties(
                delivery_mode=2,
                message_id=publication.message_id,
                headers=dict(publication.headers),
                user_id=self._user,
                timestamp=int(time.time()),
                correlation_id=str(self._tag),
            )
            self._channel.basic_publish(
                publication.exchange, publication.routing_key, publication.body, properties, publication.mandatory
            )
            self.bytes_out += len(publication.body)

    def _returned(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """No queue took it; its confirm follows and finds it settled."""
        batch, index = self._unconfirmed.get(int(properties.correlation_id), (None, 0))
        if batch is not None:
            batch.settle(index, Unroutable(f"no queue takes {method.routing_key!r} of {method.exchange}"))

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        tags = (
            [tag for tag in self._unconfirmed if tag <= method.delivery_tag]
            if method.multiple
            else [method.delivery_tag]
        )
        rejected = isinstance(method, pika.spec.Basic.Nack)
        for tag in tags:
            batch, index = self._unconfirmed.pop(tag, (None, 0))
            if batch is not None:
                batch.settle(index, PublishRejected("the queue is full") if rejected else None)

    def _channel_closed(self, channel: Any, reason: Exception) -> None:
        """The broker closes a channel for one bad publish: that one fails, the others go again on a new channel."""
        self._channel, self._unconfirmed = None, {}
        if not isinstance(reason, ChannelClosedByBroker):
            return
        error = _explained(reason)
        with self._guard:
            for batch in self._batches:
                if any(f"'{publication.exchange}'" in reason.reply_text for publication in batch.left.values()):
                    batch.fail(error)
        if self.link.connection.is_open:
            self._open_channel()


class RabbitMQSubscription:
    """A consumer on a channel of its own, so that closing it gives its unacked deliveries back."""

    def __init__(
        self, broker: RabbitMQBroker, queue: str, on_delivery: OnDelivery, prefetch: int, start: StreamPosition | None
    ) -> None:
        self._broker = broker
        self._queue = queue
        self._on_delivery = on_delivery
        self._prefetch = prefetch
        self._next = start
        self._channel: Any = None
        self._unacked: set[int] = set()
        self._closed = False

    def close(self) -> None:
        """Returns when the broker has taken the channel down, so that what was unacked is ready for others."""
        self._closed = True
        self._broker._subscriptions.discard(self)
        try:
            self._broker._consumer.call(self._close_channel, timeout=5.0)
        except BrokerUnavailable:
            return  # no connection, no channel: the broker has its deliveries back

    def open(self) -> None:
        """In the link's thread: open the channel and consume."""
        if not self._closed:
            self._broker._consumer.connection.channel(on_open_callback=self._channel_open)

    def ack(self, channel: Any, tag: int) -> None:
        """In the link's thread: a tag that is not outstanding on the present channel has no effect."""
        if channel is self._channel and tag in self._unacked and channel.is_open:
            self._unacked.discard(tag)
            channel.basic_ack(tag)

    def _close_channel(self, done: Future[None]) -> None:
        channel = self._channel
        if channel is None or not channel.is_open:
            done.set_result(None)
            return
        channel.add_on_close_callback(lambda *_: done.set_result(None))
        channel.close()

    def _channel_open(self, channel: Any) -> None:
        if self._closed:
            channel.close()
            return
        self._channel, self._unacked = channel, set()
        channel.add_on_close_callback(self._channel_closed)
        channel.basic_qos(prefetch_count=min(self._prefetch, 65_535), callback=lambda frame: self._consume(channel))

    def _consume(self, channel: Any) -> None:
        if self._closed or not channel.is_open:
            return
        arguments = {} if self._next is None else {"x-stream-offset": stream_offset(self._next)}
        channel.add_on_cancel_callback(lambda frame: channel.close() if channel.is_open else None)
        channel.basic_consume(self._queue, self._delivered, arguments=arguments)

    def _channel_closed(self, channel: Any, reason: Exception) -> None:
        """Closed by the broker (the queue is gone, or not there yet): try again after a while."""
        if self._closed or not self._broker._consumer.connection.is_open:
            return
        log.debug("consumer closed by the broker, trying again", queue=self._queue, problem=str(reason))
        self._broker._consumer.connection.ioloop.call_later(1.0, self.open)

    def _delivered(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        headers = properties.headers or {}
        offset = int(headers["x-stream-offset"]) if "x-stream-offset" in headers else None
        if self._next is not None and offset is not None:
            if isinstance(self._next, int) and offset < self._next:
                channel.basic_ack(
                    method.delivery_tag
                )  # streams deliver whole storage chunks: before what was asked for
                return
            self._next = offset + 1
        self._unacked.add(method.delivery_tag)
        self._broker._bytes_in += len(body)
        delivery = Delivery(
            queue=self._queue,
            exchange=method.exchange,
            routing_key=method.routing_key,
            body=body,
            headers=headers,
            message_id=properties.message_id,
            user_id=properties.user_id,
            redelivered=method.redelivered,
            timestamp=properties.timestamp,
            offset=offset,
            handle=(self, channel, method.delivery_tag),
        )
        self._on_delivery(delivery)


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
        self._subscriptions: set[RabbitMQSubscription] = set()
        self._locks: dict[str, Callable[[], None]] = {}
        self._locks_lost_at = 0.0
        self._bytes_in = 0
        self._server_version: tuple[int, ...] = ()
        self._connect(connect_timeout)
        self._consumer = Link("consume", partial(_connecting, self._parameters), FAILURES, self._consumer_open)
        self._publisher = _Publisher(self._parameters)

    # --- the protocol ------------------------------------------------------------------------------------------------

    def declare(self, declarations: Declarations) -> None:
        if declarations in self._declared:
            return
        self._declare(declarations)
        self._declared.append(declarations)

    def delete_queue(self, name: str) -> None:
        self._declared = [each for each in self._declared if all(queue.name != name for queue in each.queues)]
        with self._short_connection() as connection:
            connection.channel().queue_delete(name)

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        self._publisher.publish(publications, timeout)

    def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> RabbitMQSubscription:
        return self._subscribe(RabbitMQSubscription(self, queue, on_delivery, prefetch, None))

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, start: StreamPosition, prefetch: int = 16
    ) -> RabbitMQSubscription:
        return self._subscribe(RabbitMQSubscription(self, stream, on_delivery, prefetch, start))

    def ack(self, *deliveries: Delivery) -> None:
        def work() -> None:
            for delivery in deliveries:
                subscription, channel, tag = cast(tuple[RabbitMQSubscription, Any, int], delivery.handle)
                subscription.ack(channel, tag)

        self._consumer.post(work)

    def dead_letter(self, delivery: Delivery, reason: str, detail: str) -> None:
        self.publish(dead_letter(self._dead_letters, delivery, reason, detail))
        self.ack(delivery)

    def lock(self, name: str, on_lost: Callable[[], None]) -> None:
        deadline = time.monotonic() + 3.0
        while not self._consumer.call(partial(self._acquire, name), timeout=10.0):
            if time.monotonic() > deadline:
                raise LockHeld(
                    f"{name} is held by another connection: it is running already, here or elsewhere; "
                    "stop that one, or use another id or --namespace"
                )
            time.sleep(0.3)
        self._locks[name] = on_lost

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
        self._consumer.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _subscribe(self, subscription: RabbitMQSubscription) -> RabbitMQSubscription:
        self._subscriptions.add(subscription)
        self._consumer.post(subscription.open)
        return subscription

    def _consumer_open(self) -> None:
        """In the consuming thread, at every opening: what was declared, the locks, then the consumers."""
        if self._consumer.generation > 1:
            for declarations in self._declared:
                try:
                    self._declare(declarations)
                except SharedEncoderError as error:
                    log.warning("could not declare again", problem=str(error))
        self._locks_lost_at = time.monotonic() + _LOCK_PATIENCE_SECONDS
        self._take_locks_again(list(self._locks))

    def _take_locks_again(self, names: list[str]) -> None:
        """Consume only once every lock is ours again: another may have taken over while the connection was away."""
        if not names:
            for subscription in list(self._subscriptions):
                subscription.open()
            return
        name, *others = names
        taken: Future[bool] = Future()

        def done(future: Future[bool]) -> None:
            if future.result():
                self._take_locks_again(others)
            elif time.monotonic() < self._locks_lost_at:
                self._consumer.connection.ioloop.call_later(1.0, lambda: self._take_locks_again(names))
            else:
                self._locks.pop(name)()

        taken.add_done_callback(done)
        self._acquire(name, taken)

    def _acquire(self, name: str, taken: Future[bool]) -> None:
        """In the consuming thread: declare the exclusive queue; `taken` says whether it is ours."""

        def closed(channel: Any, reason: Exception) -> None:
            if not taken.done():
                taken.set_result(False)

        def acquired(frame: Any) -> None:
            if not taken.done():
                taken.set_result(True)

        def opened(channel: Any) -> None:
            channel.add_on_close_callback(closed)
            channel.queue_declare(
                name,
                exclusive=True,
                arguments={"x-queue-type": "classic"},
                callback=acquired,
            )

        self._consumer.connection.channel(on_open_callback=opened)

    def _declare(self, declarations: Declarations) -> None:
        with self._short_connection() as connection:
            channel = connection.channel()
            for exchange in declarations.exchanges:
                channel.exchange_declare(exchange.name, exchange.kind, durable=True)
            for queue in declarations.queues:
                channel.queue_declare(queue.name, durable=True, arguments=queue_arguments(queue, self._server_version))
            for binding in declarations.bindings:
                channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)

    def _connect(self, timeout: float) -> None:
        """Try for `timeout` seconds; what cannot get better by waiting is raised at once."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                with self._short_connection() as connection:
                    properties = connection._impl.server_properties or {}
                    version = properties.get("version", "")
                    self._server_version = version_of(version.decode() if isinstance(version, bytes) else version)
                return
            except BrokerUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)

    def _short_connection(self) -> _ShortConnection:
        return _ShortConnection(self._parameters)


class _ShortConnection:
    """A blocking connection for a moment, with pika's errors as ours."""

    def __init__(self, parameters: Any) -> None:
        self._parameters = parameters

    def __enter__(self) -> Any:
        where = f"{self._parameters.host}:{self._parameters.port}"
        user, vhost = self._parameters.credentials.username, self._parameters.virtual_host
        try:
            self._connection = pika.BlockingConnection(self._parameters)
        except (ProbableAuthenticationError, ProbableAccessDeniedError, ConnectionClosedByBroker) as error:
            raise AccessRefused(
                f"the broker at {where} does not let user {user!r} in to vhost {vhost!r}: "
                f"check user, password and vhost of the URL ({_first_line(error)})"
            ) from None
        except (AMQPConnectionError, OSError) as error:
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
            raise BrokerUnavailable(f"the broker went away: {_first_line(error)}") from None


def _explained(error: ChannelClosedByBroker) -> SharedEncoderError:
    """What the broker said when it closed a channel, as one of ours."""
    text = str(error.reply_text)
    if error.reply_code == 403:
        return AccessRefused(f"the broker account lacks a permission: {text}")
    if error.reply_code == 404:
        return Unroutable(text)
    if error.reply_code == 406:
        return UserError(f"{text}; delete what is there with the same name, or use another --namespace")
    return BrokerUnavailable(text)


def _first_line(error: BaseException) -> str:
    return next(iter((str(error) or repr(error)).splitlines()))[:200]
