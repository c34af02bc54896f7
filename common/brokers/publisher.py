"""Publishing over a link: batches in confirm mode, in order, again after a reconnect. Knows AMQP's words, no driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from common.broker import Publication
from common.brokers.batch import Batch
from common.brokers.link import Connect, Link
from common.errors import BrokerUnavailable, PublishRejected, SharedEncoderError, Unroutable

#: After a reconnect a queue that is missing may only not be up yet, for so many seconds.
_QUEUES_UP_SECONDS = 10.0


class Publisher:
    """Publishes batches in confirm mode; what had no confirm when the connection went is published again."""

    def __init__(
        self,
        connect: Connect,
        failures: tuple[type[Exception], ...],
        properties: Callable[..., Any],
        refusal: Callable[[Exception], SharedEncoderError | None],
    ) -> None:
        """`properties` makes a message's from keywords; `refusal` says why the broker closed a channel, if it did."""
        self.bytes_out = 0
        self._properties = properties
        self._refusal = refusal
        self._guard = threading.Lock()
        self._batches: list[Batch] = []
        self._channel: Any = None
        self._tag = 0
        self._unconfirmed: dict[int, tuple[Batch, int]] = {}
        self.link = Link("publish", connect, failures, self._open_channel)

    def publish(self, publications: tuple[Publication, ...], timeout: float) -> None:
        batch = Batch(publications)
        if not publications:
            return
        with self._guard:
            self._batches.append(batch)
        self.link.post(lambda: self._send(batch))
        try:
            while not batch.done.wait(0.2):
                if self.link.closing.is_set():
                    raise BrokerUnavailable("the connection is closed")
                if self.link.blocked is not None:
                    batch.progress_at = time.monotonic()  # an alarm is waited out, however long
                elif time.monotonic() - batch.progress_at > timeout:
                    raise BrokerUnavailable(f"the broker has confirmed nothing for {timeout:.0f} s")
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
            properties = self._properties(
                message_id=publication.message_id,
                headers=dict(publication.headers),
                timestamp=int(time.time()),
                correlation_id=str(self._tag),
            )
            self._channel.basic_publish(
                publication.exchange, publication.routing_key, publication.body, properties, publication.mandatory
            )
            self.bytes_out += len(publication.body)

    def _returned(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """No queue took it; its confirm follows and finds it settled.

        A broker that has just started takes connections before all of its queues are up: then it is worth another try.
        """
        batch, index = self._unconfirmed.get(int(properties.correlation_id), (None, 0))
        if batch is not None:
            text = f"no queue takes {method.routing_key!r} of {method.exchange}"
            early = self.link.reopened_within(_QUEUES_UP_SECONDS)
            batch.settle(index, BrokerUnavailable(f"{text} yet") if early else Unroutable(text))

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        tags = (
            [tag for tag in self._unconfirmed if tag <= method.delivery_tag]
            if method.multiple
            else [method.delivery_tag]
        )
        rejected = method.NAME == "Basic.Nack"
        for tag in tags:
            batch, index = self._unconfirmed.pop(tag, (None, 0))
            if batch is not None:
                batch.settle(index, PublishRejected("the queue is full") if rejected else None)

    def _channel_closed(self, channel: Any, reason: Exception) -> None:
        """The broker closes a channel for one bad publish: that one fails, the others go again on a new channel."""
        self._channel, self._unconfirmed = None, {}
        error = self._refusal(reason)
        if error is None:
            return
        with self._guard:
            for batch in self._batches:
                if any(f"'{publication.exchange}'" in str(error) for publication in batch.left.values()):
                    batch.fail(error)
        if self.link.connection.is_open:
            self._open_channel()
