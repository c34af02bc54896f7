"""`node --check`: what it shows is what a node does, and nothing of it reaches a broker."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.brokers.memory import MemoryServer
from deploy import rehearsal
from deploy.cli import app, guarded
from deploy.rehearsal import Kind, Rehearsed, counted, node_kinds
from tests.integration.harness import connection

SMALL = """
[encoder.architecture]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 1
intermediate_size = 32
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(SMALL)
    texts = [json.dumps({"text": f"Note {index}: the patient slept well and asked for water."}) for index in range(80)]
    (tmp_path / "notes.jsonl").write_text("\n".join(texts))
    return tmp_path


def check(folder: Path, *flags: str) -> tuple[int, str]:
    arguments = ["node", "clinic-a", "--check", "--config", str(folder / "run.toml"), "--corpus"]
    here = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(app, [*arguments, str(folder / "notes.jsonl"), *flags])
    finally:
        os.chdir(here)
    return done.exit_code, done.output


def test_it_trains_and_shows_what_would_leave_and_leaves_nothing_behind(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = MemoryServer()
    monkeypatch.setattr(rehearsal, "connect", lambda *arguments: connection(server, "clinic-a"))
    before = sorted(path.name for path in notes.iterdir())
    code, said = check(notes)
    assert code == 0, said
    assert "lets guest in" in said and "samples to train on" in said
    assert re.search(r"ms a step, of a text encoder whose [\d,]+ parameters travel", said)
    assert re.search(r"sends +[\d.]+ [KM]iB every \d+ steps: [\d.]+ [KMG]iB an hour", said)
    rows = set(re.findall(r"[│|] *((?:request\.)?[a-z]+) +[│|] +\d", said))
    assert {"request.join", "ack", "update", "request.finished"} <= rows <= set(node_kinds())
    unsent = said.split("not in this rehearsal: ")[1].splitlines()[0].split(", ")
    assert rows | set(unsent) == set(node_kinds()) and not rows & set(unsent)
    assert sorted(path.name for path in notes.iterdir()) == before, "no state of it stays"


def test_a_broker_that_is_away_is_said_and_the_rest_is_shown(notes: Path) -> None:
    code, said = check(notes, "--broker", "amqp://127.0.0.1:9/")
    assert code == 3 and "no broker answers at 127.0.0.1:9" in said and "what leaves this house" in said


def test_a_corpus_that_is_none_ends_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["node", "a", "--check", "--corpus", str(tmp_path / "none.txt")]
    assert guarded(lambda: app(command, standalone_mode=False)) == 2
    assert "none.txt" in capsys.readouterr().err


def test_what_is_counted() -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "update", "bytes": 10, "fields": {"a": 1}},
        {"kind": "ack", "bytes": 1, "fields": {}},
        {"kind": "update", "bytes": 20, "fields": {"a": 1, "b": 2}},
    ]
    kinds = counted(lines)
    assert kinds == [Kind("update", 2, 30, ("a", "b")), Kind("ack", 1, 1, ())]
    assert Rehearsed(100, 0.5, 20, 1000.0, tuple(kinds)).bytes_an_hour == 3600 / 10 * 1000
