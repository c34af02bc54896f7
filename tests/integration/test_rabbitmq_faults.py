"""What happens to a RabbitMQ, and what its clients make of it: killed, alarmed, forbidding."""

from __future__ import annotations

import queue
import subprocess
import threading
import time
from pathlib import Path

import pytest

from common.broker import Delivery, Publication
from common.brokers import open_broker
from common.errors import AccessRefused, BrokerUnavailable, PublishRejected
from common.topology import Binding, Declarations, Exchange, Queue
from deploy.local_rabbitmq import LocalRabbitMQ
from tests.integration.harness import eventually

EXCHANGE = Exchange("x")
DECLARED = Declarations((EXCHANGE,), (Queue("q"),), (Binding("x", "q", "#"),))


def connect(url: str, **options: float):  # type: ignore[no-untyped-def]
    return open_broker(url, client_name="faults", dead_letters="letters", **options)


def test_a_broker_that_is_killed_loses_nothing_confirmed(private_rabbitmq: LocalRabbitMQ) -> None:
    publisher, consumer = connect(private_rabbitmq.url), connect(private_rabbitmq.url)
    publisher.declare(DECLARED)
    lost = threading.Event()
    consumer.lock("the-lock", lost.set)
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    consumer.consume("q", arrived.put, prefetch=10)
    confirmed: list[int] = []
    seen: list[int] = []
    stop = threading.Event()

    def publish() -> None:
        number = 0
        while not stop.is_set():
            try:
                publisher.publish(Publication("x", "k", b"%d" % number))
            except PublishRejected:
                # a queue that is not up yet rejects; the services try again, and so does this
                time.sleep(0.1)
                continue
            confirmed.append(number)
            number += 1

    def consume() -> None:
        while not stop.is_set() or len(set(seen)) < len(confirmed):
            try:
                delivery = arrived.get(timeout=0.2)
            except queue.Empty:
                continue
            seen.append(int(delivery.body))
            consumer.ack(delivery)

    workers = [threading.Thread(target=publish), threading.Thread(target=consume)]
    for worker in workers:
        worker.start()
    eventually(lambda: len(confirmed) > 50)
    # RabbitMQ 3 writes a fresh queue's declaration to disk a moment later; killed within it, the queue is broken
    time.sleep(3.0)
    private_rabbitmq.kill()
    eventually(lambda: not publisher.status().connected and not consumer.status().connected)
    before = len(confirmed)
    private_rabbitmq.start()
    eventually(lambda: len(confirmed) > before + 50, 60)
    stop.set()
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    assert set(confirmed) <= set(seen)
    assert publisher.status().reconnects >= 1 and not lost.is_set()
    # in order, but for what came twice
    firsts = list(dict.fromkeys(seen))
    assert firsts == sorted(firsts)
    publisher.close()
    consumer.close()


def test_an_alarm_stops_publishers_and_lets_consumers_drain(private_rabbitmq: LocalRabbitMQ) -> None:
    broker = connect(private_rabbitmq.url)
    broker.declare(DECLARED)
    for number in range(20):
        broker.publish(Publication("x", "k", b"%d" % number))
    private_rabbitmq.ctl("set_vm_memory_high_watermark", "0.0000001")
    done = threading.Event()

    def publish() -> None:
        broker.publish(Publication("x", "k", b"late"), timeout=5.0)
        done.set()

    threading.Thread(target=publish, daemon=True).start()
    reason = eventually(lambda: broker.status().blocked)
    assert "memory" in reason
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    broker.consume("q", arrived.put, prefetch=3)
    for number in range(20):
        delivery = arrived.get(timeout=10)
        assert delivery.body == b"%d" % number
        broker.ack(delivery)
    assert not done.wait(6.0), "a publish must wait for as long as the alarm lasts"
    private_rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
    assert done.wait(20) and broker.status().blocked is None
    assert arrived.get(timeout=10).body == b"late"
    broker.close()


def test_a_lock_that_another_took_meanwhile_is_lost(
    private_rabbitmq: LocalRabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.brokers.rabbitmq._LOCK_PATIENCE_SECONDS", 2.0)
    first, second = connect(private_rabbitmq.url), connect(private_rabbitmq.url)
    lost, arrived = threading.Event(), threading.Event()
    first.declare(DECLARED)
    first.lock("name", lost.set)
    first.consume("q", lambda delivery: arrived.set(), prefetch=1)
    # the broker cuts the first one's consuming connection, and the second is quicker
    monkeypatch.setattr("common.brokers.link.BACKOFF_SECONDS", (3.0, 3.0))
    private_rabbitmq.ctl("close_all_connections", "a test")
    eventually(lambda: not first.status().connected)
    third = connect(private_rabbitmq.url)
    third.lock("name", lambda: None)
    assert lost.wait(20)
    third.publish(Publication("x", "k", b"not for the first"))
    assert not arrived.wait(1.0), "who has lost the lock must not consume"
    for broker in (first, second, third):
        broker.close()


def test_accounts_and_addresses(private_rabbitmq: LocalRabbitMQ) -> None:
    host = f"127.0.0.1:{private_rabbitmq.port}"
    for url in (f"amqp://guest:hidden@{host}/", f"amqp://nobody:hidden@{host}/", f"amqp://guest:guest@{host}/none"):
        with pytest.raises(AccessRefused, match=r"does not let user '(guest|nobody)' in to vhost") as refused:
            connect(url)
        assert "hidden" not in str(refused.value) and host in str(refused.value)
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"no broker answers at 127\.0\.0\.1:1"):
        connect("amqp://127.0.0.1:1/", connect_timeout=1.0)
    assert time.monotonic() - started < 10

    broker = connect(private_rabbitmq.url)
    broker.declare(DECLARED)
    private_rabbitmq.ctl("add_user", "node", "secret")
    private_rabbitmq.ctl("set_permissions", "node", "^$", "^x$", "^q$")
    private_rabbitmq.ctl("set_topic_permissions", "node", "x", "^node\\.", "")
    limited = connect(f"amqp://node:secret@{host}/")
    with pytest.raises(AccessRefused, match="lacks a permission"):
        limited.declare(Declarations(queues=(Queue("mine"),)))
    with pytest.raises(AccessRefused, match="lacks a permission"):
        limited.publish(Publication("x", "other.key", b"forged"))
    limited.publish(Publication("x", "node.key", b"own"))  # the connection is as good as before
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    limited.consume("q", arrived.put, prefetch=1)
    delivery = arrived.get(timeout=10)
    assert (delivery.body, delivery.user_id) == (b"own", "node")
    for each in (broker, limited):
        each.close()


def test_a_consumer_may_come_before_its_queue(private_rabbitmq: LocalRabbitMQ) -> None:
    broker = connect(private_rabbitmq.url)
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    broker.consume("q", arrived.put, prefetch=1)
    broker.declare(DECLARED)
    broker.publish(Publication("x", "k", b"here"))
    assert arrived.get(timeout=10).body == b"here"
    broker.close()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_private_server_leaves_nothing_behind(tmp_path: Path, end: str) -> None:
    server = LocalRabbitMQ(tmp_path / "rabbitmq")
    server.start()
    assert str(tmp_path) in subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout
    getattr(server, end)()

    def left() -> list[str]:
        lines = subprocess.run(["ps", "axwwe"], capture_output=True, text=True).stdout.splitlines()
        return [line for line in lines if str(tmp_path) in line and "<defunct>" not in line]

    eventually(lambda: not left(), 10)
