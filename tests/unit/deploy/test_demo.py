"""The demo under its virtual clock: who comes late, goes and comes back, and the same bits for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.config import load_config
from deploy.demo.demo import configuration
from deploy.simulation.configured import Absence, ConfiguredFederation
from master_service.log.message_log import open_log
from node_service.corpus.corpus import Corpus

pytestmark = pytest.mark.usefixtures("one_torch_thread")

WORDS = [
    "the",
    "node",
    "trains",
    "and",
    "sends",
    "an",
    "update",
    "to",
    "the",
    "master",
    "which",
    "counts",
    "it",
    "once",
]
SPEEDS = {"a": 20.0, "b": 10.0, "late": 15.0, "away": 20.0}


def corpus(seed: int) -> Corpus:
    texts = [" ".join(WORDS[(i * j + seed) % len(WORDS)] for j in range(1, 20 + i % 9)) for i in range(80)]
    return Corpus("text", texts[:60], None, texts[60:70], None, texts[70:])


def demo(directory: Path, seed: int) -> tuple[ConfiguredFederation, str]:
    directory.mkdir()
    places = {name: (directory / f"{name}.jsonl", directory / f"{name}.jsonl") for name in SPEEDS}
    file = directory / "demo.toml"
    words = configuration(directory, places, quick=True, broker_url=None, seed=seed)
    words = words.replace("seconds = 6.0", "seconds = 2.0")
    file.write_text(words.replace("[encoder]", '[encoder]\ntokenizer = "bytes"\narchitecture = { hidden_size = 16 }'))
    made = ConfiguredFederation(
        load_config(file, {}), {name: corpus(i) for i, name in enumerate(SPEEDS)}, SPEEDS, seconds=2.0
    )
    absences = {"late": Absence("late", 0.0, 0.4), "away": Absence("away", 0.4, 0.7)}
    report = made.train(absences, lambda report: None)
    return made, next(iter(report.encoders.values())).digest


def test_the_order_of_events_is_the_clocks_and_the_seed_makes_the_encoder(tmp_path: Path) -> None:
    first, digest = demo(tmp_path / "first", 1)
    assert demo(tmp_path / "again", 1)[1] == digest
    assert demo(tmp_path / "other", 2)[1] != digest
    steps = {name: session.steps for name, session in first.sessions.items()}
    assert steps["a"] > steps["away"] > steps["b"] and steps["a"] > steps["late"]
    for session in first.sessions.values():
        assert session.finished is not None and session.steps_in_all > session.steps, "each finished by itself"
        assert (session.directory / "model" / "tokenizer.json").exists()
    with_log = open_log(tmp_path / "first" / "master", read_only=True)
    kinds = [entry.body.kind for entry in with_log.entries()]
    with_log.close()
    assert kinds.count("request.leave") == 1 and kinds.count("request.join") >= 5, "one is late, one comes back"
    assert (tmp_path / "first" / "encoder" / "model.safetensors").exists()
