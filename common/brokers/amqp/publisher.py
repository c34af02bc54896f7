"""Publishing over a link: batches in confirm mode, in order, again after a reconnect. Knows AMQP's words, no driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from common.brokers.amqp.link import Connect, Explain, Link
from common.brokers.problems import Problems
from common.clock import SYSTEM
from common.errors import (
    AccessRefused,
    BrokerUnavailable,
    PublishRejected,
    SharedEncoderError,
    Unpublishable,
    Unroutable,
)
from common.wire.broker import Publication

#: After a reconnect a queue or an exchange that is missing may only not be up yet, for so many seconds.
_QUEUES_UP_SECONDS = 10.0
#: After this long without a confirm a channel is doubted, once per connection; seconds.
DOUBT_SECONDS = 15.0
#: A channel that the broker closed with nothing published on it is opened again after so many seconds.
_REOPEN_SECONDS = 1.0
#: A slow line gets more time: at least this many bytes a second are expected of it.
_SLOW_LINE = 64 * 1024


class Batch:
    """The publications of one `publish` call, and which of them the broker has not confirmed yet.

    `left` holds what is unconfirmed, in order; `done` is set when nothing is left.

    `progress_at`, `sent_at`: when something of it was last settled, and when it was last given to a channel, both in
    seconds of the monotonic clock. `bytes_left`: of what is unconfirmed, kept because another thread reads it.
    """

    def __init__(self, publications: tuple[Publication, ...]) -> None:
        self.left = dict(enumerate(publications))
        self.bytes_left = sum(len(each.body) for each in publications)
        self.done = threading.Event()
        self.error: SharedEncoderError | None = None
        self.progress_at = self.sent_at = SYSTEM.monotonic()
        self._given: dict[int, Publication] = {}

    def give(self) -> list[tuple[int, Publication]]:
        """The publications to send on a new channel; from now on they count as given to it."""
        self.sent_at, self._given = SYSTEM.monotonic(), dict(self.left)
        return list(self.left.items())

    def restart(self) -> None:
        """Distrust what the channel has confirmed: all that it was given is unconfirmed again."""
        if self._given and not self.done.is_set():
            self.left, self.error = dict(self._given), None
            self.bytes_left = sum(len(each.body) for each in self.left.values())

    def settle(self, index: int, error: SharedEncoderError | None = None) -> None:
        publication = self.left.pop(index, None)
        self.bytes_left -= len(publication.body) if publication is not None else 0
        if self.error is None or isinstance(self.error, Unroutable):
            self.error = error or self.error  # that one found no queue says that all else has arrived
        self.progress_at = SYSTEM.monotonic()
        if not self.left:
            self.done.set()

    def fail(self, error: SharedEncoderError) -> None:
        self.error = self.error or error
        self.left.clear()
        self.done.set()


class Publisher:
    """Publishes batches in confirm mode; what had no confirm when the connection went is published again.

    A channel on which a confirm is overdue is not published on any more: a RabbitMQ that has just started may give
    a message to a stream's writer that it is about to replace; that message is never confirmed, and of those that
    follow on the channel some are confirmed as duplicates and stored nowhere (seen with 3.10.8, after 2 of 113
    kills). So what is unconfirmed then goes out on another channel, and with it all that its batch had on the old
    one. What another thread has published there meanwhile, and believes stored, is out of reach: one thread alone
    may write to streams.

    Nor on one whose publish was rejected. To a quorum queue a channel of RabbitMQ 3.10.8 finds its way with the first
    message; opened while the queue's leader is being elected anew, because its server has died, it goes on asking that
    server, and rejects all until it is back. A channel that is opened later finds the new one.

    The broker closes a channel for one bad publish (forbidden, no such exchange, too large), and its words need not say
    which. Only one that was unconfirmed can be it. So, unless there is but one, these are published again one at a
    time: the one after which the channel is closed again is the bad one, its batch fails with the broker's words, and
    all others go on together.
    """

    def __init__(
        self,
        connect: Connect,
        failures: tuple[type[Exception], ...],
        properties: Callable[..., Any],
        refusal: Callable[[Exception], SharedEncoderError | None],
        problems: Problems,
        explain: Explain,
    ) -> None:
        """`properties` makes a message's from keywords; `refusal` says why the broker closed a channel for what was
        published on it, if it did."""
        self.bytes_out = 0
        self._properties = properties
        self._refusal = refusal
        self._guard = threading.Lock()
        self._batches: list[Batch] = []
        #: The channel that was opened last, and the same once it can be published on.
        self._newest: Any = None
        self._channel: Any = None
        self._tag = 0
        self._unconfirmed: dict[int, tuple[Batch, int]] = {}
        #: In the link's thread: the batches one of which holds a bad publish, while it is looked for.
        self._suspects: list[Batch] = []
        self._doubted = 0
        self.link = Link("publish", connect, failures, self._open_channel, problems, explain)

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
                self._go_on_waiting()
                if self.link.blocked is not None:
                    batch.progress_at = SYSTEM.monotonic()  # an alarm is waited out, however long
                    continue
                now = SYSTEM.monotonic()
                if now - batch.progress_at > timeout:
                    self._doubt(self._channel)
                    raise BrokerUnavailable(f"the broker has confirmed nothing for {timeout:.0f} s{self.link.why()}")
                silence, on_its_way = now - max(batch.progress_at, batch.sent_at), batch.bytes_left / _SLOW_LINE
                if silence > DOUBT_SECONDS + on_its_way and self._doubted < self.link.generation:
                    self._doubt(self._channel)
        finally:
            with self._guard:
                self._batches.remove(batch)
        if isinstance(batch.error, PublishRejected):
            self._replace(self._channel)
        if batch.error is not None:
            raise batch.error

    def _go_on_waiting(self) -> None:
        """Raises AccessRefused if the broker lets us in no more, InternalError after a bug."""
        if self.link.connected:
            self.link.problems.check()
        else:
            self.link.problems.check_waiting()

    def _doubt(self, channel: Any) -> None:
        """A confirm of this channel is overdue; once per connection."""

        def doubt() -> None:
            if self._replaced(channel):
                self._doubted = self.link.generation

        self.link.post(doubt)

    def _replace(self, channel: Any) -> None:
        def replace() -> None:
            self._replaced(channel)

        self.link.post(replace)

    def _replaced(self, channel: Any) -> bool:
        """In the link's thread: close a channel, if it is still the one in use, and publish every open batch anew on
        another."""
        if channel is None or channel is not self._channel or not channel.is_open:
            return False
        with self._guard:
            for batch in self._batches:
                batch.restart()
        self._open_channel()
        channel.close()
        return True

    def _open_channel(self) -> None:
        self._newest = self._channel = None
        self.link.connection.channel(on_open_callback=self._channel_open)

    def _channel_open(self, channel: Any) -> None:
        self._newest = channel
        channel.add_on_return_callback(self._returned)
        channel.add_on_close_callback(self._channel_closed)
        channel.confirm_delivery(partial(self._confirmed, channel), callback=lambda frame: self._ready(channel))

    def _ready(self, channel: Any) -> None:
        self._channel, self._tag, self._unconfirmed = channel, 0, {}
        self.link.problems.over("publishing")
        if self._suspects:
            self._send_one()
        else:
            self._send_all()

    def _send_all(self) -> None:
        with self._guard:
            waiting = list(self._batches)
        for batch in waiting:
            self._send(batch)

    def _send(self, batch: Batch) -> None:
        """Publish what of a batch is unconfirmed; called once per batch and channel."""
        if self._suspects or self._channel is None or not self._channel.is_open:
            return  # its turn comes when the bad publish is found, or when there is a channel
        if any(each is batch for each, _ in self._unconfirmed.values()):
            return
        for index, publication in batch.give():
            if not self._put(batch, index, publication):
                return

    def _send_one(self) -> None:
        """Publish the next that may be the bad one, once the one before is confirmed; all else when none is left."""
        if self._unconfirmed or self._channel is None or not self._channel.is_open:
            return
        while self._suspects:
            index, publication = next(iter(self._suspects[0].left.items()), (0, None))
            if publication is None:
                del self._suspects[0]
            elif self._put(self._suspects[0], index, publication):
                return
        self._send_all()

    def _put(self, batch: Batch, index: int, publication: Publication) -> bool:
        """Write one message to the channel; False, and the batch fails, if it cannot be written as AMQP at all."""
        try:
            properties = self._properties(
                message_id=publication.message_id,
                headers=dict(publication.headers),
                timestamp=int(SYSTEM.now()),
                correlation_id=str(self._tag + 1),
                delivery_mode=2 if publication.persistent else 1,
                **({} if publication.user_id is None else {"user_id": publication.user_id}),
            )
            self._channel.basic_publish(
                publication.exchange, publication.routing_key, publication.body, properties, publication.mandatory
            )
        except Exception as error:  # raised before anything is written, for its caller and not for this thread
            if not self._channel.is_open:
                raise
            batch.fail(Unpublishable(f"a message to {publication.exchange} cannot be written as AMQP: {error!r}"))
            return False
        self._tag += 1
        self._unconfirmed[self._tag] = (batch, index)
        self.bytes_out += len(publication.body)
        return True

    def _returned(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """No queue took it; its confirm follows and finds it settled.

        A broker that has just started takes connections before all of its queues are up: then it is worth another try.
        """
        batch, index = self._unconfirmed.get(int(properties.correlation_id), (None, 0))
        if batch is not None and channel is self._channel:
            text = f"no queue takes {method.routing_key!r} of {method.exchange}"
            early = self.link.reopened_within(_QUEUES_UP_SECONDS)
            batch.settle(index, BrokerUnavailable(f"{text} yet") if early else Unroutable(text))

    def _confirmed(self, channel: Any, frame: Any) -> None:
        if channel is not self._channel:
            return
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
        if self._suspects:
            self._send_one()

    def _channel_closed(self, channel: Any, reason: Exception) -> None:
        """The broker closes a channel for one bad publish: that one fails, the others go again on a new channel."""
        if channel is not self._newest:
            return
        # what came back unroutable was taken: its confirm was on its way
        sent = [(batch, index) for batch, index in self._unconfirmed.values() if index in batch.left]
        self._channel, self._unconfirmed = None, {}
        error = self._refusal(reason)
        if error is None:
            return
        if isinstance(error, Unroutable) and self.link.reopened_within(_QUEUES_UP_SECONDS):
            error = BrokerUnavailable(f"{error} yet")  # a broker that lost its disk: all is declared again beside this
        if len(sent) == 1 and isinstance(error, Unroutable):
            sent[0][0].settle(sent[0][1], error)
            self._suspects = []
        elif len(sent) == 1:
            sent[0][0].fail(error)
            if isinstance(error, AccessRefused):
                self.link.problems.tell("publishing", str(error))
            self._suspects = []
        elif sent:
            self._suspect(dict.fromkeys(batch for batch, _ in sent), str(error))
        else:
            self.link.problems.note("publishing", str(error))
        connection = self.link.connection
        if connection.is_open and (sent or self._suspects):
            self._open_channel()
        elif connection.is_open:
            connection.ioloop.call_later(_REOPEN_SECONDS, lambda: self._open_channel() if connection.is_open else None)

    def _suspect(self, batches: Iterable[Batch], words: str) -> None:
        """Look for the bad publish among these, first where the broker's words name the exchange."""

        def not_named(batch: Batch) -> bool:
            return not any(f"'{publication.exchange}'" in words for publication in batch.left.values())

        with self._guard:
            open_ones = [batch for batch in batches if batch in self._batches]
        self._suspects = sorted(open_ones, key=not_named)
        for batch in self._suspects:
            batch.give()
