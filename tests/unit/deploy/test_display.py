"""What people are shown of a federation: the tables, and in words what keeps the master from going on."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from deploy.commands.display import FederationDisplay, conditions, federation_line, federation_tables

BLOCKED = "broker blocked: low on memory; nothing is lost, publishing goes on when it is over"
AWAY = "broker away: trying again"
SHORT = "disk short: 12.0 MiB free, 100.0 MiB needed; updates wait in the broker until there is room"
SHORT_DISK = {"short": True, "free_bytes": 12 << 20, "needed_bytes": 100 << 20}
ROOM = {"short": False, "free_bytes": 1 << 40, "needed_bytes": 100 << 20}


def made(
    *, connected: bool = True, blocked: str | None = None, encoders: bool = True, **more: dict[str, Any]
) -> dict[str, Any]:
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
        "broker": {"connected": connected, "blocked": blocked, "reconnects": 0},
        "encoders": {"text-1": encoder} if encoders else {},
        **more,
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (made(), []),
        (made(disk=ROOM, snapshot={"offset": 7, "age_seconds": None}), []),
        (made(blocked="low on memory"), [BLOCKED]),
        (made(connected=False), [AWAY]),
        (made(disk=SHORT_DISK), [SHORT]),
        (made(connected=False, disk=SHORT_DISK), [AWAY, SHORT]),
        # what blocks a broker is more than that a connection of ours is being opened again
        (made(connected=False, blocked="low on memory"), [BLOCKED]),
    ],
)
def test_what_keeps_the_master_from_going_on_is_a_line_each(given: dict[str, Any], said: list[str]) -> None:
    assert conditions(given) == said
    assert federation_line(given).splitlines()[1:] == said
    assert federation_line({**given, "encoders": {}}).splitlines()[1:] == said
    assert federation_line(given).startswith(
        "text-1 running version 3 25%  clinic-a: 1200 steps, loss 4.125, 2 returns"
    )


@pytest.mark.parametrize("encoders", [True, False])
def test_the_lines_stand_below_the_tables_on_a_terminal(encoders: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    with FederationDisplay(quiet=False) as display:
        monkeypatch.setattr(display, "_console", Console(file=screen, force_terminal=True, width=120))
        display.show(made(blocked="low on disk", encoders=encoders, disk=SHORT_DISK))
    shown = screen.getvalue()
    assert ("clinic-a" in shown) == encoders and ("no encoder yet" in shown) != encoders
    above = shown.index("clinic-a" if encoders else "no encoder yet")
    assert above < shown.index("broker blocked: low on disk") < shown.index("disk short: 12.0 MiB free")


def test_elsewhere_they_are_lines_and_a_quiet_display_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, expected in ((False, [AWAY]), (True, [])):
        with FederationDisplay(quiet=quiet) as display:
            display.show(made(connected=False))
            assert not display.due()
        assert capsys.readouterr().err.splitlines()[1:] == expected


def test_a_table_has_a_row_per_node() -> None:
    [table] = federation_tables(made())
    screen = io.StringIO()
    Console(file=screen, width=120).print(table)
    shown = screen.getvalue()
    assert "text-1  running  version 3  5 updates  25%" in shown
    assert [line.split("│")[1].strip() for line in shown.splitlines() if "1200" in line] == [
        "clinic-a",
        "clinic-b (away)",
    ]
