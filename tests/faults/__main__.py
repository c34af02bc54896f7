"""`make faults N=100 SEED=7`: inject N faults and say in one line what came of it; exit code 1 if anything is wrong."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.faults.arena import Arena
from tests.faults.audit import Findings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("-n", type=int, default=100, help="faults to inject [default: 100]")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random choices [default: the time]")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1, help="aggregators, that die too, if more than 1 [default: 1]")
    parser.add_argument("--preset", default="return-count")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave logs and state directories there")
    chosen = parser.parse_args()
    directory = chosen.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    console = Console(stderr=True)
    console.print(f"seed {chosen.seed}, state in {directory}", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Arena(directory, chosen.seed, nodes=chosen.nodes, preset=chosen.preset, shards=chosen.shards) as arena,
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("faults", total=chosen.n)

        def tell(arena: Arena, what: str) -> None:
            bar.update(task, completed=arena.kills + arena.restarts, description=what)

        arena.run(chosen.n, tell)
        found = arena.finish()
    for step, times in sorted(arena.by_step.items()):
        console.print(f"  {times:4d} × {step}", highlight=False)
    for problem in found.problems[:20]:
        console.print(f"  wrong: {problem}", highlight=False, style="red")
    print(line(arena, found))
    well = not found.problems
    if well and chosen.keep is None:
        shutil.rmtree(directory)
    return 0 if well else 1


def line(arena: Arena, found: Findings) -> str:
    """The one line."""
    return f"kills={arena.kills} restarts={arena.restarts} {found}"


if __name__ == "__main__":
    sys.exit(main())
