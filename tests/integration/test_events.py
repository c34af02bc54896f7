"""F15: a whole small training as whoever reads the JSON log sees it, and as people see it. F1: threads that fail."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.brokers.memory import MemoryServer
from common.errors import AccessRefused
from common.wire.broker import BrokerStatus
from common.wire.to_master import Alive, Stop
from common.wire.to_node import Receipt
from common.wire.update_rule import ReturnWhen, UpdateRule
from deploy.logging import configure_logging
from tests.integration.harness import HandNode, Master, decided, eventually, numbers, running_master
from tests.integration.test_federation import Node, lines

#: Every kind of event, and what it must be bound to.
EVENTS = {
    "master started": {"epoch"},
    "encoder requested": {"sender", "type"},
    "encoder generated": {"encoder", "version"},
    "joining": {"node", "incarnation"},
    "node joined": {"node"},
    "instruction accepted": {"node", "encoder", "samples"},
    "instruction refused": {"node", "encoder", "reason"},
    "training": {"node", "encoder", "version"},
    "version adopted": {"node", "encoder", "version"},
    "waiting for the master": {"node", "encoder", "version"},
    "waiting ended": {"node", "encoder", "seconds"},
    "update handed in": {"node", "encoder", "update", "version", "steps", "bytes"},
    "update received": {"node", "encoder", "update", "version", "steps", "bytes"},
    "update counted": {"node", "encoder", "update", "version", "weight", "staleness"},
    "update refused": {"node", "encoder", "update", "version", "reason"},
    "version made": {"encoder", "version", "digest"},
    "version published": {"encoder", "version"},
    "snapshot": {"offset"},
    "broker away": {"problem"},
    "broker reconnected": {"reconnects", "seconds"},
    "left": {"node", "encoder"},
    "stop requested": {"sender"},
    "training ended": {"encoder", "version"},
    "node left": {"node"},
    "node vanished": {"node"},
    "node returned": {"node"},
}


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What stands on stderr since it was asked last."""
    yield lambda: capsys.readouterr().err
    structlog.reset_defaults()  # it writes to what this test has captured


def cut_off(broker: Any) -> None:
    """Let the party behind this connection see it away, and back. The embedded broker itself is never away."""
    status: Callable[[], BrokerStatus] = broker.status
    seen: list[bool] = []

    def away() -> BrokerStatus:
        seen.append(True)
        return dataclasses.replace(status(), connected=False, problem="cut")

    broker.status = away
    eventually(lambda: len(seen) > 3)
    broker.status = lambda: dataclasses.replace(status(), reconnects=1)


def whole_training(directory: Path) -> None:
    """One node trains and leaves, one cannot take part, one is refused an update, vanishes and comes back."""
    server = MemoryServer()
    settings = decided(update_rule=UpdateRule(when=ReturnWhen(steps=2), wait=True))
    config = {"snapshot_every_seconds": 0.2, "presence_timeout_seconds": 1.0}
    with running_master(server, directory / "m", settings, **config) as master:
        state = master.service.master.state
        node = Node(server, directory, "a", lines(1))
        other = Node(server, directory, "b", lines(2), private={"vocabulary": 10})
        encoder = eventually(lambda: next((e for e in state.encoders.values() if e.updates >= 3), None), 60)
        hand = HandNode(server, "hand")
        instruction = hand.enter()
        bad = numbers(instruction, float("nan"))
        hand.send(hand.manifest(instruction, 0, bad), bad)
        assert hand.hear(Receipt).reason == "not-finite"
        eventually(lambda: not state.nodes["hand"].present)
        hand.say(".alive", Alive(node="hand", incarnation="first"))
        eventually(lambda: state.nodes["hand"].present)
        cut_off(node.broker)
        cut_off(master.broker)
        enough = encoder.updates + 2
        eventually(lambda: encoder.updates >= enough)
        for each in node, other:
            each.end()
        eventually(lambda: not encoder.members["a"].accepted)
        hand.say(".stop", Stop(sender="hand"))
        eventually(lambda: encoder.status == "finished")


def test_f15_every_event_of_a_whole_training_is_in_the_json_log_with_its_keys(
    tmp_path: Path, written: Callable[[], str]
) -> None:
    configure_logging(json=True)
    whole_training(tmp_path)
    lines_written = [json.loads(line) for line in written().splitlines()]
    assert not [each for each in lines_written if "happened" in each], "the mark is not shown"
    told = {what: [each for each in lines_written if each["event"] == what] for what in EVENTS}
    assert [what for what, found in told.items() if not found] == []
    for what, keys in EVENTS.items():
        for each in told[what]:
            assert keys <= each.keys(), f"{what}: {each}"
    mine = [each["update"] for each in told["update handed in"]]
    assert len(mine) == len(set(mine)) >= 5
    for what in "update received", "update counted":
        by_master = {each["update"] for each in told[what] if each["node"] == "a"}
        assert by_master == set(mine), f"{what}: the ids that the node gave, and no other"
    assert {each.get("node", each.get("party")) for each in told["broker away"]} == {"a", "master"}


@pytest.mark.parametrize(("level", "shown"), [("info", False), ("debug", True)])
def test_f15_plain_logs_show_no_event_but_at_debug(
    tmp_path: Path, written: Callable[[], str], level: str, shown: bool
) -> None:
    configure_logging(level=level)
    whole_training(tmp_path)
    plain = written()
    assert "message set aside" not in plain and "happened" not in plain
    found = [what for what in EVENTS if f"] {what} " in plain]
    assert (found == list(EVENTS)) if shown else (found == [])


# --- F1 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["while it serves", "at the end"])
def test_f1_an_error_in_retention_ends_the_master_with_a_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[[], str], when: str
) -> None:
    """Also that of the last snapshot, when nothing else is waited for."""

    def stumble(*arguments: Any) -> int:
        raise ArithmeticError("a slip")

    monkeypatch.setattr("master_service.history.state_directory.prune", stumble)
    configure_logging(json=True)
    every = 0.05 if when == "while it serves" else 1e6
    master = Master(MemoryServer(), tmp_path, decided(), retention="since-snapshot", snapshot_every_seconds=every)
    if when == "at the end":
        eventually(lambda: master.service.master.state.encoders)
        master.party.stop()
    with pytest.raises(ArithmeticError, match="a slip"):
        eventually(lambda: master.party.wait(0.0))
    master.broker.close()
    errors = [each for each in map(json.loads, written().splitlines()) if each["level"] == "error"]
    [line] = errors
    assert (line["event"], line["thread"]) == ("a thread has failed, ending", "snapshot")
    assert line["problem"] == "ArithmeticError: a slip"


def test_f1_a_refusal_that_waiting_does_not_mend_ends_the_master(tmp_path: Path) -> None:
    master = Master(MemoryServer(), tmp_path, decided())
    status = master.broker.status
    master.broker.status = lambda: dataclasses.replace(status(), refused="ACCESS_REFUSED - no more")  # type: ignore[method-assign]
    with pytest.raises(AccessRefused, match="ACCESS_REFUSED - no more"):
        eventually(lambda: master.party.wait(0.0))
    master.broker.close()
