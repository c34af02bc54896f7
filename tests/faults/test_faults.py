"""The short version of `make faults`: processes over RabbitMQ, killed with -9 at labelled steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.__main__ import line
from tests.faults.arena import MASTER_STEPS, NODE_STEPS, SHARD_STEPS, Arena
from tests.integration.harness import eventually


@pytest.mark.timeout(300)
@pytest.mark.parametrize("preset", ["return-count", "fedavg"])
def test_nothing_is_lost_and_nothing_counted_twice_whoever_dies(tmp_path: Path, preset: str) -> None:
    with Arena(tmp_path, seed=20261124, preset=preset) as arena:
        arena.run(16)
        found = arena.finish(updates=15)
    assert found.problems == [], line(arena, found)
    assert (found.lost, found.doubled, found.equal) == (0, 0, True)
    assert arena.kills + arena.restarts >= 16 and found.accepted > 10 and found.versions > 3


@pytest.mark.timeout(300)
def test_nothing_is_lost_and_nothing_counted_twice_where_aggregators_have_the_numbers(tmp_path: Path) -> None:
    """One that dies has, of every version and update, a part that the others do not have."""
    with Arena(tmp_path, seed=4, nodes=2, shards=2) as arena:
        arena.run(5)
        found = arena.finish(updates=4)
    assert found.problems == [], line(arena, found)
    assert (found.lost, found.doubled, found.equal) == (0, 0, True)
    assert arena.kills + arena.restarts >= 5 and found.accepted > 1 and found.versions > 1
    assert any(step.startswith("shard ") for step in arena.by_step), arena.by_step


@pytest.mark.timeout(300)
def test_a_broker_that_restarts_or_loses_its_disk_costs_time_and_no_update(tmp_path: Path) -> None:
    """Under a rule whose nodes wait: a notice, a receipt or a version that is gone would stop them for ever. A restart
    empties the nodes' chunk queues."""
    with Arena(tmp_path, seed=1, nodes=2, preset="fedavg") as arena:
        for role in ("master", *arena.nodes):
            arena.start(role)

        def versions() -> int:
            assert all(arena.running(role) for role in ("master", *arena.nodes))
            return arena.logged("versioned")

        eventually(lambda: versions() >= 3, 60.0, "a training")
        arena.restart_broker("stop")
        before = versions()
        eventually(lambda: versions() >= before + 3, 120.0, "a version after the restart")
        arena.restart_broker("kill", forget=True)
        before = versions()
        eventually(lambda: versions() >= before + 3, 120.0, "a version over the new disk")
        found = arena.finish()
    assert found.problems == [], line(arena, found)
    assert (found.lost, found.doubled, found.equal) == (0, 0, True) and found.accepted > 6


def test_every_labelled_step_of_the_code_is_one_that_the_harness_kills_at() -> None:
    root = Path(__file__).resolve().parents[2]
    labels = set()
    for folder in ("common", "master_service", "node_service"):
        for path in (root / folder).rglob("*.py"):
            labels |= {part.split('"')[0] for part in path.read_text().split('reached("')[1:]}
    assert labels == {*MASTER_STEPS, *NODE_STEPS, *SHARD_STEPS, "before export"}
