"""What `make bench` measures: a list of parts, each of a few cells, run one after the other on a private RabbitMQ."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pika
import torch

from deploy.local_rabbitmq import LocalRabbitMQ
from tests.benchmarks.federation import Shape, run
from tests.benchmarks.hand_fed import fixed_cost, master_peak, small_messages
from tests.benchmarks.hand_out import hand_out
from tests.benchmarks.processes import machine_seconds
from tests.benchmarks.raw import rounds
from tests.benchmarks.simulated import simulated

#: A row of figures, plain for JSON.
Row = dict[str, Any]


@dataclass
class Bench:
    """Where cells run: a broker, and a fresh directory for each."""

    url: str
    directory: Path
    _numbers: Any = field(default_factory=itertools.count)

    def place(self) -> Path:
        return self.directory / f"cell-{next(self._numbers)}"


Cell = Callable[[Bench], Row]
Parts = Mapping[str, Sequence[Cell]]


def synchronous(bench: Bench, *, shape: Shape, versions: int, raw_versions: int) -> Row:
    """A round of ours, and beside it raw pika's, `plain` and `lean` (see `raw`)."""
    ours = run(replace(shape, until={"versions": versions}), bench.url, bench.place()).figures()
    sizes = (shape.nodes, shape.parameters, shape.up, shape.down)
    raw = {
        name: rounds(bench.url, *sizes, lean=lean, versions=raw_versions)
        for name, lean in (("plain", False), ("lean", True))
    }
    return {**ours, **raw}


def asynchronous(bench: Bench, *, shape: Shape, seconds: float) -> Row:
    """As many updates as come in so many seconds."""
    return run(replace(shape, until={"seconds": seconds}), bench.url, bench.place()).figures()


def sharded(bench: Bench, *, shape: Shape, pairs: int = 1) -> Row:
    """The same with one aggregator in the master and with several beside it, in turn: medians of so many pairs."""
    ran: dict[str, list[Row]] = {"one": [], "many": []}
    for _ in range(pairs):
        ran["one"].append(run(replace(shape, shards=1), bench.url, bench.place()).figures())
        ran["many"].append(run(shape, bench.url, bench.place()).figures())
    return {name: merged(rows) for name, rows in ran.items()}


def _hand_out(bench: Bench, *, parameters: int, readers: int) -> Row:
    return hand_out(bench.url, parameters=parameters, readers=readers)


_FREE = {"preset": "return-count"}


def _round(nodes: int, parameters: int, versions: int, raw_versions: int = 4, *, float32: bool = False) -> Cell:
    shape = Shape(nodes, parameters, "float32", "float32") if float32 else Shape(nodes, parameters)
    return partial(synchronous, shape=shape, versions=versions, raw_versions=raw_versions)


def _free(parameters: int, seconds: float) -> Cell:
    return partial(asynchronous, shape=Shape(4, parameters, rule=_FREE), seconds=seconds)


def _shards(
    shards: int, nodes: int, parameters: int, *, pairs: int = 1, rule: Row | None = None, versions: int = 10
) -> Cell:
    shape = Shape(nodes, parameters, until={"versions": versions}, shards=shards)
    return partial(sharded, shape=shape if rule is None else replace(shape, rule=rule), pairs=pairs)


#: Parts that are measured by themselves, if they are named.
ALONE = ("shards",)

