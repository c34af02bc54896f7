"""Transfer in `compare`: what is chosen without the test part, what is paired with what, and the command from a file
with unseen corpora to its tables."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.encoders import get_encoder_type
from common.wire.update_rule import InnerOptimizer, ReturnWhen, UpdateRule
from deploy.compare.bench import Bench
from deploy.compare.cells import Cells
from deploy.compare.plan import Cell, Comparison, FederatedArm, Point
from deploy.compare.pool import OneProcess, Task
from deploy.compare.progress import Narrator
from deploy.compare.run import run
from deploy.compare.transfer.bench import TransferBench
from deploy.compare.transfer.figures import UNSEEN, accuracy, figures, paired, paired_draws
from deploy.compare.transfer.plan import (
    AT_ONCE,
    FEW_LABELS,
    LOSS,
    REFERENCE,
    TFIDF,
    TFIDF_ALL,
    TransferCell,
    TransferPlan,
    columns_of,
)
from deploy.compare_settings import CompareConfig, TransferConfig
from master_service.decisions.rules.model import aggregation_rule
from node_service.corpus.corpus import Corpus
from node_service.evaluation.few_labels import draws
from node_service.evaluation.transfer import Prepared
from tests.unit.deploy.conftest import Command

DOMAINS = ("north", "south")
CHOICES = {
    ("alone", "north"): Point(0.01, 0.1),
    ("alone", "south"): Point(0.02, 0.1),
    ("shared", None): Point(0.01, 0.1, 0.25),
}
FEW = {"per_class": (2, 3), "draws": 3, "test_rows": 8, "steps": 2, "rates": (1e-3,)}
TRANSFER = {"steps": 2, "rates": (1e-3, 1e-2), "windows": 16, "probe_rows": 12, "few_labels": FEW}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


class Watched(list[str]):
    """A test part that tells of every read."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[str]:
        self.read += 1
        return super().__iter__()


def texts(word: str, rows: int, first: int = 0) -> tuple[list[str], list[str]]:
    """Three kinds that a word tells, in a domain that has a word of its own."""
    labels = [("red", "green", "blue")[row % 3] for row in range(rows)]
    return [f"{word} {label} {word} number {first + row}" for row, label in enumerate(labels)], labels


def corpora() -> dict[str, Corpus]:
    found = {}
    for word in (*DOMAINS, "west"):
        (train, labels), (test, test_labels) = texts(word, 30), texts(word, 12, first=30)
        found[word] = Corpus("text", train, labels, Watched(test), test_labels, texts(word, 9, first=42)[0])
    return found


def comparison(seeds: int = 2, **transfer: Any) -> Comparison:
    kind = get_encoder_type("text")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    architecture, assets = kind.assets(kind.architecture({**sizes, "sequence_length": 16}), {"tokenizer": "bytes"})
    update = UpdateRule(when=ReturnWhen(steps=2), inner=InnerOptimizer(warmup_steps=1, batch_size=4))
    unseen = {"west": {"path": "nowhere"}}
    settings = CompareConfig(
        steps=4,
        seeds=seeds,
        learning_rates=(0.01,),
        weight_decays=(0.1,),
        look_every=4,
        look_windows=8,
        transfer=TransferConfig.model_validate({"unseen": unseen, **TRANSFER, **transfer}),
    )
    return Comparison(
        settings=settings,
        encoder_type="text",
        architecture=architecture,
        assets=assets,
        initial=("fresh", None),
        overrides={},
        base_seed=5,
        update=update,
        federated={"shared": FederatedArm(aggregation_rule("fedbuff"), update, (0.25,))},
        arms=("random", "alone", "shared"),
        private={name: {} for name in DOMAINS},
        fingerprints={name: name for name in DOMAINS},
    )


