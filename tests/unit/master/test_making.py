"""Encoders are made beside the thread that decides, and one that kills the master is given up."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.to_master import AskStatus, Stop
from common.wire.to_node import StatusReport
from master_service.arithmetic import aggregator
from master_service.arithmetic.arithmetic import Outcome
from master_service.decisions.effects import Generate
from master_service.decisions.records import GenerationFailed
from master_service.history.state_directory import inline
from master_service.log.deadly import Attempts, FileMark
from master_service.log.message_log import open_log
from master_service.making import Making
from tests.integration.harness import HandNode, running_master
from tests.unit.master.test_limits import asked, get
from tests.unit.stepped import MemoryPayloads, SteppedMaster


class Beside:
    """A Background that is carried out when the test says so."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def __call__(self, name: str, work: Callable[[], None]) -> None:
        self.work.append(work)

    def go_on(self) -> None:
        self.work.pop(0)()


def test_while_one_is_made_requests_are_answered_and_the_next_waits_its_turn() -> None:
    clock, beside = VirtualClock(1000.0), Beside()
    server = MemoryServer(clock.now)
    master = SteppedMaster(server, clock, background=beside, max_encoders=3).start()
    answers = asked(master, server, get(number=2), get("texxt"))
    assert [each.status for each in answers] == ["refused"], "who asked for the other is told when it is made"
    assert [each.status for each in master.master.state.encoders.values()] == ["generating"] * 2
    assert len(beside.work) == 1, "one at a time"
    beside.go_on()
    master.run(1.0)
    assert [each.status for each in master.master.state.encoders.values()] == ["running", "generating"]
    beside.go_on()
    master.run(1.0)
    assert [each.status for each in master.master.state.encoders.values()] == ["running"] * 2


def test_one_that_is_stopped_while_it_is_made_ends_when_it_is_there() -> None:
    clock, beside = VirtualClock(1000.0), Beside()
    server = MemoryServer(clock.now)
    master = SteppedMaster(server, clock, background=beside).start()
    [name] = master.master.state.encoders
    asked(master, server, Stop(sender="operator", encoder=name))
    beside.go_on()
    master.run(1.0)
    assert master.master.state.encoders[name].status in ("finished", "failed")


def test_a_master_that_starts_again_makes_what_was_not_made() -> None:
    clock, payloads, db = VirtualClock(1000.0), MemoryPayloads(), sqlite3.connect(":memory:", isolation_level=None)
    first = SteppedMaster(MemoryServer(clock.now), clock, background=Beside(), payloads=payloads, db=db).start()
    clock.wait(1.0)
    second = SteppedMaster(MemoryServer(clock.now), clock, payloads=payloads, db=db).start()
    assert list(second.master.state.encoders) == list(first.master.state.encoders)
    assert [each.status for each in second.master.state.encoders.values()] == ["running"]


@pytest.mark.parametrize("deaths", [1, 2])
def test_what_was_being_made_when_the_master_was_killed_twice_is_given_up(tmp_path: Path, deaths: int) -> None:
    """Real processes and a real kill: the mark is a file."""

    def start(make: Callable[[Generate], list[Outcome]]) -> list[Outcome]:
        log = open_log(tmp_path)
        attempts = Attempts(FileMark(tmp_path / "making"), log)
        making = Making(make, attempts, inline)
        making.begin(Generate("text-1", "text", {}, "fresh", None, 0))
        making.begin(Generate("text-2", "text", {}, "fresh", None, 0))
        made = making.made()
        attempts.close()
        log.close()
        return made

    def dies(effect: Generate) -> list[Outcome]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    def lives(effect: Generate) -> list[Outcome]:
        return [Outcome(GenerationFailed(encoder=effect.encoder, reason="made"))]

    for _ in range(deaths):
        if (child := os.fork()) == 0:
            start(dies)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    made = {each.body.encoder: each.body.reason for each in start(lives) if isinstance(each.body, GenerationFailed)}
    given_up = "making it has killed the master twice"
    assert made == {"text-1": given_up if deaths == 2 else "made", "text-2": "made"}


def test_an_end_while_one_is_made_is_nobodys_death(tmp_path: Path) -> None:
    log, closed = open_log(tmp_path), threading.Event()
    attempts = Attempts(FileMark(tmp_path / "making"), log)

    def wait(effect: Generate) -> list[Outcome]:
        assert closed.wait(20.0)
        return []

    making = Making(wait, attempts, inline)
    thread = threading.Thread(target=making.begin, args=[Generate("text-1", "text", {}, "fresh", None, 0)])
    thread.start()
    mark = FileMark(tmp_path / "making")
    while mark.read() != "generate text-1":
        pass
    attempts.close()
    assert mark.read() == ""
    mark.write("another's")
    closed.set()
    thread.join()
    assert mark.read() == "another's", "who was closed writes no more"
    mark.close()
    log.close()


def test_a_service_answers_while_its_thread_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, allowed = threading.Event(), threading.Event()
    original = aggregator.generated

    def slowly(effect: Generate) -> list[Outcome]:
        begun.set()
        assert allowed.wait(20.0)
        return original(effect)

    monkeypatch.setattr(aggregator, "generated", slowly)
    server = MemoryServer()
    with running_master(server, tmp_path):
        node = HandNode(server, "a")
        assert begun.wait(20.0)
        node.say(".status", AskStatus(sender="a"))
        assert [each["status"] for each in node.hear(StatusReport).report["encoders"].values()] == ["generating"]
        allowed.set()
        node.enter()
