"""What does not work is warned of once, shown, and final after a while of refusals; a slip is never swallowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import structlog

from common.brokers.amqp.link import Link
from common.brokers.memory import MemoryBroker, MemoryServer
from common.brokers.memory_rules import Permissions
from common.brokers.problems import Problems
from common.clock import VirtualClock
from common.errors import AccessRefused, BrokerUnavailable, InternalError, UserError
from common.wire.broker import Publication
from common.wire.topology import Binding, Declarations, Exchange, Queue
from tests.integration.harness import eventually
from tests.unit.master.test_publisher import FakeBroker


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def warnings(logs: list[Any]) -> list[tuple[str, str]]:
    return [(each["what"], each["problem"]) for each in logs if each["log_level"] == "warning"]


def test_f2_a_problem_is_warned_of_once_for_each_wording(logs: list[Any]) -> None:
    clock = VirtualClock()
    problems = Problems(30.0, clock)
    for _ in range(3):
        for words in ("refused", "refused otherwise"):
            problems.note("queue q", words, refusal=True)
            clock.time += 1.0
    problems.note("queue p", "refused", refusal=True)  # by the same reason
    assert warnings(logs) == [("queue q", "refused"), ("queue q", "refused otherwise")]
    assert problems.problem == "refused otherwise; refused"
    problems.over("queue p")
    problems.over("queue q")
    assert (problems.problem, [each["event"] for each in logs][-1]) == ("", "no longer a problem")
    problems.note("queue q", "refused", refusal=True)  # it comes and goes
    assert len(warnings(logs)) == 2
    problems.over("queue q")
    clock.time += 100.0
    problems.note("queue q", "refused", refusal=True)
    assert len(warnings(logs)) == 3


def test_f2_a_broker_that_numbers_its_refusals_does_not_fill_the_log(logs: list[Any]) -> None:
    problems = Problems(30.0, VirtualClock())
    for number in range(1000):
        problems.note("queue q", f"refusal {number}", refusal=True)
    assert len(warnings(logs)) == 20 and problems.problem == "refusal 999"


def test_f2_only_refusals_in_a_row_are_final(logs: list[Any]) -> None:
    clock = VirtualClock()
    problems = Problems(30.0, clock)

    def refused_for(seconds: int) -> str:
        for _ in range(seconds):
            problems.note("queue q", "no", refusal=True)
            clock.time += 1.0
        return problems.refused

    assert refused_for(25) == ""
    problems.note("queue q", "away")  # not even asked
    assert refused_for(25) == ""
    clock.time += 600.0  # no broker to ask
    assert refused_for(25) == ""
    assert refused_for(6) == "no"
    with pytest.raises(AccessRefused, match="no"):
        problems.check_waiting()
    problems.check()  # what has a connection may go on until its party ends
    problems.over("queue q")
    assert problems.refused == ""
    for _ in range(600):
        problems.note("connection", "away")
        clock.time += 1.0
    assert (problems.refused, problems.problem) == ("", "away")


def test_f2_what_often_comes_right_by_itself_is_warned_of_when_it_lasts(logs: list[Any]) -> None:
    clock = VirtualClock()
    problems = Problems(30.0, clock)
    for _ in range(7):
        problems.note("queue q", "no queue 'q'", quiet=5.0)
        assert problems.problem == "no queue 'q'"
        assert len(warnings(logs)) == (clock.time >= 5.0)
        clock.time += 1.0


def test_f1_a_slip_stays_and_is_raised(logs: list[Any]) -> None:
    problems = Problems(30.0, VirtualClock())
    problems.check()
    problems.fail("the consumer of q", ZeroDivisionError("first"))
    problems.fail("another", ZeroDivisionError("second"))
    problems.over("the consumer of q")
    assert "first" in problems.failed and "first" in problems.problem
    assert [type(each["exc_info"]) for each in logs] == [ZeroDivisionError] * 2
    with pytest.raises(InternalError, match="first"):
        problems.check()


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    monkeypatch.setattr("common.brokers.amqp.link.BACKOFF_SECONDS", (0.01, 0.01))

    def explain(error: BaseException, was_open: bool) -> Exception:
        return UserError("let in no more") if "refused" in str(error) else BrokerUnavailable(repr(error))

    broker = FakeBroker()
    made = Link("test", broker.connect, (OSError,), lambda: None, Problems(0.2), explain)  # type: ignore[arg-type]
    made.broker = broker  # type: ignore[attr-defined]
    made.start()
    eventually(lambda: made.connected)
    yield made
    made.close()


def slip(*_: Any) -> None:
    raise ZeroDivisionError("a slip")


def test_f1_a_slip_after_an_answer_of_the_broker_opens_the_connection_anew(link: Link, logs: list[Any]) -> None:
    answer: Future[None] = Future()
    link.after(answer, slip)
    link.post(lambda: answer.set_result(None))
    eventually(lambda: link.generation == 2 and link.connected)
    assert [type(each["exc_info"]) for each in logs if each.get("exc_info")] == [ZeroDivisionError]
    assert eventually(lambda: link.problems.problem == "")


def test_f1_a_slip_in_what_is_asked_of_the_broker_is_its_callers_alone(link: Link) -> None:
    began = time.monotonic()
    with pytest.raises(InternalError, match="a slip"):
        link.call(slip)
    assert time.monotonic() - began < 5.0 and link.connected and link.generation == 1


def test_f2_who_waits_for_a_link_that_is_let_in_no_more_is_told(link: Link) -> None:
    link.broker.refuses = "refused"  # type: ignore[attr-defined]
    link.post(slip)
    with pytest.raises(UserError, match="let in no more"):
        link.call(lambda future: future.set_result(None), timeout=10.0)


def test_f1_a_dispatcher_that_dies_is_not_a_live_connection() -> None:
    server = MemoryServer()
    broker = MemoryBroker(server, user="member", dead_letters="dead")
    broker.declare(Declarations((Exchange("x"),), (Queue("q"),), (Binding("x", "q", "#"),)))
    broker.consume("q", lambda delivery: None, prefetch=1)
    server.permit("member", Permissions(read="("))  # no pattern: nobody can tell what it allows
    assert "dispatcher" in eventually(lambda: broker.status().failed)
    with pytest.raises(InternalError, match="dispatcher"):
        broker.publish(Publication("x", "k", b"heard by nobody"))
    broker.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "memory-broker-member"]
