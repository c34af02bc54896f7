"""RabbitMQ through pika; the only file that knows the driver.

Two connections, each with its own thread: one consumes, acks and holds locks, the other only publishes. Under a memory
or disk alarm RabbitMQ stops reading a connection that has published, acks included; apart, a full disk can drain. Both
are reopened with backoff for ever. What is asked of the broker (declare, lock) goes over the first, each on a channel
of its own; a short third one tries the address and the account at the start, and carries the notes of who holds a lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, cast

import pika
import pika.spec
import structlog
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils import io_services_utils
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.exceptions import AMQPError, ChannelClosedByBroker, ConnectionClosedByBroker

from common.broker_url import Access, split
from common.brokers.amqp.arguments import body_frames, queue_arguments, version_of
from common.brokers.amqp.certificates import context_of
from common.brokers.amqp.headers import guarded
from common.brokers.amqp.link import ANSWER_SECONDS, Link
from common.brokers.amqp.locks import Locks, Step
from common.brokers.amqp.proxy import Proxy, Tunnelled
from common.brokers.amqp.publisher import Publisher
from common.brokers.amqp.refusals import MALFORMED, explained, unpublished, went_away
from common.brokers.amqp.routes import Address, Route, first_that_answers
from common.brokers.amqp.subscription import LinkSubscription
from common.brokers.problems import Problems
from common.errors import BrokerUnavailable, SharedEncoderError, Unroutable, UserError
from common.wire.broker import BrokerStatus, Delivery, OnDelivery, Publication, StreamPosition, dead_letter
from common.wire.topology import Declarations, not_made

log = structlog.get_logger()
# pika logs every failed attempt with a stack; what matters of it is said here, in one line
logging.getLogger("pika").setLevel(logging.CRITICAL)
# the driver has no place to say so: the properties of every delivery are read through this name
pika.spec.BasicProperties.decode = guarded(pika.spec.BasicProperties.decode)
#: Bytes that one read of a socket asks for. The driver has no setting for it; its own 4096 costs three times the CPU.
READ_BYTES = 256 * 1024
io_services_utils._AsyncTransportBase._MAX_RECV_BYTES = READ_BYTES

_HEARTBEAT_SECONDS = 30
#: What ends a connection.
FAILURES = (AMQPError, OSError)
#: The lock of a connection that broke is freed once the broker misses its heartbeats, which takes it two to three
#: intervals; until then it is our own ghost.
LOCK_PATIENCE_SECONDS = 3.5 * _HEARTBEAT_SECONDS
#: To make quorum queues and streams takes the broker longer than other answers.
_DECLARE_SECONDS = 30.0
#: How long to wait for the last message of a stream, which may hold none.
_END_SECONDS = 2.0
#: An alarm may keep a note from being written; nobody waits for it longer than this.
_NOTE_BLOCKED_SECONDS = 3.0


class _Services(Tunnelled, SelectorIOServicesAdapter):  # type: ignore[misc]  # the driver has no types
    """The driver's I/O services, through a proxy."""

    def __init__(self, loop: Any, address: Address, proxy: Proxy, timeout: float) -> None:
        super().__init__(loop)
        self.proxy, self.destination, self.timeout = proxy, (address.host, address.port), timeout


class Connection(pika.SelectConnection):  # type: ignore[misc]
    """The driver's connection, but a body is copied once on its way into frames and not three times."""

    def _send_message(self, channel_number: int, method_frame: Any, content: tuple[Any, bytes]) -> None:
        properties, body = content
        # marshalled before anything is written: what cannot be raises here
        method = pika.frame.Method(channel_number, method_frame).marshal()
        header = pika.frame.Header(channel_number, len(body), properties).marshal()
        frames = body_frames(channel_number, body, self._body_max_length)
        self._output_marshaled_frames([method + header, *frames])


def _connecting(
    address: Address, opened: Callable[[Any], None], gone: Callable[[Any, BaseException], None]
) -> Connection:
    """Begin to open a connection; its loop is to be started in the thread that will own it."""
    loop = IOLoop()
    return Connection(
        address.parameters,
        on_open_callback=opened,
        on_open_error_callback=gone,
        on_close_callback=gone,
        custom_ioloop=_Services(loop, address, address.proxy, ANSWER_SECONDS) if address.proxy is not None else loop,
    )


