"""F1, F2: what a RabbitMQ refuses after it had allowed it, and what its clients make of it: said, shown, and final."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pika
import pytest
import structlog

from common.brokers import open_broker
from common.errors import AccessRefused, InternalError, Unpublishable, UserError
from common.wire.broker import Broker, Delivery, Publication
from common.wire.topology import Binding, Declarations, Exchange, Queue
from deploy.local_rabbitmq import LocalRabbitMQ
from tests.integration.harness import eventually
from tests.integration.test_strangers import listening, web_server

DECLARED = Declarations((Exchange("x"),), (Queue("q"),), (Binding("x", "q", "#"),))


@dataclass
class Member:
    """An account of one test's own, and a party that uses it; `patience` in seconds."""

    server: LocalRabbitMQ
    name: str

    def permit(self, configure: str = ".*", write: str = ".*", read: str = ".*") -> None:
        self.server.ctl("set_permissions", self.name, configure, write, read)

    def cut(self) -> None:
        self.server.ctl("close_all_connections", "a test")

    @contextmanager
    def connected(self, patience: float) -> Iterator[Broker]:
        url = self.server.url.replace("guest:guest", f"{self.name}:secret")
        broker = open_broker(url, client_name=self.name, dead_letters="dead", refusal_patience=patience)
        try:
            yield broker
        finally:
            broker.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRabbitMQ]:
    with LocalRabbitMQ(tmp_path_factory.mktemp("rabbitmq-refusals")) as running:
        yield running


@pytest.fixture
def member(server: LocalRabbitMQ) -> Member:
    made = Member(server, f"member-{time.time_ns()}")
    server.ctl("add_user", made.name, "secret")
    made.permit()
    with pika.BlockingConnection(pika.URLParameters(server.url)) as connection:
        connection.channel().queue_delete("q")  # with what other tests left there
    return made


@pytest.mark.parametrize("command", ["change_password", "delete_user", "clear_permissions"])
def test_f2_an_account_that_is_let_in_no_more_ends_its_party(member: Member, command: str) -> None:
    with member.connected(3.0) as broker, structlog.testing.capture_logs() as logs:
        member.server.ctl(command, member.name, *(["another"] if command == "change_password" else []))
        cut = time.monotonic()
        member.cut()
        words = f"does not let user '{member.name}' in"
        eventually(lambda: words in broker.status().problem)
        status = broker.status()
        assert not status.connected and (status.refused == "" or time.monotonic() - cut >= 3.0)
        began = time.monotonic()
        with pytest.raises(AccessRefused, match=words):
            broker.publish(Publication("x", "k", b"late"), timeout=60.0)
        assert time.monotonic() - began < 20.0 and words in broker.status().refused
        with pytest.raises(AccessRefused, match=words):
            broker.declare(DECLARED)
        told = [each["problem"] for each in logs if each["log_level"] == "warning" and words in each["problem"]]
        said = "NOT_ALLOWED" if command == "clear_permissions" else "ACCESS_REFUSED"
        assert len(told) == 1 and said in told[0], "once, and in the broker's own words"


def test_f2_a_password_that_is_put_right_in_time_ends_nobody(member: Member) -> None:
    with member.connected(60.0) as broker:
        broker.declare(DECLARED)
        member.server.ctl("change_password", member.name, "another")
        member.cut()
        eventually(lambda: "does not let user" in broker.status().problem)
        member.server.ctl("change_password", member.name, "secret")
        broker.publish(Publication("x", "k", b"waited"))
        eventually(lambda: broker.status().problem == "" and broker.status().connected)


@pytest.mark.parametrize(
    ("limit", "lifted", "words"),
    [
        (
            ("set_vhost_limits", '{"max-connections": 0}'),
            ("clear_vhost_limits",),
            "takes no more connections of user 'NAME' now: .*connection limit .0. is reached",
        ),
        (
            ("set_user_limits", "NAME", '{"max-channels": 1}'),
            ("clear_user_limits", "NAME", "all"),
            # RabbitMQ 4.0 names itself there instead of the user
            "went away: .*channels opened for user '(NAME|.*@.*)' has reached the maximum allowed user limit",
        ),
    ],
    ids=["connections of the vhost", "channels of the user"],
)
def test_f2_a_limit_is_said_in_the_brokers_words_stays_in_the_status_and_is_waited_out(
    member: Member, limit: tuple[str, ...], lifted: tuple[str, ...], words: str
) -> None:
    """Connections that broke count until the broker misses their heartbeats: so a limit may pass by itself."""
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    words = words.replace("NAME", member.name)

    def set_limit(command: tuple[str, ...]) -> None:
        member.server.ctl(*(part.replace("NAME", member.name) for part in command))

    with member.connected(0.5) as broker, structlog.testing.capture_logs() as logs:
        broker.declare(DECLARED)
        broker.consume("q", arrived.put, prefetch=1)
        set_limit(limit)
        try:
            member.cut()
            eventually(lambda: re.search(words, broker.status().problem), 60.0)
            # opened again and again, and closed again: that it is open for a moment is not the end of it
            for _ in range(20):
                assert re.search(words, broker.status().problem) and broker.status().refused == ""
                assert not threading.Event().wait(0.1)
        finally:
            set_limit(lifted)
        broker.publish(Publication("x", "k", b"waited"))
        assert arrived.get(timeout=60.0).body == b"waited"
        eventually(lambda: broker.status().problem == "", 60.0)
    told = [each["problem"] for each in logs if each["log_level"] == "warning"]
    assert [bool(re.search(words, each)) for each in told].count(True) == 1 and "running there" not in " ".join(told)


