"""What any member may publish to a RabbitMQ: it is set aside with its reason, and whoever comes next is heard."""

from __future__ import annotations

import queue
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pytest
import structlog

from common.brokers import open_broker
from common.brokers.amqp import rabbitmq
from common.errors import Poison
from common.wire.broker import Broker, Delivery, Publication
from common.wire.codec import encode, received
from common.wire.to_master import Leave
from common.wire.topology import Binding, Declarations, Exchange, Queue
from tests.builders import ODD_FIELDS, header_table
from tests.integration.harness import eventually

DECLARED = Declarations(
    (Exchange("poison"), Exchange("dead")),
    (Queue("poisoned"), Queue("letters"), Queue("poisoned.stream", "stream")),
    (Binding("poison", "poisoned", "#"), Binding("poison", "poisoned.stream", "#"), Binding("dead", "letters", "#")),
)
#: What a RabbitMQ carries of what the driver cannot read.
CARRIED = [field for field in ODD_FIELDS.values() if field[:1] in (b"T", b"F")]
LEAVE = encode(Leave(node="n", incarnation="i"))


class Raw(pika.BasicProperties):
    """Properties that are a header table as these bytes say."""

    def __init__(self, table: bytes) -> None:
        super().__init__()
        self.table = table

    def encode(self) -> list[bytes]:
        return [struct.pack(">H", self.FLAG_HEADERS), self.table]


@contextmanager
def connected(url: str) -> Iterator[Broker]:
    broker = open_broker(url, client_name="t", dead_letters="dead")
    try:
        for name in ("poisoned", "letters", "poisoned.stream"):
            broker.delete_queue(name)
        broker.declare(DECLARED)
        yield broker
    finally:
        broker.close()


def publish(url: str, *messages: tuple[str | bytes, Any]) -> None:
    """As a member does that has written its own client."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for key, properties in messages:
            channel.basic_publish("poison", key, LEAVE, properties)


def test_f1_headers_that_nobody_can_read_are_set_aside_and_who_comes_after_them_is_heard(amqp_url: str) -> None:
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    streamed: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    letters: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    with connected(amqp_url) as broker:
        broker.consume("poisoned", arrived.put, prefetch=1)
        broker.consume("letters", letters.put, prefetch=100)
        broker.read_stream("poisoned.stream", streamed.put, start="first")
        publish(amqp_url, *(("k", Raw(header_table(field))) for field in CARRIED))
        broker.publish(Publication("poison", "k", LEAVE, {"x-a": "b"}))
        for _ in CARRIED:
            delivery = arrived.get(timeout=20.0)
            with pytest.raises(Poison) as poison:
                received(delivery)
            broker.dead_letter(delivery, poison.value.reason, poison.value.detail)
        last = arrived.get(timeout=20.0)
        assert received(last) == Leave(node="n", incarnation="i")
        broker.ack(last)
        came = [letters.get(timeout=20.0) for _ in CARRIED]
        assert {(each.routing_key, each.body) for each in came} == {("headers", LEAVE)}
        assert all(str(each.headers["x-detail"]).startswith("the headers cannot be read: ") for each in came)
        passed = [streamed.get(timeout=20.0) for _ in range(len(CARRIED) + 1)]
        assert (passed[-1].headers["x-a"], passed[-1].offset, passed[-1].unreadable) == ("b", len(CARRIED), "")
        assert (broker.status().reconnects, broker.status().problem, broker.status().failed) == (0, "", "")


def test_f1_an_offset_that_is_no_streams_own_and_keys_that_are_no_text_cut_nobody_off(amqp_url: str) -> None:
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    offsets: list[Any] = ["abc", [1], None, -(2**63), True, 1 << 40]
    with connected(amqp_url) as broker:
        broker.consume("poisoned", arrived.put, prefetch=100)
        publish(amqp_url, *(("k", pika.BasicProperties(headers={"x-stream-offset": each})) for each in offsets))
        publish(amqp_url, (b"\xff.join", pika.BasicProperties(message_id=b"\xfe", timestamp=2**64 - 1)))
        came = [arrived.get(timeout=20.0) for _ in range(len(offsets) + 1)]
        assert [each.offset for each in came] == [None] * len(came)
        assert (came[-1].routing_key, came[-1].message_id) == (r"\xff.join", r"\xfe")
        for each in came:
            broker.dead_letter(each, "invalid", "a test")
        assert (broker.status().reconnects, broker.status().problem, broker.status().failed) == (0, "", "")


def test_f1_the_third_connection_lost_in_a_row_is_a_warning_that_names_the_queue(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*_: Any) -> None:
        raise ArithmeticError("what nobody has thought of yet")

    with connected(amqp_url) as broker, structlog.testing.capture_logs() as logs:
        broker.publish(Publication("poison", "k", LEAVE))
        with monkeypatch.context() as patched:
            patched.setattr(rabbitmq.pika.spec.BasicProperties, "decode", stumble)
            broker.consume("poisoned", lambda _: None, prefetch=1)
            told = eventually(lambda: [each for each in logs if each.get("queue") == "poisoned"], what="the warning")
        assert (told[0]["log_level"], told[0]["times"]) == ("warning", 3) and len(told) == 1
        eventually(lambda: broker.status().connected and not broker.status().problem)
