"""F15: what a party's connection to the broker says of itself as events, and what of events a log shows."""

from __future__ import annotations

import json

import pytest
import structlog

from common.clock import VirtualClock
from common.events import BrokerWatch, happened
from common.wire.broker import BrokerStatus
from deploy.logging import configure_logging


def status(*, connected: bool = True, blocked: str | None = None, reconnects: int = 0) -> BrokerStatus:
    return BrokerStatus(connected, blocked, reconnects, 0, 0, problem="" if connected else "no broker answers")


def test_f15_a_connection_that_goes_and_comes_is_told_of_once_each() -> None:
    clock = VirtualClock()
    watch = BrokerWatch(clock, node="n")
    seen = [
        status(),
        status(connected=False),
        status(connected=False),
        status(reconnects=1),
        status(reconnects=1),
        status(reconnects=2),  # lost and made again since the last look
        status(reconnects=2, blocked="disk alarm"),
        status(reconnects=2, blocked="disk alarm"),
        status(reconnects=2),
    ]
    with structlog.testing.capture_logs() as logs:
        for each in seen:
            watch.look(each)
            clock.wait(5.0)
    told = [{key: each[key] for key in each if key not in ("log_level", "happened", "node")} for each in logs]
    assert {each["node"] for each in logs} == {"n"}
    assert told == [
        {"event": "broker away", "problem": "no broker answers"},
        {"event": "broker reconnected", "reconnects": 1, "seconds": 10.0},
        {"event": "broker away", "problem": ""},
        {"event": "broker reconnected", "reconnects": 2, "seconds": 0.0},
        {"event": "broker blocked", "problem": "disk alarm"},
        {"event": "broker unblocked", "seconds": 10.0},
    ]


@pytest.mark.parametrize(
    ("as_json", "level", "shown"),
    [(True, "info", True), (True, "debug", True), (False, "info", False), (False, "debug", True)],
)
def test_f15_events_are_for_machines_and_for_who_debugs(
    capsys: pytest.CaptureFixture[str], as_json: bool, level: str, shown: bool
) -> None:
    configure_logging(json=as_json, level=level)
    happened("version made", encoder="e", version=4)
    structlog.get_logger().info("for people")
    structlog.reset_defaults()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + shown and "for people" in lines[-1] and "happened" not in "".join(lines)
    if as_json:
        event = json.loads(lines[0])
        assert (event["event"], event["encoder"], event["version"]) == ("version made", "e", 4)
