"""How fast a message log is replayed: `python -m tests.benchmarks.replay [messages]`. Prints; asserts nothing."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from master_service.decisions.records import Configured
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.history.audit import issued
from master_service.history.replay import Refold, origin, verify
from master_service.log.message_log import MessageLog, open_log
from tests.unit.master.test_fold import Federation

SIZES = (3_000, 82_000)
PRESETS = ("fedasync", "return-count", "diloco")


def recorded(directory: Path, preset: str, size: int, messages: int) -> None:
    """A log of that many rows. Nothing is synced: the disk's speed is not what is measured."""
    synced, os.fsync = os.fsync, lambda handle: None
    try:
        run = Federation(directory, preset, size)
        run.log._db.execute("PRAGMA synchronous=OFF")  # private: no log that counts may be written so
        rule = aggregation_rule(preset)
        run.record(Configured(settings=Settings(rule=rule, stop=StopRule(versions=messages))))
        sequence = 0
        while run.log.last_offset < messages - 1:
            run.update("abc"[sequence % 3], sequence // 3)
            sequence += 1
        run.log.close()
    finally:
        os.fsync = synced


def rate(action: Callable[[MessageLog], Iterable[object]], directory: Path) -> float:
    """Rows a second, opening the log included."""
    started = time.perf_counter()
    log = open_log(directory, read_only=True)
    count = sum(1 for _ in action(log))
    log.close()
    return count / (time.perf_counter() - started)


def replayed(log: MessageLog) -> Iterable[object]:
    for entry, check in verify(log, origin(log).fold):
        assert check is None or check.identical
        yield entry


def main() -> None:
    messages = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    torch.set_num_threads(1)
    print(f"{messages:,} messages, messages a second (and as a multiple of reading the rows alone):")
    for preset in PRESETS:
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                directory = Path(folder)
                recorded(directory, preset, size, messages)
                read = rate(lambda log: log.entries(), directory)
                figures = {
                    "replay": rate(replayed, directory),
                    "another rule": rate(lambda log: Refold(log, without=frozenset("c")).run(), directory),
                    "receipts": rate(lambda log: issued(log), directory),
                }
            words = ", ".join(f"{name} {value:,.0f} (×{value / read:.2f})" for name, value in figures.items())
            print(f"{preset:>12} {size:>6,} parameters: rows {read:,.0f}, {words}", flush=True)


if __name__ == "__main__":
    main()