class RabbitMQBroker:
    """One party's two connections to a RabbitMQ."""

    def __init__(
        self,
        access: Access,
        *,
        client_name: str,
        dead_letters: str | None,
        notes: str = "",
        makes_notes: bool = True,
        connect_timeout: float = 10.0,
        refusal_patience: float = 30.0,
    ) -> None:
        """See `open_broker`."""
        self._addresses = _addresses(access, {"connection_name": f"shared-encoder {client_name}"})
        self._dead_letters = dead_letters
        self._declared: list[Declarations] = []
        self._subscriptions: set[LinkSubscription] = set()
        self._consuming = False
        self._bytes_in = 0
        self._problems = Problems(refusal_patience)
        at, version = first_that_answers(self._addresses, _version, connect_timeout)
        self._server_version = version_of(version)
        self._route = Route(self._addresses, at, _connecting)
        self._consumer = Link(
            "consume", self._route.connect, FAILURES, self._consumer_open, self._problems, self._route.explained
        )
        properties = partial(pika.BasicProperties, delivery_mode=2, user_id=self._addresses[0].account)
        self._locks = Locks(
            self._consumer,
            self._in_turn,
            self._short_connection,
            properties,
            notes=notes,
            makes_notes=makes_notes,
            patience=LOCK_PATIENCE_SECONDS,
        )
        publishing = Route(self._addresses, at, _connecting)
        self._publisher = Publisher(
            publishing.connect, FAILURES, properties, _not_published, self._problems, publishing.explained
        )
        self._consumer.start()
        self._publisher.link.start()

    # --- the protocol ------------------------------------------------------------------------------------------------

    def declare(self, declarations: Declarations) -> None:
        self._problems.check()
        try:
            declare = partial(self._in_turn, partial(self._declaring, declarations))
            self._consumer.call(declare, timeout=_DECLARE_SECONDS)
        except Unroutable as error:
            raise not_made(str(error)) if declarations.made else error from None
        if declarations not in self._declared:
            self._declared.append(declarations)

    def delete_queue(self, name: str) -> None:
        self._declared = [_without_queue(each, name) for each in self._declared]
        self._consumer.call(partial(self._in_turn, lambda channel: [partial(channel.queue_delete, name)]))

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        self._problems.check()
        self._publisher.publish(publications, timeout)

    def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> LinkSubscription:
        return self._subscribe(queue, on_delivery, prefetch, None)

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, start: StreamPosition, prefetch: int = 16
    ) -> LinkSubscription:
        return self._subscribe(stream, on_delivery, prefetch, start)

    def stream_end(self, stream: str) -> int | None:
        # a publisher is told no offsets, and a declare counts no messages of a stream: the last of them is looked at
        last: SimpleQueue[Delivery] = SimpleQueue()
        subscription = self.read_stream(stream, last.put, start="last", prefetch=1)
        try:
            found = last.get(timeout=_END_SECONDS).offset
        except Empty:
            return None
        finally:
            subscription.close()
        return None if found is None else int(found) + 1

    def ack(self, *deliveries: Delivery) -> None:
        def work() -> None:
            for delivery in deliveries:
                subscription, channel, tag = cast(tuple[LinkSubscription, Any, int], delivery.handle)
                subscription.ack(channel, tag)

        self._consumer.post(work)

    def dead_letter(self, delivery: Delivery, reason: str, detail: str) -> None:
        if self._dead_letters is not None:
            self.publish(dead_letter(self._dead_letters, delivery, reason, detail))
        self.ack(delivery)

    def lock(self, name: str, on_lost: Callable[[], None]) -> None:
        self._problems.check()
        self._locks.take(name, on_lost)

    def status(self) -> BrokerStatus:
        links = (self._consumer, self._publisher.link)
        return BrokerStatus(
            connected=all(link.connected for link in links),
            blocked=self._publisher.link.blocked,
            reconnects=max(0, max(link.generation for link in links) - 1),
            bytes_out=self._publisher.bytes_out,
            bytes_in=self._bytes_in,
            problem=self._problems.problem,
            refused=self._problems.refused,
            failed=self._problems.failed,
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
            self._consumer, queue, counted, prefetch, start, on_close=self._subscriptions.discard, refusal=_refused
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

        what = f"declaring {_name_of(declarations)}"

        def again() -> None:
            if declarations in self._declared:
                self._declare_again([declarations], then=lambda: None)
            else:
                self._problems.over(what)  # a queue of it was deleted meanwhile: the next opening declares the rest

        def done(future: Future[None]) -> None:
            if not self._consumer.connection.is_open:
                return  # the next opening begins again
            error = future.exception()
            if error is None:
                self._problems.over(what)
            else:
                self._problems.note(what, str(error), refusal=isinstance(error, UserError))
                self._consumer.connection.ioloop.call_later(1.0, again)
            self._declare_again(others, then)

        self._consumer.after(declared, done)
        self._in_turn(partial(self._declaring, declarations), declared)

    def _in_turn(self, steps: Callable[[Any], Iterable[Step]], done: Future[None]) -> None:
        """In the consuming thread: one step after the other on a channel of their own, which an error closes."""

        def closed(channel: Any, reason: Exception) -> None:
            if not done.done():
                done.set_exception(_refused(reason) or went_away(reason))

        def opened(channel: Any) -> None:
            left = iter(steps(channel))

            def go_on(frame: Any = None) -> None:
                self._consumer.attempt(done, next_step)

            def next_step() -> None:
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
        if declarations.made:
            yield from (partial(channel.queue_declare, queue.name, passive=True) for queue in declarations.queues)
            return
        for exchange in declarations.exchanges:
            yield partial(channel.exchange_declare, exchange.name, exchange.kind, durable=True)
        for queue in declarations.queues:
            arguments = queue_arguments(queue, self._server_version)
            yield partial(channel.queue_declare, queue.name, durable=True, arguments=arguments)
        for binding in declarations.bindings:
            yield partial(channel.queue_bind, binding.queue, binding.exchange, binding.routing_key)

    def _short_connection(self) -> _ShortConnection:
        return _ShortConnection(self._route.address, ANSWER_SECONDS)


def _name_of(declarations: Declarations) -> str:
    """The name of the first of what is declared together."""
    names = [each.name for each in declarations.queues] + [each.name for each in declarations.exchanges]
    return names[0] if names else "bindings"


def _without_queue(declarations: Declarations, name: str) -> Declarations:
    """The same declarations without one queue and its bindings."""
    return Declarations(
        declarations.exchanges,
        tuple(queue for queue in declarations.queues if queue.name != name),
        tuple(binding for binding in declarations.bindings if binding.queue != name),
        declarations.made,
    )


def _addresses(access: Access, client_properties: dict[str, str]) -> list[Address]:
    """Where the broker may be, with what the driver is to be told. Raises UserError, without a word of a URL."""
    context = context_of(access)
    proxy = Proxy(access.proxy) if access.proxy is not None else None
    found = []
    for url in access.urls:
        parts = split(url)
        parameters = _parameters(url)
        parameters.heartbeat = _HEARTBEAT_SECONDS
        parameters.blocked_connection_timeout = None
        parameters.client_properties = client_properties
        address = Address(parameters, access, named=parts.username is not None, proxy=proxy)
        if context is not None:
            address.check_tls(given_otherwise="ssl_options" in parts.query)
            parameters.ssl_options = pika.SSLOptions(context, parameters.host)
        if address.by_certificate:
            parameters.credentials = pika.credentials.ExternalCredentials()
        found.append(address)
    if len({(each.account, each.vhost) for each in found}) > 1:
        raise UserError("broker.urls: they must name one broker; these have different users or vhosts")
    return found


def _parameters(url: str) -> Any:
    try:
        return pika.URLParameters(url)
    except OSError as error:
        raise UserError(
            f"the broker's URL: a file that its ssl_options name cannot be used ({error.strerror})"
        ) from None
    except Exception:
        # ValueError, and with ssl_options whatever Python's parser and ssl raise; its words may hold a password
        raise UserError(
            "the broker's URL: what stands behind its ? is not as pika's URLParameters wants it (ssl_options is a "
            "dict of ca_certs, certfile, keyfile; heartbeat and the like are numbers)"
        ) from None


def _version(address: Address, timeout: float) -> str:
    """What the broker there says of itself; empty if nothing."""
    with _ShortConnection(address, timeout) as connection:
        version = (connection._impl.server_properties or {}).get("version", "")
    return version.decode() if isinstance(version, bytes) else str(version)


class _Tunnelling(pika.SelectConnection):  # type: ignore[misc]
    """What a blocking connection runs on, through a proxy. Made for one address."""

    address: Address
    timeout: float

    @classmethod
    def create_connection(
        cls, connection_configs: Any, on_done: Any, custom_ioloop: Any = None, workflow: Any = None
    ) -> Any:
        assert cls.address.proxy is not None
        services = _Services(custom_ioloop, cls.address, cls.address.proxy, cls.timeout)
        return cls._start_connection_workflow(
            connection_configs=connection_configs,
            connection_factory=lambda given: cls(given, custom_ioloop=services, internal_connection_workflow=False),
            nbio=services,
            workflow=workflow,
            on_done=on_done,
        )


class _ShortConnection:
    """A blocking connection for a moment, with pika's errors as ours."""

    def __init__(self, address: Address, timeout: float) -> None:
        """`timeout`: seconds that opening it may take."""
        self._address = address
        self._timeout = timeout

    def __enter__(self) -> Any:
        try:
            parameters, kind = self._address.for_a_moment(self._timeout, _NOTE_BLOCKED_SECONDS), None
            if self._address.proxy is not None:
                kind = type("Tunnelling", (_Tunnelling,), {"address": self._address, "timeout": self._timeout})
            self._connection = pika.BlockingConnection(parameters, _impl_class=kind)
        except Exception as error:
            # not only AMQPError and OSError: the driver stumbles in many ways over a peer that does not speak AMQP
            raise self._address.not_connected(error) from None
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if self._connection.is_open:
                self._connection.close()
        except AMQPError:
            log.debug("closing a short connection failed")
        if isinstance(error, AMQPError | OSError):
            raise (_refused(error) or went_away(error)) from None


def _refused(error: BaseException) -> SharedEncoderError | None:
    """Why the broker closed a channel, if it did."""
    if not isinstance(error, ChannelClosedByBroker):
        return None
    return explained(int(error.reply_code), str(error.reply_text))


def _not_published(error: BaseException) -> SharedEncoderError | None:
    """Why the broker closed a channel, or its connection, for what was published, if it did."""
    malformed = isinstance(error, ConnectionClosedByBroker) and error.reply_code in MALFORMED
    if isinstance(error, ChannelClosedByBroker) or malformed:
        return unpublished(int(error.reply_code), str(error.reply_text))  # type: ignore[attr-defined]
    return None
