"""What happens to a RabbitMQ, and what its clients make of it: killed, alarmed, forbidding."""

from __future__ import annotations

import queue
import secrets
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from common.brokers import open_broker
from common.clock import SYSTEM
from common.errors import AccessRefused, BrokerUnavailable, LockHeld, PublishRejected, Transient
from common.numbers.encodings import decode_vector, encode_vector
from common.numbers.layout import Layout
from common.wire.broker import Delivery, Publication
from common.wire.topology import Binding, Declarations, Exchange, Queue, Topology
from common.wire.versions import VersionReader
from deploy.commands.run import end_of_waiting
from deploy.local_rabbitmq import LocalRabbitMQ
from master_service.decisions.effects import Publish
from master_service.wire.publisher import Publisher
from tests.builders import encoded
from tests.integration.harness import eventually

EXCHANGE = Exchange("x")
DECLARED = Declarations((EXCHANGE,), (Queue("q"),), (Binding("x", "q", "#"),))


def connect(url: str, **options: float):  # type: ignore[no-untyped-def]
    return open_broker(url, client_name="faults", dead_letters="letters", notes="notes", **options)


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
        while publishing.is_alive() or not set(confirmed) <= set(seen):
            try:
                delivery = arrived.get(timeout=0.2)
            except queue.Empty:
                continue
            seen.append(int(delivery.body))
            consumer.ack(delivery)

    publishing = threading.Thread(target=publish, daemon=True)
    workers = [publishing, threading.Thread(target=consume, daemon=True)]
    for worker in workers:
        worker.start()
    eventually(lambda: len(confirmed) > 50)
    chunks = Declarations(queues=(Queue("chunks", "classic"),), bindings=(Binding("other", "chunks", "#"),))
    publisher.declare(Declarations((Exchange("other"),)) + chunks)
    for persistent in (True, False):
        publisher.publish(Publication("other", "k", b"%d" % persistent, persistent=persistent))
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
    # in whatever order: what was unacked may come again after others
    assert sorted(set(confirmed) - set(seen)) == []
    assert publisher.status().reconnects >= 1 and not lost.is_set()
    consumer.consume("chunks", arrived.put, prefetch=2)
    assert arrived.get(timeout=20).body == b"1"
    with pytest.raises(queue.Empty):
        arrived.get(timeout=0.5)  # what was transient is gone
    publisher.close()
    consumer.close()


