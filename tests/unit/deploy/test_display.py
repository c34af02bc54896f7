"""What people are shown of a federation: the tables, and in words what keeps the master from going on."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from rich.console import Console

from common.errors import UserError
from common.wire.broker import BrokerStatus
from deploy.commands.display import FederationDisplay, NodeDisplay, conditions, federation_line, federation_tables
from deploy.commands.observe import read_report
from deploy.logging import configure_logging
from master_service.status import Report
from node_service.figures import NodeFigures
from tests.unit.deploy.screen import Screen

BLOCKED = "broker blocked: low on memory; nothing is lost, publishing goes on when it is over"
AWAY = "broker away: trying again"
PROBLEM = "broker: no queue 'x' in vhost '/'"
SHORT = "disk short: 12.0 MiB free, 100.0 MiB needed; updates wait in the broker until there is room"
SHORT_DISK = {"short": True, "free_bytes": 12 << 20, "needed_bytes": 100 << 20}
ROOM = {"short": False, "free_bytes": 1 << 40, "needed_bytes": 100 << 20}


def plain(*, broker: dict[str, Any] | None = None, encoders: bool = True, **more: Any) -> dict[str, Any]:
    """A report as it travels."""
    member = {
        "active": True,
        "steps": 1200,
        "steps_per_second": 7.5,
        "loss": 4.125,
        "version": 3,
        "staleness": 1,
        "returns": 2,
        "last_weight": None,
        "waiting_seconds": 0.0,
        "bytes_sent": 2048,
    }
    encoder = {
        "status": "running",
        "version": 3,
        "updates": 5,
        "progress": 0.25,
        "waiting_for_nodes": 0,
        "members": {"clinic-a": member, "clinic-b": {**member, "active": False}},
    }
    return {
        "broker": {"connected": True, "blocked": None, "reconnects": 0, **(broker or {})},
        "encoders": {"text-1": encoder} if encoders else {},
        **more,
    }


def made(**changes: Any) -> Report:
    return read_report(plain(**changes))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Screen]:
    """Puts a terminal in the place of stderr, with logging set up for it. To be called in the test: pytest puts a
    stderr of its own there after fixtures are made."""

    def made() -> Screen:
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        configure_logging()
        return screen

    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"TERM": "xterm", "COLUMNS": "400", "LINES": "50"}.items():
        monkeypatch.setenv(variable, value)
    return made


def node_service(figures: NodeFigures, **status: Any) -> Any:
    """Of a NodeService what its display looks at."""
    connection = {"connected": True, "blocked": None, "reconnects": 0, "bytes_out": 2048, "bytes_in": 0}
    return SimpleNamespace(figures=figures, broker=SimpleNamespace(status=lambda: BrokerStatus(**connection | status)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, []),
        ({"disk": ROOM, "snapshot": {"offset": 7, "age_seconds": None}}, []),
        ({"broker": {"blocked": "low on memory"}}, [BLOCKED]),
        ({"broker": {"connected": False}}, [AWAY]),
        ({"disk": SHORT_DISK}, [SHORT]),
        ({"broker": {"connected": False}, "disk": SHORT_DISK}, [AWAY, SHORT]),
        # what blocks a broker is more than that a connection of ours is being opened again
        ({"broker": {"connected": False, "blocked": "low on memory"}}, [BLOCKED]),
        ({"broker": {"problem": "no queue 'x' in vhost '/'"}}, [PROBLEM]),
        ({"broker": {"connected": False, "problem": "no queue 'x' in vhost '/'"}}, [AWAY, PROBLEM]),
        ({"broker": {"blocked": "low on memory", "problem": "low on memory"}}, [BLOCKED]),
    ],
)
def test_what_keeps_the_master_from_going_on_is_a_line_each(given: dict[str, Any], said: list[str]) -> None:
    assert conditions(made(**given)) == said
    assert federation_line(made(**given)).splitlines()[1:] == said
    assert federation_line(made(**given, encoders=False)).splitlines()[1:] == said
    assert federation_line(made(**given)).startswith(
        "text-1 running version 3 25%  clinic-a: 1200 steps, loss 4.125, 2 returns"
    )


@pytest.mark.parametrize("encoders", [True, False])
def test_the_lines_stand_below_the_tables_on_a_terminal(encoders: bool, terminal: Callable[[], Screen]) -> None:
    screen = terminal()
    with FederationDisplay(quiet=False) as display:
        display.show(made(broker={"blocked": "low on disk"}, encoders=encoders, disk=SHORT_DISK))
    shown = screen.getvalue()
    assert ("clinic-a" in shown) == encoders and ("no encoder yet" in shown) != encoders
    above = shown.index("clinic-a" if encoders else "no encoder yet")
    assert above < shown.index("broker blocked: low on disk") < shown.index("disk short: 12.0 MiB free")


def test_elsewhere_they_are_lines_and_a_quiet_display_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, expected in ((False, [AWAY]), (True, [])):
        with FederationDisplay(quiet=quiet) as display:
            display.show(made(broker={"connected": False}))
            assert not display.due()
        assert capsys.readouterr().err.splitlines()[1:] == expected


def test_held_out_losses_stand_beside_the_claimed_ones_where_there_are_any() -> None:
    given = plain()
    encoder = given["encoders"]["text-1"]
    encoder |= {"held_out": 3.5, "held_out_version": 40, "best_held_out": 3.25, "best_version": 30}
    encoder["members"]["clinic-a"] |= {"held_out": 3.75, "held_out_version": 41}
    report = read_report(given)
    [table] = federation_tables(report)
    [column] = [each for each in table.columns if each.header == "held-out"]
    assert list(column.cells) == ["3.750", "–"]
    for shown in (str(table.title), federation_line(report)):
        assert "held-out 3.500 (best 3.250, version 30)" in shown
    assert "held-out" not in federation_line(made())


def test_a_table_has_a_row_per_node() -> None:
    [table] = federation_tables(made())
    screen = io.StringIO()
    Console(file=screen, width=120).print(table)
    shown = screen.getvalue()
    assert "text-1  running  version 3  5 updates  25%" in shown
    rows = [line for line in shown.splitlines() if "1200" in line]
    assert [line.split("  ")[0] for line in rows] == ["clinic-a", "clinic-b (away)"]


@pytest.mark.parametrize("part", ["broker", "encoders", "member", "everything"])
def test_a_report_of_an_older_master_is_shown_as_far_as_it_goes(part: str) -> None:
    given = plain()
    if part == "member":
        given["encoders"]["text-1"]["members"]["clinic-a"] = {}
    elif part == "everything":
        given = {}
    else:
        del given[part]
    shown = federation_line(read_report(given))
    assert shown.startswith("text-1 running" if part in ("broker", "member") else "no encoder yet")
    assert ("clinic-a: 0 steps, loss –, 0 returns" in shown) == (part == "member")
    assert len(federation_tables(read_report(given))) == (part in ("broker", "member"))


def test_a_report_of_a_newer_master_is_shown_without_what_is_unknown() -> None:
    given = plain(weather="fine")
    given["broker"]["weather"] = given["encoders"]["text-1"]["weather"] = {"sky": "blue"}
    given["encoders"]["text-1"]["status"] = "paused"
    assert federation_line(read_report(given)).startswith("text-1 paused version 3")


def test_a_report_that_cannot_be_read_is_one_line_that_says_where() -> None:
    given = plain()
    given["encoders"]["text-1"]["members"]["clinic-a"]["steps"] = "many"
    with pytest.raises(UserError, match=r"encoders\.text-1\.members\.clinic-a\.steps: .*another release") as raised:
        read_report(given)
    assert "\n" not in str(raised.value)


def test_log_lines_stand_above_the_live_table(terminal: Callable[[], Screen]) -> None:
    screen = terminal()
    log = structlog.get_logger()
    with FederationDisplay(quiet=False) as display:
        display.show(made())
        log.warning("the disk is filling", free_bytes=12)
        display.show(made(disk=SHORT_DISK))
        log.warning("the disk is full")
    log.info("stopped")
    rows = screen.rows()
    first, second, last = (
        next(row for row, text in enumerate(rows) if words in text)
        for words in ("the disk is filling", "the disk is full", "stopped")
    )
    table = next(row for row, text in enumerate(rows) if text.startswith("text-1  running"))
    assert (first, second) == (0, 1) and second < table < last == len(rows) - 2
    assert rows[first].endswith("free_bytes=12")  # colours are not part of it
    assert sum("clinic-a" in text for text in rows) == 1
    assert rows[last - 1] == SHORT and rows[last].split("]")[1].strip() == "stopped"


def test_log_lines_stand_above_the_line_of_a_node(terminal: Callable[[], Screen]) -> None:
    screen = terminal()
    log = structlog.get_logger()
    figures = NodeFigures(note="training", steps=7)
    with NodeDisplay("clinic-a", quiet=False) as display:
        display.update(node_service(figures))
        log.warning("first")
        log.warning("second")
        rows = screen.rows()
    assert [text.split("]")[1].strip() for text in rows[:2]] == ["first", "second"]
    assert ["clinic-a: training, 7 steps" in text for text in rows[2:]] == [True]


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_a_node_that_stands_still_says_since_when_it_waits_for_the_master(
    on_a_terminal: bool, terminal: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch
) -> None:
    since = time.mktime((2024, 5, 6, 17, 8, 9, 0, 0, -1))
    for waiting, words in ((since, "ready, waiting for the master since 17:08:09, 0 steps"), (None, "ready, 0 steps")):
        stream = terminal() if on_a_terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        with NodeDisplay("clinic-a", quiet=False) as display:
            display.update(node_service(NodeFigures(note="ready", waiting_since=waiting)))
        assert f"clinic-a: {words}" in stream.getvalue()


def test_a_node_shows_what_is_wrong_with_its_broker_and_takes_no_words_for_markup(
    terminal: Callable[[], Screen],
) -> None:
    screen = terminal()
    with NodeDisplay("clinic-a", quiet=False) as display:
        figures = NodeFigures(note="refused text-1: [Errno 2] [/no] such file")
        display.update(node_service(figures, connected=False, problem="[/amq.topic] is gone"))
    shown = screen.getvalue()
    assert "refused text-1: [Errno 2] [/no] such file" in shown
    assert f"{AWAY}, broker: [/amq.topic] is gone" in shown
