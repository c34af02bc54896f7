"""What the message log costs: updates per second that a master takes in, with the log and without, in one run.

    python -m tests.benchmarks.throughput

The embedded broker carries the bytes, so what is measured is the master alone: receiving, checking, logging, folding,
answering. Without the log nothing is written: the payloads stay in memory and a crash loses everything.
"""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import torch
from rich.console import Console
from rich.table import Table

from common.brokers.memory import MemoryServer
from common.numbers.encodings import encode_vector
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Instruction
from master_service.decisions.records import Entry, UpdateFacts
from master_service.decisions.rules.model import aggregation_rule
from master_service.history import state_directory
from master_service.log.message_log import MessageLog, open_log
from master_service.log.payloads import MemoryPayloads
from tests.builders import update_chunks
from tests.integration.harness import HandNode, decided, eventually, running_master

#: (hidden size, layers, updates): of about 3,000, 80,000 and 3.4 million shared parameters.
_SIZES = ((16, 1, 256), (64, 2, 256), (384, 2, 40))
_NODES = 4
_REPEATS = 3


class Unlogged(MessageLog):
    """Numbers entries and forgets them."""

    def __init__(self, directory: Path) -> None:
        db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        super().__init__(db, MemoryPayloads(), directory)
        self._ids: set[str] = set()

    def append(self, body: Any, *, message_id: str, at: float, **rest: Any) -> Entry | None:
        if message_id in self._ids:
            return None
        self._ids.add(message_id)
        facts: UpdateFacts | None = rest.get("facts")
        entry = Entry(self._offset + 1, message_id, max(at, self._at), body, facts, rest.get("payload"))
        self._offset, self._at = entry.offset, entry.at
        return entry

    def write_payload(self, payload: bytes) -> str:
        return self.payloads.write(payload)


def updates_per_second(
    directory: Path, opened: Callable[[Path], MessageLog], hidden: int, layers: int, updates: int
) -> float:
    """Hand in all updates while the master is away, then time how long it takes to answer them."""
    state_directory.open_log = opened  # type: ignore[assignment]
    server = MemoryServer()
    architecture = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
    }
    rule = aggregation_rule("return-count", {"guards": {"max_staleness": 10**6}})
    with running_master(server, directory, decided(rule=rule, architecture=architecture), min_free=0) as master:
        nodes = [HandNode(server, name) for name in "abcd"[:_NODES]]
        instructions = [node.enter() for node in nodes]
        state = master.service.master.state.encoders[instructions[0].encoder]
        bodies = encode_vector(torch.randn(state.size) * 0.01, "int8")
        with server.changed:  # the master gets nothing before all of it is there
            for sequence in range(updates // _NODES):
                for node, instruction in zip(nodes, instructions, strict=True):
                    _send(node, instruction, sequence, bodies)
        begun = time.monotonic()
        eventually(lambda: state.updates == updates, 600.0)
        return updates / (time.monotonic() - begun)


def _send(node: HandNode, instruction: Instruction, sequence: int, bodies: list[bytes]) -> None:
    manifest: UpdateManifest = node.manifest(instruction, sequence, bodies, encoding="int8")
    node.send(manifest, bodies)
    assert len(update_chunks(manifest, bodies)) == manifest.chunks


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    table = Table(title=f"updates per second, {_NODES} nodes, int8, median of {_REPEATS}", title_justify="left")
    for heading in ("shared parameters", "update", "log off", "log on", "on / off"):
        table.add_column(heading, justify="right")
    for hidden, layers, updates in _SIZES:
        rates: dict[str, list[float]] = {"off": [], "on": []}
        for _ in range(_REPEATS):
            for name, opened in (("off", Unlogged), ("on", open_log)):
                with tempfile.TemporaryDirectory() as directory:
                    rates[name].append(updates_per_second(Path(directory), opened, hidden, layers, updates))
        off, on = statistics.median(rates["off"]), statistics.median(rates["on"])
        size = _parameters(hidden, layers)
        kib = size * 260 / 256 / 1024
        table.add_row(f"{size:,}", f"{kib:,.0f} KiB", f"{off:.0f}/s", f"{on:.0f}/s", f"{on / off:.2f}")
    Console().print(table)


def _parameters(hidden: int, layers: int) -> int:
    from common.encoders import get_encoder_type

    text = get_encoder_type("text")
    settings = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 2}
    architecture = text.architecture({**settings, "num_hidden_layers": layers})
    return sum(tensor.numel() for tensor in text.initial(architecture, 0).values())


if __name__ == "__main__":
    main()
