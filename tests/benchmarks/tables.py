"""The figures as tables: for a terminal, and for documents, where each stands between two marks and says which run it
is of. Nothing is measured here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from common.errors import UserError

Row = dict[str, Any]

_MARKED = re.compile(r"(<!-- bench: ([a-z-]+) -->\n).*?(<!-- end of bench -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """A part's figures in words."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for heading in self.headings:
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(figures: Row, console: Console, before: Row | None = None) -> None:
    """All tables, for people."""
    console.print(provenance(figures["run"]))
    for name, rows in figures["parts"].items():
        console.print(table(name, rows, _part(before, name)).rich())


def document(file: Path, figures: Row, before: Row | None = None) -> list[str]:
    """Write the tables between the marks of a document; gives the names of those that it has. What was not measured
    stays as it is. Raises UserError for a document without marks."""
    made = {}
    for name, rows in figures["parts"].items():
        drawn = table(name, rows, _part(before, name))
        said = [f"{drawn.title}. {provenance(figures['run'])}"]
        if before is not None and name in before["parts"]:
            said.append(f"Before: {provenance(before['run'])}")
        made[name] = drawn.markdown() + "\n" + "\n".join(said)
    return placed(file, made)


def placed(file: Path, made: Mapping[str, str]) -> list[str]:
    """Put each text between the marks that have its name; gives the names of those that have a place. Raises UserError
    if none has."""
    text, written = file.read_text("utf-8"), []

    def replaced(found: re.Match[str]) -> str:
        if found[2] not in made:
            return found[0]
        written.append(found[2])
        return f"{found[1]}{made[found[2]]}\n{found[3]}"

    text = _MARKED.sub(replaced, text)
    if not written:
        raise UserError(
            f"{file}: no table to write; its place is between <!-- bench: NAME --> and <!-- end of bench -->"
        )
    file.write_text(text, "utf-8")
    return written


def provenance(run: Row) -> str:
    """Which run it was: command, commit, date, machine, what else was at work."""
    many = f"medians of {run['runs']} runs" if run["runs"] > 1 else "one run"
    between = f", {max(run['busy_between']):.0%} at most between its parts" if run["busy_between"] else ""
    return (
        f"`{run['command']}`, {many}, commit {run['commit'] or 'unknown'}, {run['date']} UTC; {run['processors']} "
        f"processors ({run['processor'] or run['platform']}), RabbitMQ {run['rabbitmq']}, torch {run['torch']}, "
        f"{run['busy_before']:.0%} busy with other work before it began{between}."
    )


def table(name: str, rows: Sequence[Row], before: Sequence[Row] = ()) -> Table:
    """The table of a part."""
    title, key, figure, headings, cells = _TABLES[name]
    known = {key(row): figure(row) for row in before}
    headings = [headings[0], *(["before"] if before else []), *headings[1:]]
    lines = []
    for row in rows:
        first, *others = cells(row)
        earlier = [known.get(key(row), "–")] if before else []
        lines.append([first, *earlier, *others])
    return Table(title, headings, lines)


def _part(figures: Row | None, name: str) -> Sequence[Row]:
    found: Sequence[Row] = figures["parts"].get(name, ()) if figures is not None else ()
    return found


# --- each part -------------------------------------------------------------------------------------------------------


def _size(row: Row) -> str:
    return f"{row['nodes']} × {row['parameters']:,}"


def _shape(row: Row) -> str:
    return f"{_size(row)}, {row['up']} up, {row['down']} down"


def _round(row: Row) -> Iterator[str]:
    ours, plain, lean = row["round_seconds"], row["plain"]["round_seconds"], row["lean"]["round_seconds"]
    yield _shape(row)
    yield f"{ours:.2f} s"
    yield from (f"{each:.2f}" for each in (plain, lean))
    yield from (f"{ours / each:.2f}" for each in (plain, lean))
    cpu = row["cpu_seconds_a_version"]
    yield from (f"{cpu[party]:.2f}" for party in ("master", "n0", "broker"))
    sets = row["sets_above"]
    yield f"{row['peak_mib']['master']} ({sets['master']:.1f})"
    yield f"{max(row['peak_mib'][party] for party in sets if party != 'master')} ({_node_sets(row):.1f})"


def _node_sets(row: Row) -> float:
    return float(max(each for party, each in row["sets_above"].items() if party != "master"))


def _free(row: Row) -> Iterator[str]:
    yield _size(row)
    yield f"{row['updates_per_second']:.1f}/s"
    yield f"{row['versions']}"
    yield f"{row['adopted_a_node']:.0f}"
    yield f"{row['read_per_adopted']:.2f}"
    yield f"{row['read_twice']}"
    yield f"{1000 * row['cpu_seconds_a_version']['master']:.1f}"
    yield f"{row['peak_mib']['master']}"
    yield f"{row['peak_mib']['n0']}"


def _shards(row: Row) -> Iterator[str]:
    one, many = row["one"], row["many"]
    yield _pair(row)
    yield from (f"{run['round_seconds']:.2f} s" for run in (one, many))
    yield f"{many['round_seconds'] / one['round_seconds']:.2f}"
    before, cpu = one["cpu_seconds_a_version"], many["cpu_seconds_a_version"]
    each = aggregators(many)
    for party in ("master", "n0", "broker"):
        yield f"{before[party]:.2f} → {cpu[party]:.2f}"
    yield f"{max(cpu[party] for party in each):.2f}"
    moved = [
        sum(run[way][party] for way in ("sent_a_version", "given_a_version"))
        for run, party in ((one, "master"), (many, "master"), *((many, party) for party in each))
    ]
    yield f"{moved[0] / 1e6:,.1f} → {moved[1] / 1e6:,.2f}"
    yield f"{max(moved[2:]) / 1e6:,.1f}"
    yield f"{one['peak_mib']['master']} → {many['peak_mib']['master']}"
    largest = max(each, key=lambda party: many["peak_mib"][party])
    yield f"{many['peak_mib'][largest]} ({many['sets_above'][largest]:.1f})"