def planned(seeds: int = 2, **transfer: Any) -> TransferPlan:
    plan = comparison(seeds, **transfer)
    return TransferPlan(plan, columns_of(plan, corpora()))


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_the_best_single_organisation_is_that_of_the_least_validation_loss_whatever_the_test_part_says() -> None:
    plan = planned(pooled_labels="whose")
    results: dict[TransferCell, dict[str, Any]] = {}
    for cell in plan.loss_cells(CHOICES):
        # south is the better one by the validation part of west, and the worse one by its test part
        validation = {"alone north": 3.0, "alone south": 2.0}.get(cell.row, 1.0)
        loss = {"alone north": 4.0, "alone south": 5.0, "shared version": 4.5}.get(cell.row, 9.0)
        if (cell.column, cell.row, cell.seed) == ("north", "alone south", 6):
            validation = math.inf  # it diverged once
        measured = {"rate": None, "validation": validation, "loss": loss + cell.seed}
        column = plan.column(cell.column)
        losses = dict.fromkeys((AT_ONCE, "frozen", "free"), measured) if column.loss else {}
        right = {"shared version": 0.9, "random": 0.5}.get(cell.row, 0.9)
        probe = {"linear": right, "knn": right, "majority": 0.4, "train_rows": 9, "test_rows": 9}
        results[cell] = {"losses": losses, "probe": probe if column.labels else None}
    found = figures(plan, results)
    assert found["best_single"] == {
        "north": "alone north",
        "south": "alone south",
        "west": "alone south",
        "whose": "alone north",
    }
    differences = found["losses"]["free"]["differences"]["shared version"]
    assert differences["west"]["best_single"]["by_seed"] == [-0.5, -0.5]
    assert differences["west"]["rows"]["alone north"]["mean"] == 0.5, "the difference to each is there"
    assert differences["west"]["rows"]["random"]["mean"] == -4.5
    assert differences[UNSEEN]["best_single"] == differences["west"]["best_single"], "one column is unseen"
    for probed in found["probes"]["differences"]["shared version"].values():
        gained = probed["linear"]["random"]
        assert (gained["mean"], gained["verdict"]) == (0.4, "better"), "of accuracies more is better"
    assert "shared, finished north" in differences["north"]["rows"]
    assert "shared, finished north" not in differences["south"]["rows"]


def test_few_labels_are_for_the_chosen_rows_and_columns_and_the_reference_has_the_same_draws() -> None:
    best = dict.fromkeys((*DOMAINS, "west", "whose"), "alone south")
    plan = planned(pooled_labels="whose")
    cells = plan.few_label_cells(CHOICES, best)
    few = {(cell.column, cell.row) for cell in cells if cell.what == FEW_LABELS}
    rows = ("random", "alone south", "shared version")
    assert few == {(column, row) for column in ("west", "whose") for row in rows}
    assert {(cell.column, cell.seed) for cell in cells if cell.what == TFIDF} == {
        (column, seed) for column in ("west", "whose") for seed in (5, 6)
    }
    once = [(cell.column, cell.seed) for cell in cells if cell.what == TFIDF_ALL]
    assert once == [("north", 5), ("south", 5), ("west", 5), ("whose", 5)], "the classes are the same for every seed"
    everywhere = planned(few_labels={**FEW, "columns": "all", "rows": "all"}).few_label_cells(CHOICES, best)
    assert {cell.row for cell in everywhere if cell.what == FEW_LABELS} == {*rows, "alone north"}
    names = [cell.name for cell in [*plan.loss_cells(CHOICES), *cells]]
    assert len(set(names)) == len(names)


def test_seeds_have_draws_of_their_own_and_classes_that_they_draw() -> None:
    plan = planned(seeds=3, classes={"west": 2})
    labels = texts("", 30)[1]
    seen = [{draw.seed for draw in draws(labels, plan.few_labels(seed))} for seed in (5, 6, 7)]
    assert seen == [{0}, {1}, {2}], "three draws for three seeds"
    assert planned(seeds=2).few_labels(6).first_draw == 2, "two for each of two"
    drawn = [plan.classes("west", seed) for seed in range(5, 25)]
    assert {len(each) for each in drawn} == {2} and len(set(drawn)) == 3
    assert plan.classes("north", 5) == ("blue", "green", "red"), "of the others nothing is said"


# --- what is paired --------------------------------------------------------------------------------------------------


def test_losses_are_paired_by_seed_and_few_labels_draw_by_draw() -> None:
    found = paired([3.0, 5.0, 4.0], [4.0, 6.0, 5.0])
    assert (found["mean"], found["low"], found["high"]) == (-1.0, -1.0, -1.0) and found["verdict"] == "better"
    with pytest.raises(ValueError):
        paired([3.0, 5.0], [4.0])
    one = {(4, 5, 0): 0.5, (4, 5, 1): 0.7, (4, 6, 2): 0.6, (4, 6, 3): 0.4}
    other = {(4, 6, 2): 0.5, (4, 6, 3): 0.3, (4, 5, 1): 0.4, (4, 5, 0): 0.4}
    differences = paired_draws(one, other)
    assert differences == pytest.approx({(4, 5, 0): 0.1, (4, 5, 1): 0.3, (4, 6, 2): 0.1, (4, 6, 3): 0.1})
    told = accuracy(differences)
    assert told["over"] == "seeds" and told["by_seed"] == pytest.approx([0.2, 0.1])
    # s = 0.1 / √2, so that the half width is t(1, 0.975) · 0.05
    assert (told["low"], told["high"]) == pytest.approx((0.15 - 12.706 * 0.05, 0.15 + 12.706 * 0.05), abs=1e-4)
    of_one = accuracy({key: value for key, value in differences.items() if key[1] == 5})
    assert of_one["over"] == "draws" and of_one["mean"] == pytest.approx(0.2) and of_one["low"] is not None
    with pytest.raises(ValueError, match="same draws"):
        paired_draws(one, {**other, (4, 7, 0): 0.1})


