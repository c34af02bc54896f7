"""A budget for what is kept to replay: held while the master serves, whether a snapshot is due or not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.brokers.memory import MemoryServer
from common.wire.to_node import Receipt
from master_service.config import MasterConfig
from master_service.history.replay import origin, rebuild, verify
from master_service.history.retention import Budget
from master_service.log.message_log import open_log
from tests.integration.harness import HandNode, eventually, numbers, running_master

GB = 1_000_000_000


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


def test_a_budget_is_held_without_a_snapshot_that_is_due(server: MemoryServer, tmp_path: Path) -> None:
    """No snapshot is due by the clock within an hour: those that are written let go of what is over the budget."""
    with running_master(server, tmp_path, retention=1, snapshot_every_seconds=3600.0) as master:
        node = HandNode(server, "a")
        instruction = node.enter()
        log = master.service.master.journal.log
        sequences = itertools.count()

        def share_kept() -> float:
            """Another update; and the share of all that came whose payload is still there."""
            sequence = next(sequences)
            bodies = numbers(instruction, 0.001 * (sequence + 1))
            manifest = node.manifest(instruction, sequence, bodies, base_version=sequence)
            node.send(manifest, bodies)
            assert node.hear(Receipt).accepted
            return len(log.update_payloads(log.last_offset)) / (sequence + 1)

        # of a byte's worth, what the two newest snapshots need stays, whatever came before them
        assert share_kept() == 1.0
        eventually(lambda: share_kept() < 0.5)
        digest = master.service.master.state.encoders[instruction.encoder].digest
    reader = open_log(tmp_path, read_only=True)
    begin = origin(reader)
    assert begin.fold.offset > 0 and "payloads were dropped (retention 1)" in begin.left_out
    assert all(check is None or check.identical for _, check in verify(reader, begin.fold))
    assert rebuild(reader, instruction.encoder)[1].digest() == digest


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, 100 * GB),
        ({"retention": "2.5%"}, 25 * GB),
        ({"retention": "100%"}, 1000 * GB),
        ({"retention": "20GB"}, 20 * GB),
        ({"retention": 5}, 5),
        ({"retention": "all"}, "all"),
        ({"retention": "since-snapshot"}, "since-snapshot"),
        ({"shards": 2}, "all"),
        ({"shards": 2, "retention": "since-snapshot"}, "since-snapshot"),
    ],
)
def test_what_is_kept_of_a_disk_of_a_terabyte(given: dict[str, Any], kept: int | str) -> None:
    assert MasterConfig(**given).keeps(1000 * GB) == kept
    assert MasterConfig(**given).keeps(None) in (kept, "all"), "of an unknown disk no share is taken"


@pytest.mark.parametrize("given", [{"retention": "101%"}, {"retention": "some"}, {"retention": "5%", "shards": 2}])
def test_what_is_no_retention_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MasterConfig(**given)


def test_a_budget_is_looked_at_whenever_a_twentieth_of_it_has_come() -> None:
    budget = Budget(1000)
    looks = 0
    for _ in range(100):
        budget.comes(10)
        if budget.due:
            looks += 1
            budget = Budget(1000)
    assert looks == 16, "every sixth of ten bytes"
    everything = Budget("all")
    everything.comes(1 << 60)
    assert not everything.due and not everything.over