def test_f2_a_limit_of_queues_is_not_taken_for_a_queue_that_is_there(member: Member) -> None:
    with member.connected(30.0) as broker:
        member.server.ctl("set_vhost_limits", '{"max-queues": 0}')
        try:
            with pytest.raises(UserError, match=r"queue limit in vhost '/' \(0\) is reached; have that limit raised"):
                broker.declare(Declarations(queues=(Queue("one-more"),)))
            with pytest.raises(UserError, match="have that limit raised"):
                broker.lock("a-lock", lambda: None)
        finally:
            member.server.ctl("clear_vhost_limits")


def test_f2_a_broker_that_is_merely_away_is_waited_for_and_so_is_a_stranger_in_its_place(
    private_rabbitmq: LocalRabbitMQ,
) -> None:
    url = private_rabbitmq.url
    broker = open_broker(url, client_name="t", dead_letters="dead", refusal_patience=0.5)
    broker.declare(DECLARED)
    with structlog.testing.capture_logs() as logs:
        private_rabbitmq.stop()
        eventually(lambda: "no broker answers at" in broker.status().problem)
        with listening(web_server, private_rabbitmq.port):
            eventually(lambda: "does not speak AMQP" in broker.status().problem)
        assert broker.status().refused == broker.status().failed == ""
        private_rabbitmq.start()
        broker.publish(Publication("x", "k", b"waited"))
        eventually(lambda: broker.status().problem == "" and broker.status().connected)
    assert not [each for each in logs if each.get("exc_info")], "lines, no traces"
    told = [each["problem"] for each in logs if each["log_level"] == "warning"]
    assert len(told) == len(set(told)) and [each["log_level"] for each in logs][-1] == "info"
    broker.close()


def test_f2_a_declaration_that_is_refused_after_a_reconnect_is_not_swallowed(member: Member) -> None:
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    with member.connected(3.0) as broker, structlog.testing.capture_logs() as logs:
        broker.declare(DECLARED)
        broker.consume("q", arrived.put, prefetch=1)
        member.permit(configure="^$")
        member.cut()
        eventually(lambda: "refused for user" in broker.status().problem)
        broker.publish(Publication("x", "k", b"goes on"))
        assert arrived.get(timeout=10.0).body == b"goes on"
        assert "refused for user" in eventually(lambda: broker.status().refused)
        told = [each["what"] for each in logs if each["log_level"] == "warning" and "refused" in each["problem"]]
        assert told == ["declaring q"]


def test_f2_a_lock_that_may_not_be_taken_again_is_not_lost_but_refused(member: Member) -> None:
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    lost = threading.Event()
    with member.connected(6.0) as broker:
        broker.declare(DECLARED)
        broker.lock("the-lock", lost.set)
        broker.consume("q", arrived.put, prefetch=1)
        member.permit(configure="^(q|x)$")
        member.cut()
        eventually(lambda: "'the-lock'" in broker.status().problem)
        broker.publish(Publication("x", "k", b"later"))
        assert arrived.empty(), "without its lock it consumes nothing"
        assert "'the-lock'" in eventually(lambda: broker.status().refused)
        member.permit()
        assert arrived.get(timeout=10.0).body == b"later"
        eventually(lambda: broker.status().problem == "" == broker.status().refused)
        assert not lost.is_set()


