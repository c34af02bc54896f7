"""A budget for what is kept to replay: held while the master serves, whether a snapshot is due or not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.to_node import Receipt
from deploy.commands.display import kept
from master_service.config import MasterConfig
from master_service.history.replay import origin, rebuild, verify
from master_service.history.retention import Budget
from master_service.history.snapshot import SnapshotDirectory
from master_service.history.state_directory import Journal
from master_service.log.deadly import MemoryMark
from master_service.log.message_log import open_log
from master_service.log.room import Room
from master_service.status import DiskReport, Report
from tests.integration.harness import HandNode, eventually, numbers, running_master

GB = 1_000_000_000
ROOM = Room(Path("nowhere"), lambda: 1 << 60, 0)


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


def test_status_says_how_much_comes_and_from_where_on_a_replay_reaches(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path, retention=1, snapshot_every_seconds=0.05) as master:
        node = HandNode(server, "a")
        instruction = node.enter()
        before = master.service.report().log
        assert (before.keeps_bytes, before.replays_from) == (1, {})
        sequences = itertools.count()

        def pruned() -> bool:
            sequence = next(sequences)
            bodies = numbers(instruction, 0.001 * (sequence + 1))
            node.send(node.manifest(instruction, sequence, bodies, base_version=sequence), bodies)
            assert node.hear(Receipt).accepted
            return master.service.report().log.replays_from.get(instruction.encoder, 0) > 0

        eventually(pruned)
    reader = open_log(tmp_path, read_only=True)
    said = Journal(
        reader, SnapshotDirectory(reader), MemoryMark(), ROOM, MasterConfig(state_dir=tmp_path), clock=VirtualClock()
    ).report("")[1]
    begin = origin(reader).fold.coordinator.state.encoders[instruction.encoder].version
    assert said.replays_from == {instruction.encoder: begin}, "also after a start"


def test_what_is_said_of_growth_is_what_came(tmp_path: Path) -> None:
    clock = VirtualClock()
    log = open_log(tmp_path)
    config = MasterConfig(state_dir=tmp_path, retention="1GB")
    journal = Journal(log, SnapshotDirectory(log), MemoryMark(), ROOM, config, clock=clock)
    for number in range(8):
        said = journal.report("")[1]
        journal.write_payload(b"%d" % number * 1_000_000)
        clock.wait(3600.0)
    assert said.bytes_per_day == pytest.approx(24e6, rel=0.01) and said.keeps_bytes == GB
    line = kept(Report(log=said, disk=DiskReport(free_bytes=100 * 1024**2, needed_bytes=4 * 1024**2)))
    assert line == ("log: 0 rows; 22.9 MiB a day come; updates are kept up to 953.7 MiB; the disk lasts 4 days"), (
        "a budget that does not fit is no bound"
    )
    log.close()
