"""What communication costs, beside what the same bytes cost pika alone, in one run on this machine.

    make bench                          # all of it, about seven minutes; JSON into bench.json
    make bench ARGS="--rounds 4"        # fewer versions of each
    python -m tests.benchmarks.throughput | replay | one_member | node_arithmetic      # parts by themselves

Training is a constant, so every second here is one in which nobody trains. Master, nodes and broker share this
machine's processors; what else was at work is printed with the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.local_rabbitmq import LocalRabbitMQ
from tests.benchmarks.federation import Shape, run
from tests.benchmarks.processes import machine_seconds
from tests.benchmarks.raw import rounds

#: Versions of a synchronous run, of which the first few are not counted.
_ROUNDS = 12
#: Of an asynchronous run.
_SECONDS = 12.0
_FLOAT32 = {"up": "float32", "down": "float32"}
SYNCHRONOUS = (Shape(4, 25_000_000), Shape(4, 25_000_000, **_FLOAT32))  # type: ignore[arg-type]
ASYNCHRONOUS = tuple(
    Shape(4, parameters, rule={"preset": "return-count"}) for parameters in (3_000, 80_000, 1_000_000, 10_000_000)
)


def measured(
    synchronous: Sequence[Shape], asynchronous: Sequence[Shape], directory: Path, *, versions: int, seconds: float
) -> dict[str, Any]:
    """The figures of all shapes, and of this machine, plain for JSON. `seconds`: of each asynchronous run.

    Of a synchronous round: `plain` and `lean` are raw pika's (see `raw`), each measured beside it."""
    with LocalRabbitMQ(directory / "rabbitmq") as server:
        idle = _others()
        rows = []
        for number, shape in enumerate(synchronous):
            ours = run(
                replace(shape, until={"versions": versions}), server.url, directory / f"round-{number}"
            ).figures()
            raw = {
                name: rounds(server.url, shape.nodes, shape.parameters, shape.up, shape.down, lean=lean)
                for name, lean in (("plain", False), ("lean", True))
            }
            rows.append({**ours, **raw})
        free = [
            run(replace(shape, until={"seconds": seconds}), server.url, directory / f"free-{number}").figures()
            for number, shape in enumerate(asynchronous)
        ]
    machine = {"processors": os.cpu_count(), "platform": platform.platform(), "busy_before": idle}
    return {"machine": machine, "synchronous": rows, "asynchronous": free}


def _others() -> float:
    """The share of the processors that was at work before anything was measured, over a second."""
    busy, idle = machine_seconds()
    time.sleep(1.0)
    busy_after, idle_after = machine_seconds()
    passed = busy_after - busy + idle_after - idle
    return round((busy_after - busy) / passed, 2) if passed else 0.0


def show(figures: dict[str, Any], console: Console) -> None:
    """The tables, for people."""
    machine = figures["machine"]
    console.print(
        f"{machine['processors']} processors, {machine['platform']}; {machine['busy_before']:.0%} busy before it began"
    )
    table = Table(title="synchronous round, seconds (median of a run)", title_justify="left")
    for heading in ("nodes × parameters", "up, down", "ours", "raw pika", "lean raw", "ours / raw", "ours / lean"):
        table.add_column(heading, justify="right")
    for row in figures["synchronous"]:
        ours, plain, lean = row["round_seconds"], row["plain"]["round_seconds"], row["lean"]["round_seconds"]
        table.add_row(
            f"{row['nodes']} × {row['parameters']:,}",
            f"{row['up']}, {row['down']}",
            *(f"{each:.2f}" for each in (ours, plain, lean)),
            *(f"{ours / each:.2f}" for each in (plain, lean)),
        )
    console.print(table)
    table = Table(title="asynchronous, default rule and encodings", title_justify="left")
    for heading in ("nodes × parameters", "updates a second", "master MiB", "node MiB", "master CPU s a version"):
        table.add_column(heading, justify="right")
    for row in figures["asynchronous"]:
        table.add_row(
            f"{row['nodes']} × {row['parameters']:,}",
            f"{row['updates_per_second']:.1f}",
            f"{row['peak_mib']['master']}",
            f"{row['peak_mib']['n0']}",
            f"{row['cpu_seconds_a_version']['master']:.4f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="versions of a synchronous run [default: 12]")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of an asynchronous run [default: 12]")
    parser.add_argument(
        "--out", type=Path, default=Path("bench.json"), help="where the JSON goes [default: bench.json]"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = measured(SYNCHRONOUS, ASYNCHRONOUS, Path(directory), versions=given.rounds, seconds=given.seconds)
    given.out.write_text(json.dumps(figures, indent=1) + "\n")
    show(figures, Console(width=120))


if __name__ == "__main__":
    main()
