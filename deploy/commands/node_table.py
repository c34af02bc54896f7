"""The table of an encoder's nodes, in as many columns as there is room for: the names first, and whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from master_service.status import MemberReport

#: Characters between two columns.
_GAP = 2
#: What is left of a longer name, its ends: names of one organisation's nodes often begin alike.
_LONGEST_NAME = 40


class Column(NamedTuple):
    """`rank`: the highest numbers go first where there is no room."""

    heading: str
    rank: int
    cell: Callable[[MemberReport], str]


def short_size(count: float) -> str:
    """Bytes in five characters at most: 12M, 1.5G."""
    for unit in ("B", "K", "M", "G", "T"):
        if count < 1000 or unit == "T":
            return f"{count:.0f}{unit}" if count >= 10 or unit == "B" else f"{count:.1f}{unit}"
        count /= 1024
    raise AssertionError


def short_name(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name that is too long without its middle."""
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2]}…{name[len(name) - (longest - longest // 2 - 1) :]}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


COLUMNS = (
    Column("steps", 7, lambda each: str(each.steps)),
    Column("steps/s", 4, lambda each: _number(each.steps_per_second, 1)),
    Column("loss", 2, lambda each: _number(each.loss, 3)),
    Column("held-out", 3, lambda each: _number(each.held_out, 3)),
    Column("version", 1, lambda each: str(each.version)),
    Column("stale", 6, lambda each: str(each.staleness)),
    Column("returns", 0, lambda each: str(each.returns)),
    Column("weight", 5, lambda each: _number(each.last_weight, 2)),
    Column("waited", 9, lambda each: f"{each.waiting_seconds:.0f} s"),
    Column("lost", 8, lambda each: "–" if each.lost_share is None else f"{each.lost_share:.1%}"),
    Column("sent", 10, lambda each: short_size(each.bytes_sent)),
)


def node_table(title: str, members: Mapping[str, MemberReport], names: Sequence[str], width: int) -> Table:
    """A row for each of `members`, under its name in `names`, in columns that fit into `width` characters."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0)
    )
    shown = [short_name(name, max(8, min(_LONGEST_NAME, width))) for name in names]
    rows = {column: [column.cell(member) for member in members.values()] for column in COLUMNS}
    left = width - max(len(name) for name in ("node", *shown))
    fitting = set()
    for column in sorted(COLUMNS, key=lambda each: each.rank):
        needed = max(len(text) for text in (column.heading, *rows[column])) + _GAP
        if needed > left:
            break
        left -= needed
        fitting.add(column)
    table.add_column("node", no_wrap=True)
    kept = [column for column in COLUMNS if column in fitting]
    for column in kept:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for index, name in enumerate(shown):
        table.add_row(name, *(rows[column][index] for column in kept))
    return table


class Pace:
    """How long an encoder still takes, by how its progress has grown since somebody looks."""

    #: Of progress that is too little to say anything from.
    LEAST = 0.01

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, float]] = {}

    def left(self, encoder: str, at: float, progress: float) -> float | None:
        """Seconds until its progress is 1, at `at` seconds of any one clock; None as long as that cannot be said."""
        begun, before = self._begun.setdefault(encoder, (at, progress))
        if progress < before:  # another training of it
            self._begun[encoder] = (at, progress)
            return None
        if progress - before < self.LEAST or at <= begun:
            return None
        return (1.0 - progress) * (at - begun) / (progress - before)