def test_a_broker_that_restarts_again_and_again(private_rabbitmq: LocalRabbitMQ) -> None:
    publisher, consumer = connect(private_rabbitmq.url), connect(private_rabbitmq.url)
    names = ("q", "s", "deleted", "vanished")
    queues = tuple(Queue(name, "stream" if name == "s" else "quorum") for name in names)
    publisher.declare(Declarations((EXCHANGE,), queues, tuple(Binding("x", name, name) for name in names)))
    publisher.delete_queue("deleted")
    lost = threading.Event()
    consumer.lock("the-lock", lost.set)
    arrived: dict[str, queue.SimpleQueue[Delivery]] = {name: queue.SimpleQueue() for name in ("q", "s")}
    seen: dict[str, list[int]] = {"q": [], "s": []}
    offsets: list[int | None] = []
    confirmed: list[int] = []
    stop = threading.Event()
    consumer.consume("q", arrived["q"].put, prefetch=10)
    consumer.read_stream("s", arrived["s"].put, start="first", prefetch=10)

    def publish() -> None:
        for number in range(1_000_000):
            for name in ("q", "s"):
                while not stop.is_set():
                    try:
                        publisher.publish(Publication("x", name, b"%d" % number), timeout=20.0)
                        break
                    except Transient:
                        time.sleep(0.1)  # a queue that is not up yet rejects; the services try again, and so does this
            if stop.is_set():
                return
            confirmed.append(number)

    def take(name: str) -> None:
        while publishing.is_alive() or not set(confirmed) <= set(seen[name]):
            try:
                delivery = arrived[name].get(timeout=0.2)
            except queue.Empty:
                continue
            seen[name].append(int(delivery.body))
            if name == "s":
                offsets.append(delivery.offset)
            consumer.ack(delivery)

    publishing = threading.Thread(target=publish, daemon=True)
    workers = [publishing, *(threading.Thread(target=take, args=(name,), daemon=True) for name in arrived)]
    for worker in workers:
        worker.start()
    eventually(lambda: len(confirmed) > 50)
    private_rabbitmq.ctl("delete_queue", "vanished")
    time.sleep(3.0)  # RabbitMQ 3 writes a fresh queue's declaration to disk a moment later
    for end in (private_rabbitmq.stop, private_rabbitmq.kill, private_rabbitmq.stop):
        end()
        eventually(lambda: not publisher.status().connected and not consumer.status().connected)
        # counted now that it is down: to end takes it seconds, in which much was published still
        before = [len(numbers) for numbers in (confirmed, *seen.values())]
        private_rabbitmq.start()
        eventually(
            lambda before=before: all(
                len(numbers) > former + 50 for numbers, former in zip((confirmed, *seen.values()), before, strict=True)
            ),
            60,
        )
    stop.set()
    for worker in workers:
        worker.join(30)
    for name, numbers in seen.items():
        assert sorted(set(confirmed) - set(numbers)) == [], f"lost from {name}"
    firsts = list(dict.fromkeys(seen["s"]))
    assert firsts == sorted(firsts), "a stream is in order, but for what was written twice"
    assert offsets == list(range(len(offsets))), "a stream is read on where it was: nothing twice, nothing left out"
    for broker in (publisher, consumer):
        # the driver gives an attempt to connect 15 s, and the next waits up to 6 s more
        eventually(lambda broker=broker: broker.status().connected and broker.status().reconnects >= 3, 60)
    # declared again after each restart, but for what its declarer has deleted
    assert set(private_rabbitmq.ctl("-q", "list_queues", "name", "--no-table-headers").split()) == {
        "q",
        "s",
        "vanished",
        "the-lock",
        "the-lock.holder",
    }
    assert not lost.is_set()
    publisher.close()
    consumer.close()


def test_a_stream_that_somebody_deleted_is_there_again_with_the_next_version(amqp_url: str) -> None:
    topology, layout = Topology(f"deleted-{time.time_ns()}"), Layout([("weight", (3,))])
    broker, somebody = connect(amqp_url), connect(amqp_url)
    broker.declare(topology.master())
    master = Publisher(
        broker, topology, "float32", clock=SYSTEM, ending=threading.Event(), new_id=lambda: secrets.token_hex(8)
    )
    reader = VersionReader(somebody, topology, "tiny-1", layout.digest)
    for version in (1, 2):
        bodies = encode_vector(torch.full((3,), float(version)), "float32")
        master.version(Publish("tiny-1", version, 0.0), 1, layout.digest, encoded(bodies))
        read = reader.read(version, 0.0, timeout=20.0, patience=1.0)
        assert read.version == version and decode_vector(read.payload, 3, "float32").tolist() == [version] * 3
        somebody.delete_queue(topology.stream("tiny-1"))
    # F8: what the master lets go of itself, it makes anew as well
    master.delete_stream("tiny-1")
    bodies = encode_vector(torch.full((3,), 3.0), "float32")
    master.version(Publish("tiny-1", 3, 0.0), 1, layout.digest, encoded(bodies))
    assert reader.read(3, 0.0, timeout=20.0, patience=1.0).version == 3
    master.delete_stream("tiny-1")
    for queue_name in (topology.master_inbox, topology.master_updates):
        somebody.delete_queue(queue_name)
    broker.close()
    somebody.close()


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
    # but not one of somebody who was asked to end
    other, stop, given_up = connect(private_rabbitmq.url), threading.Event(), threading.Event()
    threading.Thread(target=end_of_waiting, args=(stop, other), daemon=True).start()

    def publish_too() -> None:
        with pytest.raises(BrokerUnavailable, match="closed"):
            other.publish(Publication("x", "k", b"too"))
        given_up.set()

    threading.Thread(target=publish_too, daemon=True).start()
    assert not given_up.wait(2.0)
    stop.set()
    assert given_up.wait(15)
    private_rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
    assert done.wait(20) and broker.status().blocked is None
    while arrived.get(timeout=10).body != b"late":
        pass  # what was given up may have arrived too
    broker.close()


