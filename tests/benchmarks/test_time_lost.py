"""The benchmark of the time that nodes lose runs and adds up; no time is asserted."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from deploy.config import load_config
from deploy.local_rabbitmq import LocalRabbitMQ
from master_service.status import MemberReport
from tests.benchmarks.time_lost import ARCHITECTURES, Setting, between, configuration, measured, show


@pytest.mark.parametrize("parameters", ARCHITECTURES)
def test_what_it_runs_is_a_configuration(parameters: str, tmp_path: Path) -> None:
    setting = Setting(parameters, nodes=2, compile=True, micro_batch=4, precision="bfloat16")
    config = load_config(configuration(setting, "amqp://127.0.0.1/", tmp_path, ["n0", "n1"]), {})
    node = config.nodes["n1"]
    assert (node.compile, node.micro_batch, node.precision, node.seed) == (True, 4, "bfloat16", 1)
    assert config.settings().update_rule.when.seconds == 30.0 and config.settings().min_nodes == 2
    assert config.settings().architecture["sequence_length"] == 32


def test_what_lies_between_two_looks_is_counted() -> None:
    first = MemberReport(steps=10, returns=1, step_seconds=5.0, lost_seconds={"hand-in": 1.0, "other": 2.0})
    last = MemberReport(steps=110, returns=4, step_seconds=25.0, lost_seconds={"hand-in": 3.0, "other": 5.0})
    node = between(first, last)
    assert (node["updates"], node["steps"], node["steps_per_second"]) == (3, 100, 5.0)
    assert (node["could_train"], node["lost"], node["lost_share"]) == (25.0, {"hand-in": 2.0, "other": 3.0}, 0.2)
    said = Console(file=io.StringIO(), width=160)
    show({"parameters": 7, "seconds": 30.0, "versions": 3, "machine_busy": 0.5, "nodes": {"n0": node}}, said)
    assert "20.0%" in said.file.getvalue() and "8.0%" in said.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_parts_of_a_nodes_time_add_up(tmp_path: Path) -> None:
    with LocalRabbitMQ(tmp_path / "rabbitmq") as server:
        figures = measured(Setting("tiny", steps=5), server.url, tmp_path / "run", minutes=0.03)
    assert figures["parameters"] == 217_472
    [node] = figures["nodes"].values()
    assert node["updates"] > 0 and node["steps"] > 0 and node["steps_per_second"] > 0
    assert set(node["lost"]) == {"hand-in", "adoption", "checkpoint", "other"} and node["lost"]["hand-in"] > 0
    assert 0 < sum(node["lost"].values()) < node["could_train"]
