"""Publishing in confirm mode against a driver and a broker that are not there, and misbehave as real ones may."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import common.brokers.amqp.publisher
from common.brokers.amqp.publisher import Batch, Publisher
from common.brokers.problems import Problems
from common.errors import BrokerUnavailable, Unroutable
from common.wire.broker import Publication
from tests.integration.harness import eventually


class Loop:
    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def add_callback_threadsafe(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def call_later(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, self._calls.put, (call,))
        timer.daemon = True
        timer.start()

    def start(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def stop(self) -> None:
        self._calls.put(None)

    def close(self) -> None:
        pass


class Channel:
    """As much of pika's as the publisher uses."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection, self.number, self.is_open, self.published = connection, number, True, 0
        self._call = connection.ioloop.add_callback_threadsafe

    def add_on_return_callback(self, callback: Any) -> None:
        pass

    def add_on_close_callback(self, callback: Any) -> None:
        self._closed = callback

    def confirm_delivery(self, on_confirm: Any, callback: Any) -> None:
        self._on_confirm = on_confirm
        self._call(lambda: callback(None))

    def basic_publish(self, exchange: str, key: str, body: bytes, properties: Any, mandatory: bool) -> None:
        self.published += 1
        self.connection.broker.take(self, self.published, body)

    def confirm(self, tag: int) -> None:
        method = SimpleNamespace(NAME="Basic.Ack", delivery_tag=tag, multiple=False)
        self._call(lambda: self._on_confirm(SimpleNamespace(method=method)))

    def close(self, reason: str = "") -> None:
        """What was on its way comes a moment later."""
        self.is_open = False
        self._call(lambda: self.confirm(1))
        self._call(lambda: self._closed(self, RuntimeError(reason)))


class Connection:
    def __init__(self, broker: FakeBroker, number: int, opened: Any, gone: Any) -> None:
        self.broker, self.number, self.is_open, self.ioloop = broker, number, True, Loop()
        self.channels: list[Channel] = []
        self._gone = gone
        self.ioloop.add_callback_threadsafe(lambda: opened(self))

    def add_on_connection_blocked_callback(self, callback: Any) -> None:
        pass

    add_on_connection_unblocked_callback = add_on_connection_blocked_callback

    def channel(self, on_open_callback: Any) -> None:
        self.channels.append(channel := Channel(self, len(self.channels) + 1))
        self.ioloop.add_callback_threadsafe(lambda: on_open_callback(channel))

    def close(self) -> None:
        self.is_open = False
        self.ioloop.add_callback_threadsafe(lambda: self._gone(self, RuntimeError("closed")))


class FakeBroker:
    """On the first channel of a second connection it does as RabbitMQ 3.10.8 may with a stream whose writer it is about
    to replace: the first message is never confirmed, those that follow are, and none of them is stored."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.stored: list[bytes] = []
        self.silent = self.away = False
        self.confirms_after = 0.0
        #: The words with which it lets nobody in any more.
        self.refuses = ""

    def connect(self, opened: Any, gone: Any) -> Connection:
        if self.away or self.refuses:
            raise OSError(self.refuses or "nobody listens")
        self.connections.append(connection := Connection(self, len(self.connections) + 1, opened, gone))
        return connection

    def take(self, channel: Channel, tag: int, body: bytes) -> None:
        if self.silent:
            return
        lossy = (channel.connection.number, channel.number) == (2, 1)
        if not lossy:
            self.stored.append(body)
        if not lossy or tag > 1:
            later = threading.Timer(self.confirms_after, channel.confirm, (tag,))
            later.daemon = True
            later.start() if self.confirms_after else channel.confirm(tag)


Bench = tuple[FakeBroker, Publisher]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A publisher whose connection was lost once and is open again."""
    monkeypatch.setattr("common.brokers.amqp.link.BACKOFF_SECONDS", (0.01, 0.01))
    broker = FakeBroker()
    refusal = lambda reason: Unroutable(str(reason)) if str(reason) else None  # noqa: E731
    publisher = Publisher(
        broker.connect,
        (OSError,),
        lambda **given: SimpleNamespace(**given),
        refusal,
        Problems(30.0),
        lambda error, was_open: BrokerUnavailable(str(error)),
    )
    publisher.link.start()
    publish(publisher, b"before")
    broker.connections[0].close()
    eventually(lambda: publisher.link.generation == 2 and publisher.link.connected)
    yield broker, publisher
    publisher.link.close()