def test_a_transfer_cell_is_computed_anew_where_what_it_depends_on_changed() -> None:
    plan = planned()
    loss = TransferCell(LOSS, "alone north", "west", 5, Cell("alone", "north", 5, CHOICES["alone", "north"]))
    few = replace(loss, what=FEW_LABELS)

    def changed(other: TransferPlan, cell: TransferCell, content: str = "x") -> bool:
        return plan.digest(cell, "x") != other.digest(cell, content)

    assert not changed(planned(), loss) and changed(planned(), loss, content="y")
    assert changed(planned(steps=3), loss) and not changed(planned(steps=3), few)
    wider = planned(few_labels={**FEW, "steps": 9})
    assert not changed(wider, loss) and changed(wider, few)
    assert not changed(planned(pooled_labels="whose"), loss), "more columns, not other ones"
    other = replace(loss, source=Cell("alone", "north", 5, Point(0.02, 0.1)))
    assert plan.digest(loss, "x") != plan.digest(other, "x"), "another encoder was chosen"


# --- the test part ---------------------------------------------------------------------------------------------------


def test_no_test_part_is_read_before_all_choices_of_training_nor_in_a_cell_before_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cell the test part is measured once for each model, after the last look at the validation part."""
    held, looked = corpora(), list[str]()
    validated, tested = Prepared.validated, Prepared.tested
    before: dict[str, int] = {}

    def on_validation(self: Prepared, model: Any) -> float:
        if self.column.name not in before:
            before[self.column.name] = held[self.column.name].test.read  # type: ignore[attr-defined]
        looked.append("validation")
        return validated(self, model)

    def on_test(self: Prepared, model: Any) -> float:
        looked.append("test")
        return tested(self, model)

    monkeypatch.setattr(Prepared, "validated", on_validation)
    monkeypatch.setattr(Prepared, "tested", on_test)
    reads: dict[str, list[int]] = defaultdict(list)
    order: list[str] = []
    cells = Cells(tmp_path)
    plan = comparison(seeds=1, modes=("free",), pooled_labels="whose", few_labels={**FEW, "draws": 1})
    plan = replace(plan, settings=plan.settings.model_copy(update={"test_documents": 10}))
    bench = Bench(plan, held, cells)
    with Narrator(bench, 1, held) as narrator:
        narrator.announce()
    reads["announced"].append(sum(corpus.test.read for corpus in held.values()))  # type: ignore[attr-defined]

    def on_cell(task: Task, cell: Cell | TransferCell, kept: bool) -> None:
        order.append(task)
        reads[task].append(sum(corpus.test.read for corpus in held.values()))  # type: ignore[attr-defined]
        if isinstance(cell, TransferCell) and cell.what == LOSS and cell.column != "whose":
            assert looked == ["validation"] * (2 + 1) + ["test"] * 2, "two rates, and at once"
        looked.clear()

    outcome = run(bench, cells, OneProcess(bench), on_cell)
    assert reads["announced"] == [0] and set(reads["train"]) == {0}
    assert order == sorted(order, key=("train", "test", "transfer").index)
    assert before["west"] <= 1 + 10, "for the digest, and to draw ten samples"
    assert outcome.transfer is not None and not outcome.transfer["notes"]
    measures = TransferBench(bench)
    random, version = (
        measures.done(TransferCell(LOSS, row, "west", 5, Cell(arm, None, 5, CHOICES.get((arm, None)))))
        for row, arm in (("random", "random"), ("shared version", "shared"))
    )
    assert random is not None and version is not None
    assert random["losses"][AT_ONCE]["loss"] != random["losses"]["free"]["loss"] != version["losses"]["free"]["loss"]
    assert set(outcome.transfer["few_labels"]) == {"west", "whose"}
    assert set(outcome.transfer["few_labels"]["west"]["2"]["rows"]) >= {"random", "shared version", REFERENCE}


# --- the command -----------------------------------------------------------------------------------------------------

CONFIG = """
[encoder]
get = "text"
tokenizer = "bytes"
architecture = { hidden_size = 16, intermediate_size = 16, num_attention_heads = 2, num_hidden_layers = 1 }
[update]
when = { steps = 2 }
inner = { warmup_steps = 1, batch_size = 4 }
[compare]
steps = 4
learning_rates = [0.01]
weight_decays = [0.1]
finish_shares = [0.25]
look_every = 4
look_windows = 8
[compare.transfer]
steps = 2
rates = [0.01]
windows = 16
probe_rows = 12
few_labels = { per_class = [2], draws = 2, test_rows = 8, steps = 2, rates = [1e-3] }
[compare.transfer.unseen.west]
path = "FOLDER/west.jsonl"
[nodes.north.corpus]
path = "FOLDER/north.jsonl"
[nodes.south.corpus]
path = "FOLDER/south.jsonl"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for word in (*DOMAINS, "west"):
        rows = zip(*texts(word, 60), strict=True)
        lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
        (tmp_path / f"{word}.jsonl").write_text("\n".join(lines) + "\n")
    file = tmp_path / "run.toml"
    file.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return file


