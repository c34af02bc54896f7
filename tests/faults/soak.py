"""`make soak MINUTES=30`: nodes join, leave and are killed at random, the broker is restarted every three minutes.

Prints a table, a line a minute, and the line of `make faults`; exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from master_service.log.message_log import open_log
from tests.faults.__main__ import line
from tests.faults.arena import Arena

_BROKER_EVERY_SECONDS = 180.0
#: Mean seconds between two events that befall somebody.
_EVENT_SECONDS = 4.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave logs and state directories there")
    chosen = parser.parse_args()
    directory = chosen.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {chosen.seed}, {chosen.nodes} nodes, {chosen.minutes:g} minutes, state in {directory}", flush=True)
    print("| minute | nodes there | log rows | versions | master memory (MiB) | what befell them since |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    with Arena(directory, chosen.seed, nodes=chosen.nodes, steps_per_second=6.0) as arena:
        soak(arena, chosen.minutes * 60.0)
        found = arena.finish(300.0)
    for problem in found.problems[:20]:
        print(f"wrong: {problem}")
    print(line(arena, found))
    return 0 if not found.problems else 1


def soak(arena: Arena, seconds: float) -> None:
    """Let things happen for so long."""
    befell: Counter[str] = Counter()
    begun = time.monotonic()
    broker_at, report_at, event_at = begun + _BROKER_EVERY_SECONDS, begun + 60.0, begun + _EVENT_SECONDS
    arena.start("master")
    while (now := time.monotonic()) < begun + seconds:
        time.sleep(0.1)
        if not arena.running("master"):
            arena.start("master")
        there = [node for node in arena.nodes if arena.running(node)]
        if now >= event_at:
            event_at = now + arena.random.expovariate(1.0 / _EVENT_SECONDS)
            befell[_event(arena, there)] += 1
        if now >= broker_at:
            broker_at = now + _BROKER_EVERY_SECONDS
            befell[arena.mistreat_broker()] += 1
        if now >= report_at:
            report_at += 60.0
            _report(arena, round((now - begun) / 60.0), len(there), befell)
            befell.clear()


def _event(arena: Arena, there: list[str]) -> str:
    """Something befalls somebody."""
    away = [node for node in arena.nodes if node not in there]
    choices = ["join"] * 2 * len(away) + ["leave", "kill", "kill"] * bool(there) + ["kill master"]
    what = arena.random.choice(choices)
    if what == "join":
        arena.start(arena.random.choice(away))
    elif what == "leave":
        arena.leave(arena.random.choice(there))
    elif what == "kill":
        arena.kill(arena.random.choice(there))
    else:
        arena.kill("master")
        arena.start("master")
    return what


def _report(arena: Arena, minute: int, there: int, befell: Counter[str]) -> None:
    log = open_log(arena.directory / "master", read_only=True)
    rows, versions = log.last_offset + 1, log.count("versioned")
    log.close()
    events = ", ".join(f"{times} × {what}" for what, times in sorted(befell.items()))
    print(
        f"| {minute} | {there} | {rows:,} | {versions:,} | {_memory(arena.pid('master')):.0f} | {events} |", flush=True
    )


def _memory(pid: int) -> float:
    """Resident memory, MiB; 0 for a process that has just gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(row.split()[1]) / 1024 for row in status.splitlines() if row.startswith("VmRSS")), 0.0)


if __name__ == "__main__":
    sys.exit(main())
