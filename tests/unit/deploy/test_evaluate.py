"""F16: `evaluate` over corpora with and without labels, and what stays of it when it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import node_service.evaluation.evaluate as evaluation
from common.cards import TITLE, front_matter, is_card
from common.encoders import get_encoder_type
from common.numbers.parameters import ParameterSet
from node_service.training.checkpoint import Checkpoint, Facts, write_checkpoint
from node_service.training.finishing import keep_finished
from node_service.training.private_parts import load_spec, save_spec
from tests.unit.deploy.conftest import Command

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


class Killed(BaseException):
    """No error: what ends a process from outside."""


def prepared(vocabulary: str, **overrides: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """An architecture and its assets."""
    text = get_encoder_type("text")
    return text.assets(text.architecture({**SMALL, "vocabulary": vocabulary, **overrides}), {"tokenizer": "bytes"})


def trained_node(
    directory: Path,
    name: str,
    *,
    labels: int,
    type_: str = "text",
    held_out: float = 0.2,
    vocabulary: str = "private",
) -> str:
    """Corpus and private parts as a node leaves them, and its table of the configuration. `labels`: how many kinds."""
    texts = [f"{name} says {i} and {i * i}" for i in range(60)]
    rows = [{"text": text} | ({"label": str(i % labels)} if labels else {}) for i, text in enumerate(texts)]
    corpus, private = directory / f"{name}.jsonl", directory / name / "encoders" / "text-1"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    text = get_encoder_type("text")
    architecture, assets = prepared(vocabulary)
    spec = text.fit_private(texts, architecture, {"vocabulary": 300}, assets)
    save_spec(private, spec)
    parts = text.build(architecture, spec, 0).private_parameters()
    facts = Facts(encoder="text-1", version=1, steps=2, type=type_, architecture=architecture)
    write_checkpoint(private, Checkpoint(facts, {key: part.data for key, part in parts.items()}, {}))
    return (
        f'[nodes.{name}]\nstate_dir = "{directory / name}"\n'
        f'corpus = {{ path = "{corpus}", documents = "line", held_out = {held_out} }}\n'
    )


def encoder(directory: Path, vocabulary: str = "private", **overrides: int) -> Path:
    text = get_encoder_type("text")
    architecture, assets = prepared(vocabulary, **overrides)
    directory.mkdir()
    tensors = ParameterSet.from_tensors(text.initial(architecture, 3)).tensors()
    text.export_shared(directory, architecture, tensors, "# card", assets)
    return directory


@pytest.fixture
def arguments(tmp_path: Path) -> list[object]:
    """`evaluate` of a node with labels and two without any that a probe can use."""
    file = tmp_path / "run.toml"
    kinds = {"labelled": 2, "plain": 0, "alike": 1}
    file.write_text("".join(trained_node(tmp_path, name, labels=count) for name, count in kinds.items()))
    return ["evaluate", "--config", file, "--encoder", encoder(tmp_path / "encoder")]


def test_f16_corpora_with_and_without_labels_stand_in_one_table(
    command: Command, arguments: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "new folder" / "figures.json"
    code, printed, err = command(*arguments, "--pooled", "--out", out)
    assert code == 0, err
    told = json.loads(out.read_text())
    assert list(told["domains"]) == ["labelled", "plain", "alike"] and told["missing"] == []
    for name, kinds in told["domains"].items():
        assert list(kinds) == ["random", "alone", "shared", "pooled"]
        for scores in kinds.values():
            assert scores["loss"] > 0 and (scores["probe"] is None) == (name != "labelled")
    probes = printed[printed.index("linear probe") :].splitlines()
    for name in ("plain", "alike"):
        row = next(line for line in probes if name in line)
        assert row.count("–") == 5, "a dash for each kind and for the majority"
    assert err.count("no probe") == 1 and "two different labels" in err and "alike" in err, "once, not for every kind"


def test_f16_an_interruption_keeps_the_rows_that_are_done(
    command: Command, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = evaluation.train_alone

    def train_alone(domain: evaluation.Domain, *rest: object, **more: object) -> object:
        if domain.name == "plain":
            raise Killed
        return original(domain, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "train_alone", train_alone)
    out = tmp_path / "figures.json"
    with pytest.raises(Killed):
        command(*arguments, "--out", out)
    told = json.loads(out.read_text())
    assert list(told["domains"]) == ["labelled"] and told["missing"] == ["plain", "alike"]
    assert told["domains"]["labelled"]["shared"]["probe"] is not None


def test_f16_what_cannot_be_evaluated_is_said_before_anything_is_trained(
    command: Command, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **__: object) -> None:
        raise AssertionError("this takes a minute, and then it fails")

    monkeypatch.setattr(evaluation, "train_alone", train)
    monkeypatch.setattr(evaluation, "train_pooled", train)
    file = tmp_path / "run.toml"
    before = file.read_text()
    other = encoder(tmp_path / "other", hidden_size=32)
    code, _, err = command(*arguments, "--pooled", "--encoder", other)
    assert code == 2 and "node 'labelled' was trained with another encoder than is to be evaluated" in err
    for table, words in {
        trained_node(tmp_path, "all", labels=0, held_out=0.0): "node 'all' holds no samples out; set test_path",
        trained_node(tmp_path, "odd", labels=0, type_="image"): "node 'odd' was trained on samples of type image",
    }.items():
        file.write_text(before + table)
        code, _, err = command(*arguments, "--pooled")
        assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(("out", "words"), [("run.toml/figures.json", "Not a directory"), ("encoder", "is a folder")])
def test_f18_evaluate_looks_first_whether_it_can_write(command: Command, tmp_path: Path, out: str, words: str) -> None:
    (tmp_path / "run.toml").touch()
    (tmp_path / "encoder").mkdir()
    code, _, err = command("evaluate", "--config", tmp_path / "none.toml", "--out", tmp_path / out)
    assert (code, err.count("\n")) == (2, 1) and str(tmp_path / out) in err and words in err


def test_figures_go_into_the_card_and_name_whoever_agreed(
    command: Command, arguments: list[object], tmp_path: Path
) -> None:
    file, card = tmp_path / "run.toml", tmp_path / "encoder" / "README.md"
    file.write_text(file.read_text().replace("[nodes.plain]\n", "[nodes.plain]\nnamed = true\n"))
    code, _, err = command(*arguments, "--card", tmp_path / "encoder")
    assert code == 2 and "has no card of an exported encoder" in err.splitlines()[-1], "before anything is trained"
    card.write_text(f"{front_matter('text', whole=False)}{TITLE}text-1\n\n## Limits\n\nsome\n")
    for _ in range(2):
        code, printed, err = command(*arguments, "--card", tmp_path / "encoder", "--out", tmp_path / "figures.json")
        assert code == 0 and "figures written into the card" in printed, err
        text = card.read_text()
        assert is_card(text) and text.count("## Evaluation") == 1 and text.endswith("## Limits\n\nsome\n")
        assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith(("| domain", "| plain"))] == [
            "| domain 1",
            "| plain",
            "| domain 3",
            "| domain 1",
        ], "three losses, and the probe of the one that has labels"
        assert "labelled" not in text and "alike" not in text
        shared = json.loads((tmp_path / "figures.json").read_text())["domains"]["plain"]["shared"]["loss"]
        assert f"{shared:.3f}" in next(line for line in text.splitlines() if line.startswith("| plain"))


def test_an_encoder_with_the_vocabulary_that_everybody_uses_is_evaluated_and_its_card_written(
    command: Command, tmp_path: Path
) -> None:
    """Its nodes' private parts are corrections of its own matrices; the shared column is not the random one's."""
    file, shared = tmp_path / "run.toml", encoder(tmp_path / "encoder", "shared")
    file.write_text("".join(trained_node(tmp_path, name, labels=2, vocabulary="shared") for name in ("a", "b")))
    (shared / "README.md").write_text(f"{front_matter('text', whole=True)}{TITLE}text-1\n\n## Limits\n\nsome\n")
    arguments = ("--config", file, "--encoder", shared, "--card", shared, "--out", tmp_path / "figures.json")
    code, _, err = command("evaluate", *arguments, "--pooled")
    assert code == 0, err
    told = json.loads((tmp_path / "figures.json").read_text())["domains"]
    for kinds in told.values():
        assert len({scores["loss"] for scores in kinds.values()}) == 4 and kinds["shared"]["probe"] is not None
    text = (shared / "README.md").read_text()
    assert "| domain 2" in text and f"{told['a']['shared']['loss']:.3f}" in text

    places = [tmp_path / name / "encoders" / "text-1" for name in ("a", "b")]
    for place in places:
        assert "finished" not in told["a"], "only where every node has one"
        architecture, _ = prepared("shared")
        keep_finished(place, get_encoder_type("text").build(architecture, load_spec(place) or {}, 9), 1)
        code, printed, err = command("evaluate", *arguments)
        assert code == 0, err
        told = json.loads((tmp_path / "figures.json").read_text())["domains"]
    assert list(told["b"]) == ["random", "alone", "shared", "finished"] and "finished" in printed
    assert told["b"]["finished"]["loss"] not in {told["b"][kind]["loss"] for kind in ("random", "shared")}
    assert "*finished* a node's own copy" in (shared / "README.md").read_text()
