"""What every broker must do; one suite, run against each implementation."""

from __future__ import annotations

import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from common.brokers import open_broker
from common.brokers.memory import MemoryBroker, MemoryServer
from common.errors import LockHeld, PublishRejected, Unroutable, UserError
from common.wire.broker import Broker, Delivery, Publication, StreamPosition, Timestamp
from common.wire.topology import MAX_BODY_BYTES, Binding, Declarations, Exchange, Queue


class Bench:
    """Connections to one broker, names of one test's own, and what was delivered."""

    def __init__(self, connect: Any) -> None:
        self._connect = connect
        self.brokers: list[Broker] = []
        self.prefix = f"contract-{uuid.uuid4().hex[:10]}"
        self.topic, self.direct = Exchange(self.name("topic")), Exchange(self.name("direct"), "direct")
        self.letters = Exchange(self.name("letters"))
        self.queues: set[str] = set()
        self.broker = self.connect()
        dead = Queue(self.name("dead"), "classic")
        self.declare(
            Declarations(
                (self.topic, self.direct, self.letters), (dead,), (Binding(self.letters.name, dead.name, "#"),)
            )
        )

    def name(self, name: str) -> str:
        return f"{self.prefix}.{name}"

    def connect(self) -> Broker:
        broker: Broker = self._connect(self.name("letters"))
        self.brokers.append(broker)
        return broker

    def declare(self, declarations: Declarations) -> None:
        self.broker.declare(declarations)
        self.queues |= {each.name for each in declarations.queues}

    def queue(self, name: str = "q", key: str = "#", **options: Any) -> str:
        """A queue bound to the topic exchange; gives its name."""
        made = Queue(self.name(name), **options)
        self.declare(Declarations(queues=(made,), bindings=(Binding(self.topic.name, made.name, key),)))
        return made.name

    def publish(self, *bodies: bytes, key: str = "k", broker: Broker | None = None) -> None:
        (broker or self.broker).publish(*(Publication(self.topic.name, key, body) for body in bodies))

    def end(self) -> None:
        for name in self.queues:
            self.broker.delete_queue(name)
        for broker in self.brokers:
            broker.close()


class Inbox:
    """Collects deliveries; `next` fails the test if none comes."""

    def __init__(self) -> None:
        self.arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()

    def __call__(self, delivery: Delivery) -> None:
        self.arrived.put(delivery)

    def next(self, seconds: float = 10.0) -> Delivery:
        return self.arrived.get(timeout=seconds)

    def take(self, count: int) -> list[Delivery]:
        return [self.next() for _ in range(count)]

    def is_silent(self, seconds: float = 0.3) -> bool:
        try:
            self.arrived.get(timeout=seconds)
        except queue.Empty:
            return True
        return False


