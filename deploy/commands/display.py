"""What people see while a master, a node or the demo runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.growth import SECONDS_A_DAY, seconds_left
from common.wire.broker import BrokerStatus
from deploy.commands.node_table import Pace, node_table
from master_service.status import BrokerReport, EncoderReport, MemberReport, Report

if TYPE_CHECKING:
    from master_service.service import MasterService
    from node_service.service import NodeService

#: Seconds between refreshes of the table, and between plain lines.
_REFRESH_SECONDS = 0.5
_LINE_SECONDS = 10.0
#: Columns of tables that do not go to a terminal.
_PLAIN_WIDTH = 120

#: A disk that lasts longer needs no word, seconds.
_LONG_SECONDS = 365 * SECONDS_A_DAY


def console() -> Console:
    """A console on stdout for results: as wide as the terminal, or wide enough for every table if there is none."""
    made = Console()
    return made if made.is_terminal else Console(width=_PLAIN_WIDTH)


@contextmanager
def saying(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Show `text` while the body runs: a spinner on a terminal, one line elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield
    elif console.is_terminal:
        with console.status(f"{text} …"):
            yield
    else:
        console.print(f"{text} …", highlight=False)
        yield


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1,024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def number(value: float | None, digits: int = 2) -> str:
    """A number for people; a dash if it is not known."""
    return "–" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """How long, for people, in the largest unit of which there are two."""
    for unit, each in (("days", SECONDS_A_DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * each:
            return f"{seconds / each:.0f} {unit}"
    return f"{seconds:.0f} s"


def share(value: float | None) -> str:
    """A part of a whole for people; a dash if it is not known."""
    return "–" if value is None else f"{value:.1%}"


def conditions(report: Report) -> list[str]:
    """What keeps the master from working, one line each; empty if nothing does."""
    lines = broker_conditions(report.broker)
    if report.disk.short:
        lines.append(
            f"disk short: {size(report.disk.free_bytes)} free, {size(report.disk.needed_bytes)} needed; "
            "updates wait in the broker until there is room"
        )
    elif report.log.blocked:
        lines.append(f"{report.log.blocked}; updates wait in the broker until then")
    return lines


def kept(report: Report) -> str:
    """How much comes, how much of it is kept to replay, and how long the disk lasts, in one line."""
    log, disk = report.log, report.disk
    parts = [f"log: {log.entries:,} rows"]
    if log.bytes_per_day is not None:
        parts.append(f"{size(log.bytes_per_day)} a day come")
    parts.append(f"updates are kept up to {size(log.keeps_bytes)}" if log.keeps_bytes is not None else "all are kept")
    bounded = log.keeps_bytes is not None and log.keeps_bytes < disk.free_bytes - disk.needed_bytes
    left = None if bounded else seconds_left(disk.free_bytes, disk.needed_bytes, log.bytes_per_day)
    if left is not None and left < _LONG_SECONDS:
        parts.append(f"the disk lasts {duration(left)}")
    versions = ", ".join(f"{version} of {encoder}" for encoder, version in log.replays_from.items())
    if versions:
        parts.append(f"replay begins at version {versions}")
    return "; ".join(parts)


def broker_conditions(broker: BrokerReport | BrokerStatus) -> list[str]:
    """What is wrong with a connection to the broker, one line each. An alarm explains a lost connection too."""
    lines = []
    if broker.blocked:
        lines.append(f"broker blocked: {broker.blocked}; nothing is lost, publishing goes on when it is over")
    elif not broker.connected:
        lines.append("broker away: trying again")
    if broker.problem and broker.problem != broker.blocked:
        lines.append(f"broker: {broker.problem}")
    return lines


def federation_tables(
    report: Report, width: int = _PLAIN_WIDTH, left: Mapping[str, float] | None = None
) -> list[Table]:
    """One table per encoder, one row per node, in as many columns as fit into `width` characters. `left`: seconds until
    an encoder is finished, of those of which it is known."""
    tables = []
    for name, encoder in report.encoders.items():
        title = f"{name}  {_status(encoder)}  version {encoder.version}"
        title += f"  {encoder.updates} updates  {encoder.progress:.0%}"
        if left and name in left:
            title += f", about {duration(left[name])} left"
        if encoder.waiting_for_nodes > 0:
            title += f"  waiting for {encoder.waiting_for_nodes} more node(s)"
        title += _held_out(encoder)
        names = [f"{node}{_state_of(member)}" for node, member in encoder.members.items()]
        tables.append(node_table(title, encoder.members, names, width))
    return tables


def _status(encoder: EncoderReport) -> str:
    return "paused" if encoder.paused else encoder.status


def _state_of(member: MemberReport) -> str:
    """What is to be said of a node beside its name."""
    return " (out)" if member.kicked else "" if member.active else " (away)"


def _held_out(encoder: EncoderReport) -> str:
    """How good it is by its members' validation samples; nothing while none have measured it."""
    if encoder.held_out is None or encoder.best_held_out is None:
        return ""
    return f"  held-out {encoder.held_out:.3f} (best {encoder.best_held_out:.3f}, version {encoder.best_version})"


