"""Nodes can be told apart in a terminal of 80 columns, and what fits is whole."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deploy.commands.node_table import COLUMNS, Pace, node_table, short_name, short_size
from master_service.status import MemberReport

MEMBER = MemberReport(
    samples=123456,
    returns=3312,
    last_weight=0.934,
    staleness=11,
    version=2991,
    steps=1234567,
    steps_per_second=117.3,
    loss=3.2141,
    held_out=13.41,
    waiting_seconds=1234.0,
    bytes_sent=3_400_000_000,
)


def printed(names: list[str], width: int) -> list[str]:
    screen = io.StringIO()
    table = node_table("text-1  running", dict.fromkeys(names, MEMBER), names, width)
    Console(file=screen, width=width).print(table)
    return screen.getvalue().splitlines()


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (80, ["node", "loss", "held-out", "version", "returns", "steps/s"]),
        (120, ["node", *(column.heading for column in COLUMNS)]),
        (40, ["node", "version", "returns"]),
    ],
)
def test_what_says_most_stays_where_there_is_little_room(width: int, headings: list[str]) -> None:
    names = ["clinic-cardiovascular", "clinic-digestive", "clinic-a"]
    lines = printed(names, width)
    heading = next(line for line in lines if "node" in line).split()
    assert set(headings) <= set(heading) and [each for each in heading if each in headings] == [
        each for each in ("node", *(column.heading for column in COLUMNS)) if each in headings
    ]
    for name in names:
        assert sum(name in line.split() for line in lines) == 1, "each has one line, with its whole name"


@given(
    names=st.lists(st.text("abcdefgh-", min_size=1, max_size=64), min_size=1, max_size=5, unique=True),
    width=st.integers(30, 200),
)
def test_nothing_is_wider_than_the_terminal_and_nothing_in_it_is_cut(names: list[str], width: int) -> None:
    lines = printed(names, width)
    assert all(len(line) <= width for line in lines)
    assert len([line for line in lines if line.strip()]) == 3 + len(names), "title, heading, rule, a line a node"
    shown = [short_name(name, max(8, min(40, width))) for name in names]
    assert [line.split()[0] for line in lines[-len(names) - 1 :] if line.strip()][-len(names) :] == shown


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (999, "999B"), (1536, "1.5K"), (12 << 20, "12M"), (3_400_000_000, "3.2G")]
)
def test_sizes_are_short(count: int, text: str) -> None:
    assert short_size(count) == text


@given(st.floats(0, 1e18))
def test_no_size_is_longer_than_six_characters(count: float) -> None:
    assert len(short_size(count)) <= 7


def test_long_names_keep_both_ends() -> None:
    assert short_name("organisation-north-7", 11) == "organ…rth-7" and short_name("short", 11) == "short"


def test_how_long_it_takes_is_said_once_it_can_be() -> None:
    pace = Pace()
    assert pace.left("e", 100.0, 0.2) is None
    assert pace.left("e", 110.0, 0.2005) is None, "too little to say"
    assert pace.left("e", 200.0, 0.4) == pytest.approx(300.0)
    assert pace.left("e", 300.0, 1.0) == 0.0
    assert pace.left("e", 310.0, 0.0) is None, "another training begins anew"
    assert pace.left("e", 320.0, 0.5) == pytest.approx(10.0)
    assert pace.left("other", 320.0, 0.5) is None