@pytest.fixture(params=["memory", "rabbitmq"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    if request.param == "memory":
        server = MemoryServer()
        made = Bench(lambda letters: MemoryBroker(server, user="guest", dead_letters=letters))
    else:
        url = request.getfixturevalue("amqp_url")

        def connect(letters: str) -> Broker:
            notes = letters.replace("letters", "lock")
            return open_broker(url, client_name="contract", dead_letters=letters, notes=notes)

        made = Bench(connect)
    yield made
    made.end()


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.body for delivery in deliveries]


def test_a_queue_is_first_in_first_out_and_an_ack_removes(bench: Bench) -> None:
    name, inbox = bench.queue(), Inbox()
    sent = [b"%d" % i for i in range(300)]
    bench.publish(*sent[:200])
    subscription = bench.broker.consume(name, inbox, prefetch=500)
    bench.publish(*sent[200:])
    got = inbox.take(300)
    assert bodies(got) == sent and not any(delivery.redelivered for delivery in got)
    bench.broker.ack(*got)
    subscription.close()
    again = Inbox()
    bench.broker.consume(name, again, prefetch=500)
    assert again.is_silent()


def test_routing(bench: Bench) -> None:
    patterns = {"one": "a.*", "rest": "a.#", "all": "#", "exact": "a.b.c", "middle": "*.b.#"}
    inboxes = {name: Inbox() for name in patterns}
    for name, pattern in patterns.items():
        bench.broker.consume(bench.queue(name, pattern), inboxes[name], prefetch=100)
    expected = {
        "a": ["all", "rest"],
        "a.b": ["all", "middle", "one", "rest"],
        "a.b.c": ["all", "exact", "middle", "rest"],
        "b": ["all"],
        "x.b.c.d": ["all", "middle"],
    }
    for key in expected:
        bench.publish(key.encode(), key=key)
    got: dict[str, list[str]] = {key: [] for key in expected}
    for name, inbox in inboxes.items():
        for delivery in inbox.take(sum(name in names for names in expected.values())):
            assert delivery.routing_key == delivery.body.decode() and delivery.exchange == bench.topic.name
            got[delivery.routing_key].append(name)
        assert inbox.is_silent(0.05)
    assert {key: sorted(names) for key, names in got.items()} == expected

    straight = Queue(bench.name("straight"))
    bench.declare(Declarations(queues=(straight,), bindings=(Binding(bench.direct.name, straight.name, "a.*"),)))
    inbox = Inbox()
    bench.broker.consume(straight.name, inbox, prefetch=1)
    bench.broker.publish(Publication(bench.direct.name, "a.*", b"hit"))
    with pytest.raises(Unroutable):
        bench.broker.publish(Publication(bench.direct.name, "a.b", b"miss"))
    assert inbox.next().body == b"hit"


def test_what_no_queue_takes_raises_and_the_rest_of_a_batch_arrives(bench: Bench) -> None:
    name, inbox = bench.queue(key="known"), Inbox()
    bench.broker.consume(name, inbox, prefetch=10)
    with pytest.raises(Unroutable):
        bench.publish(b"lost", key="unknown")
    bench.broker.publish(Publication(bench.topic.name, "unknown", b"dropped", mandatory=False))
    with pytest.raises(Unroutable):
        bench.broker.publish(Publication(bench.name("no-such-exchange"), "k", b"x"))
    bench.publish(b"after", key="known")  # the connection is as good as before
    assert inbox.next().body == b"after"


def test_prefetch_bounds_what_is_unacked(bench: Bench) -> None:
    name, inbox = bench.queue(), Inbox()
    bench.publish(*(b"%d" % i for i in range(10)))
    bench.broker.consume(name, inbox, prefetch=3)
    first = inbox.take(3)
    assert inbox.is_silent()
    bench.broker.ack(first[1])
    assert inbox.next().body == b"3"
    assert inbox.is_silent()
    bench.broker.ack(*first)  # one of them for the second time, which has no effect
    assert bodies(inbox.take(2)) == [b"4", b"5"] and inbox.is_silent()


@pytest.mark.parametrize("goes", ["subscription", "connection"])
def test_unacked_deliveries_come_back_in_order_and_marked(bench: Bench, goes: str) -> None:
    name, inbox, other = bench.queue(), Inbox(), bench.connect()
    bench.publish(*(b"%d" % i for i in range(4)))
    subscription = other.consume(name, inbox, prefetch=4)
    got = inbox.take(4)
    other.ack(got[0])
    if goes == "subscription":
        subscription.close()
    else:
        other.close()
    bench.publish(b"4", b"5")
    again = Inbox()
    bench.broker.consume(name, again, prefetch=10)
    back = again.take(5)  # before what came later
    assert bodies(back) == [b"1", b"2", b"3", b"4", b"5"]
    assert [delivery.redelivered for delivery in back] == [True, True, True, False, False]
    if goes == "subscription":
        other.ack(*got)  # handles of a closed subscription
    bench.broker.ack(*back)
    bench.publish(b"after")
    assert again.next().body == b"after"


def test_what_came_before_a_stop_may_still_be_acked_and_the_rest_goes_back_at_the_close(bench: Bench) -> None:
    name, inbox, again = bench.queue(), Inbox(), Inbox()
    bench.publish(*(b"%d" % i for i in range(4)))
    subscription = bench.broker.consume(name, inbox, prefetch=3)
    got = inbox.take(3)
    subscription.stop()
    bench.broker.ack(got[0])
    assert inbox.is_silent()
    bench.broker.consume(name, again, prefetch=10)
    assert again.next().body == b"3", "what was not delivered is for others at once"
    bench.broker.ack(got[1])
    subscription.close()
    back = again.next()
    assert (back.body, back.redelivered) == (b"2", True) and again.is_silent() and inbox.is_silent()


def test_acks_from_another_thread_and_publishers_in_parallel(bench: Bench) -> None:
    name, done = bench.queue(), threading.Event()
    seen: list[bytes] = []

    inbox = Inbox()
    bench.broker.consume(name, inbox, prefetch=5)

    def work() -> None:
        for _ in range(120):
            delivery = inbox.next()
            seen.append(delivery.body)
            bench.broker.ack(delivery)
        done.set()

    threading.Thread(target=work, daemon=True).start()
    publishers = [
        threading.Thread(target=lambda p=p: [bench.publish(b"%d-%03d" % (p, i)) for i in range(30)], daemon=True)
        for p in range(4)
    ]
    for publisher in publishers:
        publisher.start()
    for publisher in publishers:
        publisher.join()
    assert done.wait(20)
    for p in range(4):  # each publisher's own are in order
        assert [body for body in seen if body.startswith(b"%d-" % p)] == [b"%d-%03d" % (p, i) for i in range(30)]


def test_a_dead_letter_has_its_reason_and_leaves_its_queue(bench: Bench) -> None:
    name, inbox, dead = bench.queue(), Inbox(), Inbox()
    subscription = bench.broker.consume(name, inbox, prefetch=10)
    bench.publish(b"\xc1poison", key="a.b")
    bench.broker.dead_letter(inbox.next(), "not-msgpack", "the detail " * 200)
    bench.broker.consume(bench.name("dead"), dead, prefetch=10)
    letter = dead.next()
    assert (letter.routing_key, letter.body) == ("not-msgpack", b"\xc1poison")
    assert letter.headers["x-reason"] == "not-msgpack" and letter.headers["x-detail"].startswith("the detail")
    assert (letter.headers["x-exchange"], letter.headers["x-routing-key"]) == (bench.topic.name, "a.b")
    subscription.close()
    bench.broker.consume(name, inbox, prefetch=10)
    assert inbox.is_silent()


def test_declaring_again_changes_nothing_and_differently_is_an_error(bench: Bench) -> None:
    name = bench.queue(kind="classic", max_bytes=1000, overflow="reject-publish")
    bench.publish(b"kept")
    bench.queue(kind="classic", max_bytes=1000, overflow="reject-publish")
    fresh = bench.connect()
    fresh.declare(Declarations(queues=(Queue(name, "classic", max_bytes=1000, overflow="reject-publish"),)))
    inbox = Inbox()
    fresh.consume(name, inbox, prefetch=1)
    assert inbox.next().body == b"kept"
    with pytest.raises(UserError, match=name):
        bench.connect().declare(
            Declarations(queues=(Queue(name, "classic", max_bytes=2000, overflow="reject-publish"),))
        )
    bench.broker.delete_queue(bench.name("never-there"))


def test_a_deleted_queue_can_be_declared_again(bench: Bench) -> None:
    name, inbox = bench.queue(), Inbox()
    bench.publish(b"gone with it")
    bench.broker.delete_queue(name)
    with pytest.raises(Unroutable):
        bench.publish(b"nobody")
    assert bench.queue() == name
    bench.broker.consume(name, inbox, prefetch=1)
    bench.publish(b"new")
    assert inbox.next().body == b"new"


def test_a_bounded_queue_rejects_until_it_drains(bench: Bench) -> None:
    name = bench.queue(kind="classic", max_bytes=1000, overflow="reject-publish")
    with pytest.raises(PublishRejected):
        for _ in range(20):
            bench.publish(bytes(400))
    inbox = Inbox()
    subscription = bench.broker.consume(name, inbox, prefetch=100)
    while not inbox.is_silent():
        pass
    subscription.close()
    drain = Inbox()
    bench.broker.consume(name, drain, prefetch=1)
    deadline = time.monotonic() + 10
    while True:
        try:
            bench.broker.ack(drain.next(1.0))
        except queue.Empty:
            break
    while True:  # the broker counts its queue a moment later
        try:
            bench.publish(bytes(400))
            break
        except PublishRejected:
            assert time.monotonic() < deadline


def test_a_dropping_queue_keeps_the_newest(bench: Bench) -> None:
    name = bench.queue(kind="classic", max_bytes=1000, overflow="drop-head")
    bench.publish(*(b"%04d" % i + bytes(296) for i in range(10)))
    inbox = Inbox()
    bench.broker.consume(name, inbox, prefetch=10)
    kept = [inbox.next().body[:4]]
    while True:
        try:
            kept.append(inbox.next(0.5).body[:4])
        except queue.Empty:
            break
    assert kept == [b"0007", b"0008", b"0009"]


def test_a_stream_is_read_from_anywhere_by_anybody_again_and_again(bench: Bench) -> None:
    stream = bench.queue("stream", kind="stream", max_bytes=1 << 24, segment_bytes=1 << 20)
    for i in range(4):
        bench.publish(b"%d" % i)
    time.sleep(2.1)
    middle = time.time()
    time.sleep(1.1)
    for i in range(4, 8):
        bench.publish(b"%d" % i)

    def read(broker: Broker, start: StreamPosition, count: int) -> list[tuple[int | None, bytes]]:
        inbox = Inbox()
        subscription = broker.read_stream(stream, inbox, start=start, prefetch=3)
        got = []
        for _ in range(count):
            delivery = inbox.next()
            broker.ack(delivery)
            got.append((delivery.offset, delivery.body))
        subscription.close()
        return got

    everything = [(i, b"%d" % i) for i in range(8)]
    other = bench.connect()
    for broker in (bench.broker, other, bench.broker):
        assert read(broker, "first", 8) == everything
    assert read(other, 5, 3) == everything[5:]
    assert read(bench.broker, "last", 1)[-1][1] in (b"4", b"5", b"6", b"7")
    # a timestamp may start early (whole storage chunks, whole seconds), never late
    assert everything[4] in read(bench.broker, Timestamp(middle), 4)
    inbox = Inbox()
    bench.broker.read_stream(stream, inbox, start="next")
    assert inbox.is_silent(0.5)
    bench.publish(b"8")
    assert (delivery := inbox.next()).body == b"8" and delivery.offset == 8


def test_where_a_stream_ends_is_never_said_too_high(bench: Bench) -> None:
    stream = bench.queue("stream", kind="stream", max_bytes=1 << 24, segment_bytes=1 << 20)
    assert bench.broker.stream_end(stream) is None
    bench.publish(*(b"%d" % number for number in range(5)))
    bench.publish(b"by itself")
    assert bench.connect().stream_end(stream) == bench.broker.stream_end(stream) == 6
    bench.publish(*(bytes(300_000) for _ in range(12)))  # in segments, and in pieces that hold several
    end = bench.broker.stream_end(stream)
    bench.publish(b"next")
    inbox = Inbox()
    bench.broker.read_stream(stream, inbox, start="first", prefetch=100)
    last = inbox.take(19)[-1]
    assert last.body == b"next" and end is not None and 6 < end <= int(last.offset or 0)


def test_bytes_and_properties_arrive_as_they_were(bench: Bench) -> None:
    name, inbox = bench.queue(kind="classic"), Inbox()
    bench.broker.consume(name, inbox, prefetch=10)
    contents = [b"", bytes(range(256)), os.urandom(MAX_BODY_BYTES)]
    before = bench.broker.status()
    for body in contents:
        headers = {"x-a": "text", "x-b": 7}
        bench.broker.publish(Publication(bench.topic.name, "k", body, headers, "the-id", persistent=bool(body)))
        delivery = inbox.next(20.0)
        bench.broker.ack(delivery)
        assert delivery.body == body and isinstance(delivery.body, bytes)
        assert (delivery.message_id, delivery.user_id) == ("the-id", "guest")
        assert {key: delivery.headers[key] for key in headers} == headers
        assert delivery.timestamp is not None and abs(delivery.timestamp - time.time()) < 60
    after = bench.broker.status()
    assert after.connected and after.blocked is None
    assert after.bytes_out - before.bytes_out == after.bytes_in - before.bytes_in == sum(map(len, contents))


def test_what_was_made_for_a_party_is_looked_for_and_not_made(bench: Bench) -> None:
    there, missing = Queue(bench.queue("there"), "classic", max_length=3), Queue(bench.name("missing"))
    bench.broker.declare(Declarations(queues=(there,), made=True))  # whatever its arguments are
    with pytest.raises(UserError, match=r"missing.*broker add-node"):
        bench.broker.declare(Declarations((Exchange(bench.name("exchange")),), (there, missing), made=True))
    with pytest.raises(UserError, match="missing"):
        bench.broker.declare(Declarations(queues=(missing,), made=True))
    bench.declare(Declarations(queues=(missing,)))
    bench.broker.declare(Declarations(queues=(missing,), made=True))


def test_a_lock_has_one_holder_and_a_refused_one_is_told_who(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.brokers.amqp.locks.REFUSAL_SECONDS", 0.5)
    first, second, lost = bench.connect(), bench.connect(), threading.Event()
    monkeypatch.setattr("socket.gethostname", lambda: "host-of-the-first")
    first.lock(bench.name("lock"), lost.set)
    first.lock(bench.name("lock"), lost.set)  # by its holder once more, which changes nothing
    monkeypatch.setattr("socket.gethostname", lambda: "host-of-the-second")
    who = rf"lock is held by another connection \(user guest, process {os.getpid()} on host-of-the-{{}} since 20"
    for _ in range(2):  # reading who it is takes nothing away
        with pytest.raises(LockHeld, match=who.format("first")):
            second.lock(bench.name("lock"), lost.set)
    second.lock(bench.name("another"), lost.set)
    first.close()
    second.lock(bench.name("lock"), lost.set)
    with pytest.raises(LockHeld, match=who.format("second")):
        bench.connect().lock(bench.name("lock"), lost.set)
    assert not lost.is_set()


def test_closing_leaves_no_thread_behind(bench: Bench) -> None:
    before = set(threading.enumerate())
    broker = bench.connect()
    broker.consume(bench.queue(), Inbox(), prefetch=1)
    assert set(threading.enumerate()) > before
    broker.close()
    broker.close()  # closing twice is harmless
    assert set(threading.enumerate()) == before