#: What the rows of the aim are measured by. Together under ten minutes on two processors, without those that are ALONE.
PARTS: Parts = {
    "synchronous": [
        _round(4, 25_000_000, 10, 6),
        _round(4, 25_000_000, 8, float32=True),
        _round(4, 10_000_000, 10),
        _round(4, 10_000_000, 10, float32=True),
        _round(8, 10_000_000, 8),
        _round(2, 100_000_000, 6, 3),
    ],
    "asynchronous": [_free(parameters, 10.0) for parameters in (3_000, 80_000, 1_000_000, 10_000_000)],
    "fixed-cost": [lambda bench: fixed_cost(bench.url, bench.place())],
    "small-messages": [lambda bench: small_messages(bench.url, bench.place())],
    "master-peak": [
        lambda bench: master_peak(bench.url, bench.place(), parameters=10_000_000, nodes=2, updates=64),
        lambda bench: master_peak(bench.url, bench.place(), parameters=10_000_000, nodes=64, updates=128),
    ],
    "hand-out": [
        *(partial(_hand_out, parameters=1_000_000, readers=readers) for readers in (4, 64)),
        *(partial(_hand_out, parameters=10_000_000, readers=readers) for readers in (1, 4, 16, 64)),
    ],
    "simulated": [lambda bench: simulated(bench.place(), nodes=1_000, returns=10)],
    "shards": [
        _shards(2, 4, 25_000_000, pairs=3),
        _shards(4, 4, 25_000_000),
        _shards(2, 4, 10_000_000, pairs=3, rule=_FREE, versions=14),
        _shards(2, 2, 1_000_000),
        _shards(2, 2, 100_000_000, versions=6),
    ],
}


def measured(parts: Parts, directory: Path, *, runs: int = 1, say: Callable[[str], None] = lambda what: None) -> Row:
    """The figures of all parts, medians of `runs`, with those of `each` run; and of the machine. `say` is told what
    begins."""
    begun = time.monotonic()
    between: list[float] = []
    rows: dict[str, list[list[Row]]] = {name: [[] for _ in cells] for name, cells in parts.items()}
    with LocalRabbitMQ(directory / "rabbitmq") as server:
        about = _about(server.url, runs)
        bench = Bench(server.url, directory)
        for number in range(runs):
            for name, cells in parts.items():
                for index, cell in enumerate(cells):
                    between.append(_busy(0.3))
                    say(f"run {number + 1} of {runs}, {name} {index + 1} of {len(cells)}")
                    rows[name][index].append(cell(bench))
    about |= {"took_seconds": round(time.monotonic() - begun), "busy_between": between}
    return {"run": about, "parts": {name: [merged(each) for each in cells] for name, cells in rows.items()}}


def merged(rows: Sequence[Row]) -> Row:
    """The medians of all numbers; what is none is the same in each."""
    if len(rows) == 1:
        return rows[0]
    return {**_medians(rows), "each": list(rows)}


def _medians(rows: Sequence[Any]) -> Any:
    first = rows[0]
    if isinstance(first, dict):
        return {key: _medians([row[key] for row in rows]) for key in first}
    return statistics.median(rows) if isinstance(first, int | float) else first


def _about(url: str, runs: int) -> Row:
    """What stands beside every figure. `busy_before`: the share of the processors that was at work before anything was
    measured; `busy_between`, which comes later: before each cell, when nothing of ours is."""
    busy = _busy(1.0)
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        # private: a blocking connection has no name for what its broker says of itself
        version = (connection._impl.server_properties or {}).get("version", b"?")
    return {
        "command": _command(sys.argv[1:]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "processors": os.cpu_count(),
        "processor": _processor(),
        "platform": platform.platform(),
        "rabbitmq": version.decode() if isinstance(version, bytes) else str(version),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "busy_before": busy,
        "runs": runs,
    }


def _busy(seconds: float) -> float:
    """The share of the processors that is at work."""
    busy, idle = machine_seconds()
    time.sleep(seconds)
    busy_after, idle_after = machine_seconds()
    passed = busy_after - busy + idle_after - idle
    return round((busy_after - busy) / passed, 2) if passed else 0.0


def _command(arguments: Sequence[str]) -> str:
    """As it is given again; where the figures were written to is nobody's business."""
    kept = list(arguments)
    while "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return " ".join(["make bench", *([f'ARGS="{" ".join(kept)}"'] if kept else [])])


def _commit() -> str:
    """The commit that is measured; with a + if files differ from it. Empty where there is no git."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=8", "--dirty=+"]
    try:
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