# private: no public verb closes one of the two connections, and ctl closes both
def test_a_lock_that_another_took_meanwhile_is_lost(
    private_rabbitmq: LocalRabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.brokers.amqp.rabbitmq.LOCK_PATIENCE_SECONDS", 2.0)
    first, second = connect(private_rabbitmq.url), connect(private_rabbitmq.url)
    lost, arrived = threading.Event(), threading.Event()
    first.declare(DECLARED)
    first.lock("name", lost.set)
    first.consume("q", lambda delivery: arrived.set(), prefetch=1)
    # the broker cuts the first one's consuming connection, and the second is quicker
    monkeypatch.setattr("common.brokers.amqp.link.BACKOFF_SECONDS", (3.0, 3.0))
    private_rabbitmq.ctl("close_all_connections", "a test")
    eventually(lambda: not first.status().connected)
    third = connect(private_rabbitmq.url)
    third.lock("name", lambda: None)
    eventually(lambda: first.status().connected)
    first.consume("q", lambda delivery: arrived.set(), prefetch=1)  # nor with a new consumer, while it tries or after
    assert lost.wait(20)
    third.publish(Publication("x", "k", b"not for the first"))
    assert not arrived.wait(1.0), "who has lost the lock must not consume"
    # nothing public closes one of the two connections: a broker does that, and `ctl` closes both
    first._consumer.post(lambda: first._consumer.connection.close())  # one more reconnect, which asks for no lock
    eventually(lambda: first._consumer.generation == 3 and first.status().connected)
    assert not arrived.wait(1.0), "nor after a further reconnect"
    for broker in (first, second, third):
        broker.close()


def test_who_holds_a_lock_is_only_a_hint(private_rabbitmq: LocalRabbitMQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.brokers.amqp.locks.REFUSAL_SECONDS", 0.5)
    url = private_rabbitmq.url
    first, second, third = connect(url), connect(url), connect(url)
    first.lock("lock", lambda: None)
    with pytest.raises(LockHeld, match=r"lock is held by another connection \(user guest, process \d+ on "):
        second.lock("lock", lambda: None)
    # only its consuming connection goes, as if it had crashed: a clean `close` takes its note with it
    first._consumer.close()  # private: no public verb closes one of the two connections
    # under an alarm no note can be written; a lock must be taken all the same, and its predecessor not be named
    private_rabbitmq.ctl("set_vm_memory_high_watermark", "0.0000001")
    began = time.monotonic()
    second.lock("lock", lambda: None)
    assert time.monotonic() - began < 8.0
    with pytest.raises(LockHeld, match="lock is held by another connection: it is running already"):
        third.lock("lock", lambda: None)
    private_rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
    # an account that may take the lock and nothing else
    private_rabbitmq.ctl("add_user", "node", "secret")
    private_rabbitmq.ctl("set_permissions", "node", "^mine$", "^$", "^$")
    limited = connect(url.replace("guest:guest", "node:secret"))
    limited.lock("mine", lambda: None)
    with pytest.raises(LockHeld, match="mine is held by another connection: it is running already"):
        third.lock("mine", lambda: None)
    with pytest.raises(AccessRefused, match="lacks a permission"):
        limited.lock("not-mine", lambda: None)
    for broker in (first, second, third, limited):
        broker.close()
    assert not private_rabbitmq.ctl("-q", "list_queues", "name", "--no-table-headers").split(), "notes go with locks"


def test_a_broker_that_dies_during_the_greeting_is_away_and_has_refused_nobody(
    private_rabbitmq: LocalRabbitMQ,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as cut:

        def serve() -> None:
            while True:
                try:
                    client, _ = cut.accept()
                except OSError:
                    return  # the test is over
                with client, socket.create_connection(("127.0.0.1", private_rabbitmq.port)) as server:
                    server.sendall(client.recv(8))
                    client.sendall(server.recv(65_536))
                    client.recv(65_536)  # user and password, which are never answered

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(BrokerUnavailable, match=r"no broker answers at 127\.0\.0\.1"):
            connect(f"amqp://guest:guest@127.0.0.1:{cut.getsockname()[1]}/", connect_timeout=1.0)


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