def federation_line(report: Report) -> str:
    """The report without a terminal: one line per encoder, one per condition."""
    lines = []
    for name, encoder in report.encoders.items():
        nodes = "  ".join(
            f"{node}: {member.steps} steps, loss {number(member.loss, 3)}, {member.returns} returns" + _state_of(member)
            for node, member in encoder.members.items()
        )
        waiting = encoder.waiting_for_nodes
        wanted = f"waiting for {waiting} more node(s)  " if waiting > 0 else ""
        state = f"{name} {_status(encoder)} version {encoder.version} {encoder.progress:.0%}{_held_out(encoder)}"
        lines.append(f"{state}  {wanted}{nodes}")
    if not lines:
        lines.append("no encoder yet: ask for one with `shared-encoder request get text`, or master --get text")
    return "\n".join([*lines, *conditions(report)])


class FederationDisplay:
    """Shows reports on stderr: redrawn in place on a terminal, a line every ten seconds elsewhere, nothing if quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._quiet = quiet
        self._next = 0.0
        self._pace = Pace()

    def __enter__(self) -> FederationDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def due(self) -> bool:
        """Whether enough time has passed since the last `show`."""
        return not self._quiet and time.monotonic() >= self._next

    def show(self, report: Report) -> None:
        """Show a report now, due or not."""
        if self._quiet:
            return
        if not self._console.is_terminal:
            self._next = time.monotonic() + _LINE_SECONDS
            print(federation_line(report), file=sys.stderr, flush=True)
            return
        self._next = time.monotonic() + _REFRESH_SECONDS
        if report.encoders:
            tables = federation_tables(report, self._console.width, self._left(report))
            group = Group(*tables, *(Text(line) for line in conditions(report)))
        else:
            group = Group(Text(federation_line(report)))
        if self._live is None:
            self._live = Live(group, console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(group, refresh=True)

    def _left(self, report: Report) -> dict[str, float]:
        """How long encoders still take, by their pace since this display began."""
        now, found = time.monotonic(), {}
        for name, encoder in report.encoders.items():
            left = self._pace.left(name, now, encoder.progress)
            if left is not None and encoder.status == "running" and not encoder.paused:
                found[name] = left
        return found


class MasterDisplay(FederationDisplay):
    """The display of `shared-encoder master`; `update` is the service's `on_change`."""

    def __enter__(self) -> MasterDisplay:
        return self

    def update(self, service: MasterService) -> None:
        if self.due():
            self.show(service.report())


class NodeDisplay:
    """One line on stderr about a running node; `update` is the service's `on_change`."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        self._name = name
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._next = 0.0
        self._status = None if quiet or not self._console.is_terminal else self._console.status("starting")

    def __enter__(self) -> NodeDisplay:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, service: NodeService) -> None:
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        figures, broker = service.figures, service.broker.status()
        note = figures.doing
        if figures.waiting_since is not None:
            note += f", waiting for the master since {time.strftime('%H:%M:%S', time.localtime(figures.waiting_since))}"
        text = (
            f"{self._name}: {note}, {figures.steps} steps ({figures.steps_per_second:.1f}/s), "
            f"loss {number(figures.loss, 3)}, held-out {number(figures.held_out, 3)}, "
            f"version {figures.version}, {figures.accepted} updates counted"
            f" of {figures.handed_in} (last weight {figures.last_weight:.2f}, {figures.staleness} versions stale), "
            f"{size(broker.bytes_out)} sent, waited {figures.waiting_seconds:.0f} s, lost {share(figures.lost_share)}"
        )
        strangers = [f"{figures.turned_away} messages dropped that are not the master's"] if figures.turned_away else []
        text = ", ".join([text, *strangers, *broker_conditions(broker)])
        if self._status is not None:
            self._next = now + _REFRESH_SECONDS
            self._status.update(Text(text))  # not as markup: errors may hold brackets
        else:
            self._next = now + _LINE_SECONDS
            print(text, file=sys.stderr, flush=True)
