"""Makes the recorded logs anew: `python -m tests.logs.record`. Real masters and nodes over the embedded broker.

Each run leaves NAME.jsonl.gz (its message log) and NAME.receipts.jsonl (what its nodes were told) in this folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.brokers.memory import MemoryServer
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import StopRule
from master_service.log.jsonl import export_log
from master_service.log.message_log import open_log
from node_service.corpus.corpus import CorpusConfig
from tests.integration.harness import SMALL, Master, decided, eventually
from tests.integration.test_federation import Node, lines

HERE = Path(__file__).parent
#: Slow enough that a restart of the master or of a node is in the middle of the training.
SPEED = 60.0


def settings(preset: str, **changes: Any) -> Any:
    return decided(
        rule=aggregation_rule(preset), update_rule=UpdateRule(when=ReturnWhen(steps=3)), min_nodes=2, **changes
    )


def text_node(server: MemoryServer, directory: Path, name: str) -> Node:
    return Node(server, directory, name, lines(ord(name)), max_steps_per_second=SPEED)


def return_count(directory: Path) -> None:
    """Three nodes; one leaves and returns, and the master is stopped and started meanwhile."""
    server = MemoryServer()
    decisions = settings("return-count", stop=StopRule(updates=40))
    master = Master(server, directory / "master", decisions)
    nodes = {name: text_node(server, directory, name) for name in "abc"}
    reached(master, 10)
    nodes["c"].end()
    master.stop()
    master = Master(server, directory / "master", decisions)
    reached(master, 20)
    nodes["c"] = text_node(server, directory, "c")
    finished(master, list(nodes.values()))


def diloco(directory: Path) -> None:
    """Two nodes that wait for each other, and an outer optimiser with momentum."""
    server = MemoryServer()
    master = Master(server, directory / "master", settings("diloco", stop=StopRule(versions=12)))
    finished(master, [text_node(server, directory, name) for name in "ab"])


def fedbuff(directory: Path) -> None:
    """Images of two shapes; every third update makes a version."""
    server = MemoryServer()
    decisions = settings("fedbuff", stop=StopRule(updates=24), architecture={**SMALL, "intermediate_size": 32})
    master = Master(server, directory / "master", decisions, get="image")
    nodes = []
    for name, shape in {"grey": (60, 8, 8), "colour": (60, 12, 12, 3)}.items():
        file = directory / f"{name}.npz"
        np.savez(file, x_train=np.random.default_rng(0).integers(0, 255, shape, np.uint8))
        corpus = CorpusConfig(type="image", path=(str(file),))
        nodes.append(Node(server, directory, name, [], corpus=[corpus], private={}, max_steps_per_second=SPEED))
    finished(master, nodes)


def reached(master: Master, updates: int) -> None:
    encoders = master.service.master.state.encoders
    eventually(lambda: any(encoder.updates >= updates for encoder in encoders.values()), 60)


def finished(master: Master, nodes: list[Node]) -> None:
    encoders = master.service.master.state.encoders
    eventually(lambda: any(encoder.status == "finished" for encoder in encoders.values()), 120)
    for node in nodes:
        eventually(lambda node=node: node.party.wait(0.0), 30)  # type: ignore[misc]
        node.broker.close()
    master.stop()


RUNS: dict[str, Callable[[Path], None]] = {
    "text-return-count": return_count,
    "text-diloco": diloco,
    "image-fedbuff": fedbuff,
}


def main() -> None:
    torch.set_num_threads(1)
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            run(directory)
            log = open_log(directory / "master", read_only=True)
            done = export_log(log, HERE / f"{name}.jsonl.gz")
            receipts = b"".join(path.read_bytes() for path in sorted(directory.glob("*/receipts.jsonl")))
            (HERE / f"{name}.receipts.jsonl").write_bytes(receipts)
            print(f"{name}: {done.rows} rows, {done.payloads} payloads, {receipts.count(b'receipt')} receipts")


if __name__ == "__main__":
    main()