def test_the_command_measures_transfer_and_goes_on_where_it_was(command: Command, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("compare", "--config", config, "--out", out, "--jobs", 1, "--seeds", 2, "--arms", "shared")
    code, printed, err = command(*arguments)
    assert code == 0, err
    assert "of transfer" in err.splitlines()[1], "its cost is said before it begins"
    assert "shared version − best single" in printed and "frozen" in printed and REFERENCE in printed
    transfer = json.loads((out / "report.json").read_text())["transfer"]
    assert transfer["columns"]["west"] == {"seen": False, "loss": True, "labels": 3}
    table = transfer["losses"]["free"]["rows"]
    assert {row: set(by_column) for row, by_column in table.items()} == {
        **{row: {"north", "south", "west"} for row in ("random", "alone north", "alone south", "shared version")},
        **{f"shared, finished {name}": {name} for name in DOMAINS},
    }
    by_seed = {row: table[row]["west"]["by_seed"] for row in ("random", "shared version")}
    difference = transfer["losses"]["free"]["differences"]["shared version"]["west"]["rows"]["random"]
    assert difference["by_seed"] == pytest.approx([b - a for a, b in zip(*by_seed.values(), strict=True)])
    assert difference["low"] is not None and transfer["reference"]["west"]["rows"] > 0
    assert set(transfer["probes"]["rows"]["alone north"]) >= {"west"}
    page = (out / "report.html").read_text()
    assert "transfer: loss after 2 steps, shared parameters frozen" in page and "west (unseen)" in page

    kept = {path: path.stat().st_mtime_ns for path in (out / "transfer").iterdir()}
    lost = out / "transfer" / "loss.random.west.seed0.json"
    lost.unlink()
    code, _, err = command(*arguments, "--resume")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in kept if path != lost} == {
        path: at for path, at in kept.items() if path != lost
    }
    again = json.loads((out / "report.json").read_text())["transfer"]
    assert again == transfer, "the cell that was lost has come out the same"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unseen.west": "unseen.north"}, "that is a node's name"),
        ({"west.jsonl": "south.jsonl"}, "node 'south' holds"),
        ({"windows = 16": 'pooled_labels = "south"'}, "is a node's name"),
        ({"windows = 16": "classes = { east = 2 }"}, "no column 'east'"),
        ({"windows = 16": "window = 16"}, "did you mean 'windows'?"),
        ({"[compare]\n": "[compare]\ncut = 2\n"}, "which transfer cannot tell apart"),
    ],
)
def test_what_is_wrong_with_an_unseen_corpus_is_said_in_one_line(
    command: Command, config: Path, tmp_path: Path, change: Mapping[str, str], said: str
) -> None:
    text = config.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    code, _, err = command("compare", "--config", config, "--out", tmp_path / "out")
    assert code == 2 and said in err.splitlines()[-1], err


@pytest.mark.parametrize("name", ["cut-a", "cut-b", "hospitals-transfer"])
def test_the_cuts_are_valid_and_leave_out_what_they_measure(name: str) -> None:
    from deploy.config import load_config

    config = load_config(Path(__file__).parents[3] / f"deploy/examples/{name}.toml", {})
    transfer = config.compare.transfer
    assert transfer is not None and config.compare.seeds == 3
    unseen = {path for corpus in transfer.unseen.values() for path in (*corpus.path, *corpus.test_path)}
    held: set[Any] = {path for node in config.nodes.values() for each in node.corpus for path in each.path}
    assert len(unseen) >= 4 and not unseen & held
    reference: Sequence[str] = [str(config.encoder.reference)] if config.encoder.reference else []
    assert not set(reference) & (unseen | held), "the vocabulary saw none of them"
