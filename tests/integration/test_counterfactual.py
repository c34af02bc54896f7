"""From a real training to another rule's encoder, and both in one table: what a data scientist does with a log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog

from common.brokers.memory import MemoryServer
from common.wire.to_node import Receipt
from deploy.cli import app, guarded
from master_service.decisions.settings import StopRule
from tests.integration.harness import decided, eventually, running_master
from tests.integration.test_federation import Node, lines


def test_another_rules_encoder_is_evaluated_beside_the_published_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, state = MemoryServer(), tmp_path / "master"
    settings = decided(stop=StopRule(updates=8), min_nodes=2)
    with running_master(server, state, settings, export_dir=tmp_path / "published") as master:
        nodes = [Node(server, tmp_path, name, lines(ord(name))) for name in "ab"]
        encoders = master.service.master.state.encoders
        eventually(lambda: any(encoder.status == "finished" for encoder in encoders.values()), 60)

        def command(*arguments: object) -> str:
            capsys.readouterr()
            code = guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False))
            out, err = capsys.readouterr()
            assert code == 0, err
            return out

        # the master is still running: looking into its log takes no lock
        assert "identical" in command("replay", "--state", state)
        assert "from version" in command("log", "list", "--state", state, "--kind", "update")
        for node in nodes:
            eventually(lambda node=node: node.party.wait(0.0), 30)
            node.broker.close()
    out = command("replay", "--state", state, "--without", "b", "--out", tmp_path / "without-b")
    assert "→ 0" in out

    receipts = [tmp_path / name / "receipts.jsonl" for name in "ab"]
    held = [Receipt.model_validate_json(line) for path in receipts for line in path.read_text().splitlines()]
    out = command("log", "verify", "--state", state, "--receipts", receipts[0], "--receipts", receipts[1])
    assert sum(receipt.accepted for receipt in held) == 8 and out.count("are what the log leads to") == 2

    table = "".join(
        f'[nodes.{name}]\nstate_dir = "{tmp_path / name}"\nprivate = {{ vocabulary = 300 }}\n'
        f'corpus = {{ path = "{tmp_path / name}.txt", documents = "line" }}\n'
        for name in "ab"
    )
    (tmp_path / "run.toml").write_text(table)
    file, figures = tmp_path / "run.toml", tmp_path / "figures.json"
    both = ["--encoder", tmp_path / "published", "--encoder", tmp_path / "without-b"]
    out = command("evaluate", "--config", file, *both, "--out", figures)
    structlog.reset_defaults()
    domains = json.loads(figures.read_text())["domains"]
    for name in "ab":
        scores = domains[name]
        assert list(scores) == ["random", "alone", "shared", "without-b", "finished"] and "without-b" in out
        assert scores["shared"]["loss"] != scores["without-b"]["loss"] < 10
