"""What every broker does when it must say no, or when a callback fails: nothing is silent, and nobody else suffers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import structlog

from common.brokers import open_broker
from common.brokers.memory import MemoryBroker, MemoryServer
from common.brokers.memory_rules import Permissions
from common.errors import AccessRefused, InternalError, Unpublishable
from common.wire.broker import Broker, Delivery, Publication
from common.wire.topology import Binding, Declarations, Exchange, Queue
from deploy.local_rabbitmq import LocalRabbitMQ
from tests.integration.harness import eventually

#: Larger bodies are refused by the brokers of this suite.
LIMIT = 50_000
NAMES = ("q", "other", "s")
DECLARED = Declarations(
    (Exchange("x"), Exchange("secret")),
    tuple(Queue(name, "stream" if name == "s" else "quorum") for name in NAMES),
    (*(Binding("x", name, f"{name}.#") for name in NAMES), Binding("secret", "other", "#")),
)


@dataclass
class Bench:
    """`connect(user, patience)` as `admin`, who may do everything, or as `member`, whose permissions `permit` sets.

    `tries_every`: seconds after which what was refused is tried again."""

    tries_every: float
    connect: Callable[[str, float], Broker]
    permit: Callable[[Permissions], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRabbitMQ]:
    settings = f"max_message_size = {LIMIT}\n"
    with LocalRabbitMQ(tmp_path_factory.mktemp("refusals"), settings=settings) as running:
        running.ctl("add_user", "member", "secret")
        yield running


@pytest.fixture(params=["memory", "rabbitmq"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    brokers: list[Broker] = []
    if request.param == "memory":
        memory = MemoryServer(max_body_bytes=LIMIT)

        def connect(user: str, patience: float) -> Broker:
            brokers.append(MemoryBroker(memory, user=user, dead_letters="dead", refusal_patience=patience))
            return brokers[-1]

        made = Bench(0.2, connect, lambda permissions: memory.permit("member", permissions))
    else:
        running: LocalRabbitMQ = request.getfixturevalue("server")
        urls = {"admin": running.url, "member": running.url.replace("guest:guest", "member:secret")}

        def connect(user: str, patience: float) -> Broker:
            brokers.append(open_broker(urls[user], client_name=user, dead_letters="dead", refusal_patience=patience))
            return brokers[-1]

        made = Bench(
            1.0,
            connect,
            lambda p: running.ctl("set_permissions", "member", p.configure or "^$", p.write or "^$", p.read or "^$"),
        )
    made.permit(Permissions())
    made.connect("admin", 30.0).declare(DECLARED)
    yield made
    for name in NAMES:
        brokers[0].delete_queue(name)
    for broker in brokers:
        broker.close()


def test_f1_every_forbidden_publish_is_refused_at_once_and_others_go_on(bench: Bench) -> None:
    bench.permit(Permissions("^$", "^x$", "^q$"))
    broker, arrived, stop = bench.connect("member", 30.0), queue.SimpleQueue[Delivery](), threading.Event()
    broker.consume("q", arrived.put, prefetch=1000)
    sent, errors = [], []

    def publish() -> None:
        try:
            while not stop.is_set():
                broker.publish(Publication("x", "q.k", b"%d" % len(sent)), timeout=10.0)
                sent.append(b"%d" % len(sent))
        except Exception as error:
            errors.append(error)

    publishing = threading.Thread(target=publish, daemon=True)
    publishing.start()
    for _ in range(20):
        with pytest.raises(AccessRefused, match=r"access to (exchange )?'secret'.* refused for user 'member'"):
            broker.publish(Publication("secret", "k", b"forged"), timeout=5.0)
    eventually(lambda: sent)
    stop.set()
    publishing.join(20.0)
    assert not errors
    wanted, got = set(sent), set()
    while not wanted <= got:
        delivery = arrived.get(timeout=10.0)
        got.add(delivery.body)
        broker.ack(delivery)
    assert broker.status().problem == "", "a refused publish is its caller's alone"


@pytest.mark.parametrize("kind", ["queue", "stream"])
def test_f2_a_refused_consumer_is_warned_of_once_shown_and_goes_on_once_it_may(bench: Bench, kind: str) -> None:
    bench.permit(Permissions("^$", "^x$", "^$"))
    broker, arrived = bench.connect("member", 60.0), queue.SimpleQueue[Delivery]()
    name = "q" if kind == "queue" else "s"
    with structlog.testing.capture_logs() as logs:
        if kind == "queue":
            broker.consume(name, arrived.put, prefetch=1)
        else:
            broker.read_stream(name, arrived.put, start="first")
        eventually(lambda: "refused for user 'member'" in broker.status().problem)
        broker.publish(Publication("x", f"{name}.k", b"waits"))
        assert not threading.Event().wait(2.5 * bench.tries_every) and arrived.empty()
    warnings = [each for each in logs if each["log_level"] == "warning"]
    assert [f"'{name}'" in each["problem"] and "ACCESS_REFUSED" in each["problem"] for each in warnings] == [True]
    status = broker.status()
    assert status.connected and status.refused == "" and status.failed == ""
    status.check()
    bench.permit(Permissions("^$", "^x$", f"^{name}$"))
    assert arrived.get(timeout=10.0).body == b"waits"
    assert eventually(lambda: broker.status().problem == "")


def test_nobody_publishes_in_the_name_of_another(bench: Bench) -> None:
    bench.permit(Permissions("^$", "^x$", "^$"))
    member, admin, arrived = bench.connect("member", 30.0), bench.connect("admin", 30.0), queue.SimpleQueue[Delivery]()
    admin.consume("q", arrived.put, prefetch=10)
    for claimed in ("admin", "guest"):
        with pytest.raises(Unpublishable, match=f"user_id property set to '{claimed}'.* user was 'member'"):
            member.publish(Publication("x", "q.k", b"forged", user_id=claimed))
    member.publish(Publication("x", "q.k", b"own", user_id="member"), Publication("x", "q.k", b"unsaid"))
    came = [arrived.get(timeout=10.0) for _ in range(2)]
    assert [(each.body, each.user_id) for each in came] == [(b"own", "member"), (b"unsaid", "member")]


def test_f2_what_is_refused_for_long_is_final(bench: Bench) -> None:
    bench.permit(Permissions("^$", "^x$", "^$"))
    broker = bench.connect("member", 2.0)
    subscription = broker.consume("q", lambda delivery: None, prefetch=1)
    eventually(lambda: broker.status().problem)
    assert broker.status().refused == ""
    refused = eventually(lambda: broker.status().refused)
    assert "ACCESS_REFUSED" in refused and "'q'" in refused
    with pytest.raises(AccessRefused, match="ACCESS_REFUSED"):
        broker.status().check()
    subscription.close()
    assert eventually(lambda: broker.status().problem == "" == broker.status().refused), "not wanted any more"


def test_f2_a_queue_that_is_not_there_is_shown_and_waited_for_however_long(bench: Bench) -> None:
    broker, arrived = bench.connect("admin", 0.5), queue.SimpleQueue[Delivery]()
    broker.consume("late", arrived.put, prefetch=1)
    eventually(lambda: "no queue" in broker.status().problem)
    assert not threading.Event().wait(0.5 + bench.tries_every) and broker.status().refused == ""
    broker.declare(Declarations(queues=(Queue("late"),), bindings=(Binding("x", "late", "late"),)))
    broker.publish(Publication("x", "late", b"here"))
    assert arrived.get(timeout=10.0).body == b"here" and broker.status().problem == ""
    broker.delete_queue("late")


def test_f1_a_callback_that_raises_ends_the_party_and_not_in_silence(bench: Bench) -> None:
    broker, arrived, back = (
        bench.connect("admin", 30.0),
        queue.SimpleQueue[Delivery](),
        queue.SimpleQueue[Delivery](),
    )

    def slip(delivery: Delivery) -> None:
        raise ZeroDivisionError("a slip")

    broker.consume("q", slip, prefetch=10)
    broker.consume("other", arrived.put, prefetch=10)
    with structlog.testing.capture_logs() as logs:
        broker.publish(Publication("x", "q.k", b"kept"))
        failed = eventually(lambda: broker.status().failed)
    assert "q" in failed and "ZeroDivisionError('a slip')" in failed and failed in broker.status().problem
    assert [each["log_level"] for each in logs if each.get("exc_info")] == ["error"]
    with pytest.raises(InternalError, match="a slip"):
        broker.status().check()
    for ask in (
        lambda: broker.publish(Publication("x", "q.k", b"more")),
        lambda: broker.declare(DECLARED),
        lambda: broker.lock("lock", lambda: None),
    ):
        with pytest.raises(InternalError, match="a slip"):
            ask()
    others = bench.connect("admin", 30.0)
    others.publish(Publication("x", "other.k", b"next"))
    assert arrived.get(timeout=10.0).body == b"next", "the other consumers go on"
    others.consume("q", back.put, prefetch=10)
    delivery = back.get(timeout=10.0)
    assert (delivery.body, delivery.redelivered) == (b"kept", True)


def test_f3_a_body_that_is_too_large_fails_its_own_publish_alone(bench: Bench) -> None:
    broker, arrived = bench.connect("admin", 30.0), queue.SimpleQueue[Delivery]()
    broker.consume("q", arrived.put, prefetch=1000)
    outcomes: dict[int, BaseException | None] = {}
    begin = threading.Barrier(8)

    def publish(number: int) -> None:
        batch = [Publication("x", "q.k", b"%d-%d" % (number, part)) for part in range(20)]
        if number == 3:
            batch[10] = Publication("x", "q.k", bytes(LIMIT + 1))
        begin.wait()
        try:
            broker.publish(*batch, timeout=20.0)
            outcomes[number] = None
        except Exception as error:
            outcomes[number] = error

    before = broker.status().bytes_out
    threads = [threading.Thread(target=publish, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert isinstance(outcomes.pop(3), Unpublishable) and set(outcomes.values()) == {None} and len(outcomes) == 7
    with pytest.raises(Unpublishable, match=r"larger than .* 50000"):
        broker.publish(Publication("x", "q.k", bytes(LIMIT + 1)))
    assert broker.status().bytes_out - before < 6 * LIMIT, "it is not sent again and again"
    wanted, got = {b"%d-%d" % (number, part) for number in outcomes for part in range(20)}, set()
    while not wanted <= got:
        delivery = arrived.get(timeout=10.0)
        got.add(delivery.body)
        broker.ack(delivery)
    assert broker.status().problem == ""
