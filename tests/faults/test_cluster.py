"""A broker of three servers: whichever of them dies or is cut off, the training goes on, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.__main__ import line
from tests.faults.arena import Arena
from tests.integration.harness import eventually


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whichever_server_dies_or_is_cut_off_the_training_goes_on_and_nothing_is_lost(tmp_path: Path) -> None:
    """Under a rule whose nodes wait: what is gone would stop them for ever."""
    with Arena(tmp_path, seed=20261127, nodes=2, preset="fedavg", cluster=True) as arena:
        roles = ("master", *arena.nodes)
        for role in roles:
            arena.start(role)

        def goes_on(when: str) -> None:
            before = versions()
            eventually(lambda: versions() >= before + 3, 180.0, f"three versions {when}")

        def versions() -> int:
            for role in roles:
                if not arena.running(role):
                    arena.start(role)  # it found no broker, as its supervisor would see
            return arena.logged("versioned")

        goes_on("at the start")
        topology = arena.topology
        for queue in (topology.master_updates, topology.chunk_queue("a"), topology.dead_letters):
            assert arena.cluster.members(queue) == 3, queue
        for number in range(3):
            for how in ("kill", "cut off"):
                arena.mistreat_server(how, number)  # type: ignore[arg-type]
                goes_on(f"without server {number} ({how})")
                arena.mistreat_server("restore", number)
                goes_on(f"with server {number} again ({how})")
        found = arena.finish(120.0)
    assert found.problems == [], line(arena, found)
    assert (found.lost, found.doubled, found.equal) == (0, 0, True)
    assert arena.restarts == 6 and found.accepted >= 2 * 3 * 13
