"""What we ask of the driver beside its interface: if a new version of it ignores that, this says so."""

from __future__ import annotations

import os
import queue
import secrets
import socket
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.broker_url import Access
from common.brokers import open_broker
from common.brokers.amqp import rabbitmq
from common.brokers.amqp.arguments import body_frames
from common.errors import PublishRejected
from common.wire.broker import Broker, Delivery, Publication
from common.wire.topology import MIB, Binding, Declarations, Exchange, Queue
from tests.integration.harness import eventually
from tests.integration.peers import between, http_proxy


@given(st.integers(1, 65_535), st.binary(max_size=70), st.integers(1, 40))
def test_a_bodys_frames_are_the_drivers_own(channel: int, body: bytes, most: int) -> None:
    parts = [body[start : start + most] for start in range(0, len(body), most)]
    assert body_frames(channel, body, most) == [pika.frame.Body(channel, part).marshal() for part in parts]


def roundtrip(broker: Broker, body: bytes) -> None:
    name, arrived = f"driver-{secrets.token_hex(4)}", queue.SimpleQueue[Delivery]()
    broker.declare(Declarations((Exchange(name),), (Queue(name, "classic"),), (Binding(name, name, "#"),)))
    broker.publish(Publication(name, "k", body))
    broker.consume(name, arrived.put, prefetch=1)
    assert arrived.get(timeout=20.0).body == body
    broker.delete_queue(name)


@pytest.mark.parametrize("proxied", [False, True])
def test_sockets_are_read_in_large_pieces_and_bodies_are_written_by_us(
    amqp_url: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, sent = set[int](), list[int]()
    # private: what the driver calls for a body, and no public verb does
    recv, send = socket.socket.recv, rabbitmq.Connection._send_message

    def read(self: socket.socket, size: int, *flags: int) -> bytes:
        data = recv(self, size, *flags)
        if len(data) > 2048:  # what is read of this body, and nobody's small talk
            asked.add(size)
        return data

    def written(self: Any, channel: int, method: Any, content: Any) -> None:
        sent.append(len(content[1]))
        send(self, channel, method, content)

    monkeypatch.setattr(socket.socket, "recv", read)
    # private: as above
    monkeypatch.setattr(rabbitmq.Connection, "_send_message", written)
    with between(http_proxy()) as proxy:
        # read here with the relay's own size too, which is why only what the broker's connection asks for is looked at
        access = Access((amqp_url,), proxy=f"http://127.0.0.1:{proxy.port}" if proxied else None)
        broker = open_broker(access, client_name="driver", dead_letters=None)
        roundtrip(broker, os.urandom(4 * MIB))
        broker.close()
    assert 4 * MIB in sent
    assert rabbitmq.READ_BYTES in asked and 4096 not in asked


def test_a_channel_that_rejected_a_message_is_not_published_on_again(amqp_url: str) -> None:
    """To a quorum queue whose server died such a channel rejects everything, as long as that server is away."""
    broker, name = open_broker(amqp_url, client_name="rejected", dead_letters=None), f"full-{secrets.token_hex(4)}"
    full = Queue(name, "quorum", max_length=1, overflow="reject-publish")
    broker.declare(Declarations((Exchange(name),), (full,), (Binding(name, name, "#"),)))
    publisher = broker._publisher  # type: ignore[attr-defined]  # private: no public verb shows a channel
    before = publisher._channel  # private: as above
    with pytest.raises(PublishRejected):
        for _ in range(20):
            broker.publish(Publication(name, "k", b"one too many"))
    # private: as above
    eventually(lambda: publisher._channel not in (None, before) and not before.is_open)
    roundtrip(broker, b"over another channel")
    broker.delete_queue(name)
    broker.close()