def _pair(row: Row) -> str:
    many = row["many"]
    return f"{_size(many)}, {many['rule']}, {many['shards']} aggregators"


def aggregators(row: Row) -> list[str]:
    """The parties of a federation that are."""
    return [party for party in row["peak_mib"] if re.fullmatch(r"a\d+", party)]


def _fixed(row: Row) -> Iterator[str]:
    yield f"{row['parameters']:,} parameters, {row['updates']} updates at hand"
    yield f"{row['milliseconds']:.2f} ms"
    yield f"{row['cpu_milliseconds']:.2f}"


def _messages(row: Row) -> Iterator[str]:
    yield f"{row['messages']:,} of each kind at hand"
    yield from (f"{row['per_second'][kind]:,.0f}/s" for kind in ("request.fetch", "request.join", "ack"))


def _peak(row: Row) -> Iterator[str]:
    yield _size(row)
    yield f"{row['above_mib']} MiB"
    yield f"{row['sets_above']:.2f}"
    yield f"{row['updates_per_second']:.1f}"
    yield f"{row['versions']}"


def _hand_out(row: Row) -> Iterator[str]:
    yield f"{row['readers']} readers, {row['parameters']:,}"
    yield f"{row['seconds']:.3f} s"
    yield f"{row['raw_seconds']:.3f}"
    yield f"{row['seconds'] / row['raw_seconds']:.2f}"
    yield f"{row['written_times']:.2f}"


def _simulated(row: Row) -> Iterator[str]:
    yield f"{row['nodes']:,} nodes × {row['returns']} returns"
    yield f"{row['seconds']:.0f} s"
    yield f"{row['milliseconds_an_update']:.2f}"


Words = Callable[[Row], str]

#: Of each part: title, what makes two rows the same, the figure that is compared, the headings, and the cells.
_TABLES: dict[str, tuple[str, Words, Words, list[str], Callable[[Row], Iterator[str]]]] = {
    "synchronous": (
        "A synchronous round: the median time from one version to the next; raw pika moves the same bytes through the "
        "same queues; processor seconds of a round; peak memory in MiB, in brackets above the start (of a node: above "
        "its model) in float32 sets",
        _shape,
        lambda row: f"{row['round_seconds']:.2f} s",
        [
            "nodes × parameters, encodings",
            "round",
            "raw pika",
            "lean raw",
            "÷ raw",
            "÷ lean",
            "master s",
            "node s",
            "broker s",
            "master MiB",
            "node MiB",
        ],
        _round,
    ),
    "asynchronous": (
        "Asynchronous, default rule and encodings; versions that a node took, bytes from the stream by those of these "
        "versions, messages that came twice; processor milliseconds of the master a version; peak memory in MiB",
        _size,
        lambda row: f"{row['updates_per_second']:.1f}/s",
        [
            "nodes × parameters",
            "updates",
            "versions",
            "taken by a node",
            "read ÷ taken",
            "twice",
            "master ms",
            "master MiB",
            "node MiB",
        ],
        _free,
    ),
    "fixed-cost": (
        "What an update costs the master beside its bytes, log on, over RabbitMQ, from the first to the last of many",
        lambda row: f"{row['parameters']}",
        lambda row: f"{row['milliseconds']:.2f} ms",
        ["hand-fed", "an update", "processor ms"],
        _fixed,
    ),
    "small-messages": (
        "Messages without tensors that the master logs",
        lambda row: "",
        lambda row: f"{row['per_second']['request.fetch']:,.0f}/s",
        ["hand-fed", "fetch", "join", "instruction ack"],
        _messages,
    ),
    "master-peak": (
        "The most memory of a master above its start, hand-fed; in float32 sets",
        _size,
        lambda row: f"{row['above_mib']} MiB",
        ["nodes × parameters", "above its start", "sets", "updates a second", "versions"],
        _peak,
    ),
    "hand-out": (
        "From a version's first chunk to the last reader; raw: pika alone, the same bytes, readers that listen before "
        "they are written; and how many times its bytes the master sent",
        lambda row: f"{row['readers']}/{row['parameters']}",
        lambda row: f"{row['seconds']:.3f} s",
        ["readers, parameters", "last reader", "raw", "÷ raw", "times sent"],
        _hand_out,
    ),
    "simulated": (
        "`shared-encoder simulate`, one process",
        lambda row: f"{row['nodes']}/{row['returns']}",
        lambda row: f"{row['seconds']:.0f} s",
        ["federation", "whole", "ms an update"],
        _simulated,
    ),
    "shards": (
        "Without aggregators → with them, in turn on the same processors: the median time between two versions; "
        "processor seconds a version, and of the aggregator that has most; bytes of messages that the master sends and "
        "is given a version, MB, and that an aggregator does; peak memory in MiB, in brackets above the start in "
        "float32 sets of its part",
        _pair,
        lambda row: f"{row['many']['round_seconds']:.2f} s",
        [
            "nodes × parameters",
            "a version without",
            "with",
            "÷",
            "master s",
            "node s",
            "broker s",
            "an aggregator s",
            "master MB",
            "an aggregator MB",
            "master MiB",
            "an aggregator MiB",
        ],
        _shards,
    ),
}
