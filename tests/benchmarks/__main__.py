"""What communication costs, beside what the same bytes cost pika alone, in one run on this machine.

    make bench                                         # all of it, under ten minutes; JSON into bench.json
    make bench ARGS="--runs 5"                         # medians of five
    make bench ARGS="--only synchronous,hand-out"      # some parts
    make bench ARGS="--only shards"                    # aggregators beside the master; by itself, some minutes
    make bench ARGS="--from bench.json --before old.json --document docs/performance.md"      # write the tables
    python -m tests.benchmarks.throughput | replay | one_member | node_arithmetic      # parts by themselves

Training is a constant, so every second here is one in which nobody trains. Master, nodes and broker share this
machine's processors; what else was at work is printed with the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console

from common.errors import EXIT_USER_ERROR, UserError
from tests.benchmarks.measured import ALONE, PARTS, measured
from tests.benchmarks.tables import document, show


def main() -> int:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__, formatter_class=described)
    parser.add_argument("--runs", type=int, default=1, help="of each cell, of which the median counts [default: 1]")
    parser.add_argument("--only", help=f"of {','.join(PARTS)} [default: all but {','.join(ALONE)}]")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="the JSON [default: bench.json]")
    parser.add_argument("--from", type=Path, dest="given", metavar="JSON", help="measure nothing, show these")
    parser.add_argument("--before", type=Path, metavar="JSON", help="figures of an earlier run, shown beside")
    parser.add_argument("--document", type=Path, help="write the tables into this file, where its marks are")
    given = parser.parse_args()
    try:
        before = _read(given.before) if given.before is not None else None
        figures = _read(given.given) if given.given is not None else _measured(given)
        show(figures, Console(width=180), before)
        if given.document is not None:
            print(f"written into {given.document}: {', '.join(document(given.document, figures, before))}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _measured(given: argparse.Namespace) -> dict[str, Any]:
    names = given.only.split(",") if given.only else [name for name in PARTS if name not in ALONE]
    if unknown := set(names) - PARTS.keys():
        raise UserError(f"--only {','.join(sorted(unknown))}: there is {', '.join(PARTS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with tempfile.TemporaryDirectory() as directory:
        parts = {name: PARTS[name] for name in names}
        figures = measured(parts, Path(directory), runs=given.runs, say=_say)
    given.out.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no figures of a benchmark ({error}); `make bench` writes some") from None
    if not isinstance(figures, dict) or not {"run", "parts"} <= figures.keys():
        raise UserError(f"{file} is no figures of a benchmark; `make bench` writes some")
    return figures


if __name__ == "__main__":
    sys.exit(main())