def publish(publisher: Publisher, body: bytes, timeout: float = 20.0) -> None:
    publisher.publish((Publication("x", "k", body),), timeout)


def test_a_channel_whose_confirm_is_overdue_is_replaced_and_nothing_is_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, publisher = bench
    monkeypatch.setattr(common.brokers.amqp.publisher, "DOUBT_SECONDS", 0.3)
    chunks = [b"first", b"second", b"third"]
    publisher.publish(tuple(Publication("x", "k", chunk) for chunk in chunks), 20.0)
    publish(publisher, b"next")
    assert broker.stored == [b"before", *chunks, b"next"]


def test_a_channel_is_not_doubted_for_the_time_that_the_broker_was_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, publisher = bench
    monkeypatch.setattr(common.brokers.amqp.publisher, "DOUBT_SECONDS", 0.5)
    broker.away, broker.confirms_after = True, 0.4  # in time, if the time is counted from the reopening
    broker.connections[1].close()
    eventually(lambda: not publisher.link.connected)
    back = threading.Timer(1.0, setattr, (broker, "away", False))
    back.daemon = True
    back.start()
    publish(publisher, b"waited")
    assert broker.stored == [b"before", b"waited"] and len(broker.connections[2].channels) == 1


def test_what_is_published_after_one_that_was_given_up_is_not_lost_with_it(bench: Bench) -> None:
    broker, publisher = bench
    with pytest.raises(BrokerUnavailable, match="confirmed nothing"):
        publish(publisher, b"given up", timeout=0.3)
    publish(publisher, b"next")
    assert broker.stored == [b"before", b"next"]


def test_a_confirm_of_an_old_channel_settles_nothing_of_a_new_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, publisher = bench
    broker.silent = True
    monkeypatch.setattr(common.brokers.amqp.publisher, "DOUBT_SECONDS", 0.3)
    with pytest.raises(BrokerUnavailable, match="confirmed nothing"):
        publish(publisher, b"never", timeout=1.0)
    assert [channel.published for channel in broker.connections[1].channels][:2] == [1, 1]


def test_an_exchange_that_is_missing_right_after_a_restart_is_waited_for(bench: Bench) -> None:
    broker, publisher = bench
    broker.silent = True
    problems: list[Exception] = []

    def publishing() -> None:
        try:
            publish(publisher, b"early")
        except BrokerUnavailable as error:
            problems.append(error)

    thread = threading.Thread(target=publishing, daemon=True)
    thread.start()
    channel = broker.connections[1].channels[0]
    eventually(lambda: channel.published == 1)
    publisher.link.post(lambda: channel.close("NOT_FOUND - no exchange 'x'"))
    thread.join(10.0)
    assert len(problems) == 1 and "yet" in str(problems[0])


def test_the_brokers_own_end_of_a_channel_that_is_given_up_fails_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, publisher = bench
    monkeypatch.setattr(common.brokers.amqp.publisher, "DOUBT_SECONDS", 0.3)
    channel, close = broker.connections[1].channels[0], Channel.close
    monkeypatch.setattr(Channel, "close", lambda self, reason="": close(self, "NOT_FOUND - no exchange 'x'"))
    publish(publisher, b"kept")
    assert broker.stored == [b"before", b"kept"]
    assert broker.connections[1].channels[0] is channel and len(broker.connections[1].channels) == 2


def test_a_doubt_is_about_what_the_doubted_channel_was_given() -> None:
    publications = tuple(Publication("x", "k", body) for body in (b"one", b"four", b"sixsix"))
    batch = Batch(publications)
    batch.give()
    batch.settle(0)  # by a channel that nobody doubts
    batch.give()
    batch.settle(1)
    batch.settle(2, BrokerUnavailable("no queue yet"))
    assert batch.done.is_set()
    batch.restart()
    assert batch.left == {}, "it is over, and its caller may be gone"
    batch = Batch(publications)
    batch.give()
    batch.settle(0)
    batch.give()
    batch.settle(1, BrokerUnavailable("no queue yet"))
    batch.restart()
    assert [index for index, _ in batch.give()] == [1, 2] and batch.error is None and batch.bytes_left == 10