def test_f1_a_lost_lock_whose_owner_stumbles_over_the_news_is_told_by_the_status(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble() -> None:
        raise ZeroDivisionError("a slip")

    monkeypatch.setattr("common.brokers.amqp.rabbitmq.LOCK_PATIENCE_SECONDS", 2.0)
    with member.connected(30.0) as first:
        first.lock("contended", stumble)
        monkeypatch.setattr("common.brokers.amqp.link.BACKOFF_SECONDS", (4.0, 4.0))
        member.cut()
        eventually(lambda: not first.status().connected)
        with member.connected(30.0) as second:
            second.lock("contended", lambda: None)
            failed = eventually(lambda: first.status().failed)
            assert "contended" in failed and "a slip" in failed
            with pytest.raises(InternalError, match="a slip"):
                first.publish(Publication("x", "k", b"nobody hears me"))


def test_f1_a_header_that_only_the_broker_should_set_cuts_nobody_off(member: Member) -> None:
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    with member.connected(30.0) as broker, pika.BlockingConnection(pika.URLParameters(member.server.url)) as other:
        broker.declare(DECLARED)
        broker.consume("q", arrived.put, prefetch=1)
        other.channel().basic_publish("x", "k", b"odd", pika.BasicProperties(headers={"x-stream-offset": "first"}))
        delivery = arrived.get(timeout=10.0)
        broker.ack(delivery)
        assert (delivery.body, delivery.offset) == (b"odd", None)
        assert (broker.status().reconnects, broker.status().problem) == (0, "")


def test_f3_a_message_that_ends_the_whole_connection_fails_alone_and_others_go_on(member: Member) -> None:
    stop, errors = threading.Event(), []
    with member.connected(30.0) as broker:
        broker.declare(DECLARED)

        def publish() -> None:
            try:
                while not stop.is_set():
                    broker.publish(Publication("x", "k", b"innocent"), timeout=20.0)
            except Exception as error:
                errors.append(error)

        publishing = threading.Thread(target=publish, daemon=True)
        publishing.start()
        with pytest.raises(Unpublishable, match="frame_too_large"):
            broker.publish(Publication("x", "k", b"", {"header": "larger than a frame " * 10_000}), timeout=20.0)
        for bad in (Publication("x", "k" * 300, b""), Publication("x", "k", b"", {"header": 2**70})):
            with pytest.raises(Unpublishable, match="cannot be written as AMQP"):
                broker.publish(bad, timeout=20.0)
        stop.set()
        publishing.join(20.0)
        assert not errors


def test_f1_a_node_that_may_not_publish_ends_with_the_brokers_words(member: Member, tmp_path: Path) -> None:
    """Its account may declare and bind its queues, and take messages; but not write to an exchange."""
    member.permit(write=r"\.(inbox|pulse|dead-letters)$|^refused\.update\.n$")
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"note {number}: alpha beta gamma")
    url = member.server.url.replace("guest:guest", f"{member.name}:secret")
    command = ["node", "n", "--corpus", "*.txt", "--broker", url, "--namespace", "refused", "--state", "state"]
    result = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *command], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("shared-encoder: ") and f"refused for user '{member.name}'" in last
    assert "ACCESS_REFUSED" in last and "exchange 'refused.request'" in last
    assert "sent at the next start" not in result.stderr, "nothing is claimed after it"
    warned = [line for line in result.stderr.splitlines() if "[warning" in line and "refused by the broker" in line]
    assert len(warned) == 1 and "exchange 'refused.request'" in warned[0], "and it is in the log, before the end"


@pytest.mark.slow
def test_f2_master_and_node_say_in_json_lines_that_a_password_is_good_no_more_and_is_again(
    member: Member, tmp_path: Path
) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"note {number}: alpha beta gamma")
    url = member.server.url.replace("guest:guest", f"{member.name}:secret")
    common = ["--json", "--broker", url, "--namespace", "said"]
    commands = {"master": ["master", *common], "node": ["node", "n", "--corpus", "*.txt", *common]}
    processes = []

    def told(party: str) -> list[dict[str, Any]]:
        lines = (tmp_path / f"{party}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def all_told(**wanted: str) -> bool:
        return all(any(wanted.items() <= each.items() for each in told(party)) for party in commands)

    def refused() -> bool:
        words = f"does not let user '{member.name}' in"
        return all(
            any(each["level"] == "warning" and words in str(each.get("problem")) for each in told(party))
            for party in commands
        )

    try:
        for party, command in commands.items():
            with (tmp_path / f"{party}.log").open("wb") as log:
                program = [sys.executable, "-m", "deploy.cli", *command, "--state", f"{party}-state"]
                processes.append(subprocess.Popen(program, cwd=tmp_path, stdout=log, stderr=log))
        eventually(lambda: (tmp_path / "master-state").exists() and any("node" in each for each in told("node")), 120.0)
        eventually(lambda: member.server.ctl("list_consumers", "-q").count("said.") >= 4, 120.0)
        member.server.ctl("change_password", member.name, "another")
        member.cut()
        eventually(refused, 60.0)
        member.server.ctl("change_password", member.name, "secret")
        eventually(lambda: all_told(event="broker reconnected") and all_told(event="no longer a problem"), 60.0)
        assert all(process.poll() is None for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
