"""The benchmark of the time that nodes lose runs and adds up; no time is asserted."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from deploy.local_rabbitmq import LocalRabbitMQ
from tests.benchmarks.time_lost import Setting, measured, show


@pytest.mark.timeout(300)
def test_the_parts_of_a_nodes_time_add_up(tmp_path: Path) -> None:
    with LocalRabbitMQ(tmp_path / "rabbitmq") as server:
        figures = measured(Setting("tiny", steps=5), server.url, tmp_path / "run", minutes=0.03)
    assert figures["parameters"] == 217_472
    [node] = figures["nodes"].values()
    assert node["updates"] > 0 and node["steps"] > 0 and node["steps_per_second"] > 0
    assert set(node["lost"]) == {"hand-in", "adoption", "checkpoint", "other"} and node["lost"]["hand-in"] > 0
    assert 0 < sum(node["lost"].values()) < node["could_train"]
    assert node["could_train"] + node["waiting"] == pytest.approx(figures["seconds"], abs=4.0), ()
    said = Console(file=io.StringIO(), width=160)
    show(figures, said)
    assert "217,472 parameters" in said.file.getvalue()  # type: ignore[attr-defined]
