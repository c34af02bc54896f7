"""How long a simulated federation takes: `shared-encoder simulate`, one process, one thread of arithmetic."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.party import started

_PATIENCE_SECONDS = 1800.0


def simulated(directory: Path, *, nodes: int, returns: int) -> dict[str, Any]:
    """Seconds of the whole command, its libraries loaded before, for so many nodes and counted updates of each."""
    directory.mkdir(parents=True)
    begun = time.monotonic()
    arguments = ["simulate", "--out", str(directory / "out"), "--nodes", str(nodes), "--returns", str(returns)]
    process = started("simulate", directory, arguments)
    process.join(_PATIENCE_SECONDS)
    seconds = time.monotonic() - begun
    if process.exitcode != 0:
        process.kill()
        words = (directory / "simulate.log").read_text(errors="replace")[-1500:]
        raise RuntimeError(f"the simulation {'failed' if process.exitcode else 'did not end'}: {words}")
    report = json.loads((directory / "out" / "report.json").read_text())
    return {
        "nodes": nodes,
        "returns": returns,
        "updates": report["updates"],
        "seconds": seconds,
        "milliseconds_an_update": 1000.0 * seconds / report["updates"],
    }
