"""A consumer or stream reader over a link that comes and goes: reopened by its broker, resumed where it was.

What the driver's connections and channels must have is AMQP's own; knows no driver.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import structlog

from common.brokers.amqp.arguments import stream_offset
from common.brokers.amqp.headers import headers_of, words_of
from common.brokers.amqp.link import Link
from common.clock import SYSTEM
from common.errors import SharedEncoderError, UserError
from common.wire.broker import Delivery, OnDelivery, StreamPosition

log = structlog.get_logger()

#: Between two attempts to consume from a queue that is not there, seconds.
_RETRY_SECONDS = 1.0
#: A queue may be missing for so long before a warning: after a restart of the broker, or before its declarer came.
_QUIET_SECONDS = 5.0
#: A connection that was lost so soon after consuming from a queue began, before anything of it was acked, may have been
#: lost because of what is in the queue, seconds; after so many of these in a row somebody has to look.
_SOON_SECONDS = 30.0
_LOST_IN_A_ROW = 3


class LinkSubscription:
    """A consumer on a channel of its own, so that closing it gives its unacked deliveries back."""

    def __init__(
        self,
        link: Link,
        queue: str,
        on_delivery: OnDelivery,
        prefetch: int,
        start: StreamPosition | None,
        on_close: Callable[[LinkSubscription], None],
        refusal: Callable[[Exception], SharedEncoderError | None],
    ) -> None:
        """`refusal` says why the broker closed a channel, if it did."""
        self._link = link
        self._queue = queue
        self._on_delivery = on_delivery
        self._prefetch = prefetch
        self._next = start
        self._on_close = on_close
        self._refusal = refusal
        self._what = f"{'queue' if start is None else 'stream'} {queue}"
        self._connection: Any = None
        self._channel: Any = None
        self._unacked: set[int] = set()
        self._closed = self._stopped = False
        self._tag = ""
        self._opened_at = 0.0
        self._in_vain = 0

    def stop(self) -> None:
        self._stopped = True
        self._link.post(self._cancel)

    def close(self) -> None:
        """Returns when the broker has taken the channel down, so that what was unacked is ready for others; at once if
        it was stopped before."""
        self._end()
        if self._stopped:
            self._link.post(self._close_soon)
            return
        if not self._link.connected:
            return  # no connection, no channel: the broker has its deliveries back
        try:
            self._link.call(self._close_channel, timeout=5.0)
        except SharedEncoderError as error:
            log.debug("the connection went while a consumer was closed", queue=self._queue, problem=str(error))

    def open(self) -> None:
        """In the link's thread: open the channel and consume, once per connection however often it is asked for."""
        connection = self._link.connection
        if self._closed or self._stopped or connection is self._connection or not connection.is_open:
            return
        self._connection, self._opened_at = connection, SYSTEM.monotonic()
        connection.channel(on_open_callback=self._channel_open).add_on_close_callback(self._channel_closed)

    def ack(self, channel: Any, tag: int) -> None:
        """In the link's thread: a tag that is not outstanding on the present channel has no effect."""
        if channel is self._channel and tag in self._unacked and channel.is_open:
            self._unacked.discard(tag)
            channel.basic_ack(tag)
            self._in_vain = 0

    def _cancel(self) -> None:
        channel = self._channel
        if self._tag and channel is not None and channel.is_open:
            channel.basic_cancel(self._tag)

    def _close_soon(self) -> None:
        if self._channel is not None and self._channel.is_open:
            self._channel.close()

    def _lost(self) -> None:
        """Warn of a queue on which the connection breaks again and again: a message in it may be the reason."""
        self._in_vain = self._in_vain + 1 if SYSTEM.monotonic() - self._opened_at < _SOON_SECONDS else 0
        if self._in_vain == _LOST_IN_A_ROW:
            log.warning(
                "the connection is lost again and again while this is consumed; is there what the driver cannot read?",
                queue=self._queue,
                times=self._in_vain,
            )

    def _end(self) -> None:
        self._closed = True
        self._on_close(self)
        self._link.problems.over(self._what)

    def _fail(self, error: Exception) -> None:
        """In the link's thread: a bug. What is unacked goes back to its queue, and the party learns that it is deaf."""
        self._end()
        self._link.problems.fail(f"the consumer of {self._what}", error)
        if self._channel is not None and self._channel.is_open:
            self._channel.close()

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
        channel.basic_qos(prefetch_count=min(self._prefetch, 65_535), callback=lambda frame: self._consume(channel))

    def _consume(self, channel: Any) -> None:
        if self._closed or self._stopped or not channel.is_open:
            return
        arguments = {} if self._next is None else {"x-stream-offset": stream_offset(self._next)}
        channel.add_on_cancel_callback(lambda frame: channel.close() if channel.is_open else None)
        try:
            self._tag = channel.basic_consume(
                self._queue, self._delivered, arguments=arguments, callback=self._consuming
            )
        except Exception as error:  # what cannot be written as AMQP: without this the connection would go, and again
            self._fail(error)

    def _consuming(self, frame: Any) -> None:
        self._link.problems.over(self._what)

    def _channel_closed(self, channel: Any, reason: Exception) -> None:
        """Closed by the broker (forbidden, gone, or not there yet): try again after a while."""
        connection, self._connection = self._connection, None
        if self._closed or self._stopped:
            return
        if not connection.is_open:
            self._lost()
            return
        error = self._refusal(reason)
        if error is not None:
            refused = isinstance(error, UserError)
            quiet = 0.0 if refused else _QUIET_SECONDS
            self._link.problems.note(self._what, str(error), refusal=refused, quiet=quiet)
        connection.ioloop.call_later(_RETRY_SECONDS, self.open)

    def _delivered(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        if self._closed or self._stopped:
            return  # what was on its way when the consumer was closed goes back to its queue
        try:
            self._hand_over(channel, method, properties, body)
        except Exception as error:  # a callback may raise anything; the driver would take it for a broken connection
            self._fail(error)

    def _hand_over(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        headers, unreadable = headers_of(properties)
        offset: int | None = None
        # the header is the broker's own on a stream; on a queue, whoever publishes may set it to anything
        if self._next is not None and isinstance(found := headers.get("x-stream-offset"), int):
            offset = found
            if isinstance(self._next, int) and offset < self._next:
                # streams deliver whole storage chunks: before what was asked for
                channel.basic_ack(method.delivery_tag)
                return
            self._next = offset + 1
        self._unacked.add(method.delivery_tag)
        self._on_delivery(
            Delivery(
                queue=self._queue,
                exchange=method.exchange,
                routing_key=words_of(method.routing_key) or "",
                body=body,
                headers=headers,
                message_id=words_of(properties.message_id),
                user_id=words_of(properties.user_id),
                redelivered=method.redelivered,
                timestamp=properties.timestamp,
                offset=offset,
                handle=(self, channel, method.delivery_tag),
                unreadable=unreadable,
            )
        )
