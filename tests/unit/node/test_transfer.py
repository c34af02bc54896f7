"""Transfer: what is frozen stays, every row gets the same budget, and the test part is read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import node_service.evaluation.transfer as measured
from common.encoders import get_encoder_type
from common.encoders.text_model import WITH_PRIVATE, TextModel
from common.wire.messages import InnerOptimizer
from node_service.corpus.corpus import Corpus
from node_service.evaluation.transfer import Column, TransferBudget, column, transfer
from node_service.training.trainer import Trainer
from tests.faults.tiny import ASSETS, TinyEncoderType, samples

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY = TinyEncoderType()
ARCHITECTURE = {"width": 8}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
BUDGET = TransferBudget(steps=12, rates=(1e-3, 3e-2), seeds=(0, 1), inner=InnerOptimizer(warmup_steps=1))


def corpus(seed: int) -> Corpus:
    return Corpus("tiny", samples(seed=seed), None, samples(seed=seed, count=50), None)


def columns() -> list[Column]:
    return [column(f"domain-{seed}", corpus(seed), TINY, ARCHITECTURE, ASSETS) for seed in (3, 4)]


@pytest.mark.parametrize("kind", ["private text", "shared text", "image"])
@pytest.mark.parametrize("part", ["private", "shared", "all"])
def test_frozen_parameters_do_not_move_and_the_others_do(kind: str, part: str) -> None:
    vocabulary, _, name = kind.rpartition(" ")
    encoder_type = get_encoder_type(name)
    given = SMALL | ({"vocabulary": vocabulary} if vocabulary else {})
    architecture, assets = encoder_type.assets(encoder_type.architecture(given), {"tokenizer": "bytes"})
    own: Any = [f"text {i} of many words" for i in range(40)]
    if kind == "image":
        own = np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8)
    model = encoder_type.build(architecture, encoder_type.fit_private(own, architecture, {}, assets), 0)
    shared, private = set(map(id, model.shared_parameters().values())), model.private_parameters()
    moving = {
        name
        for name, parameter in model.named_parameters()
        if part == "all" or (name in private if part == "private" else id(parameter) in shared)
    }
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # weight decay alone would move what has no gradient
    inner = InnerOptimizer(warmup_steps=0, weight_decay=0.1)
    trainer = Trainer(model, model.encode(own), inner, seed=0, device="cpu", trained=None if part == "all" else moving)
    for _ in range(3):
        trainer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == moving & learns
    assert learns == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_row_and_column_has_each_mode_and_seed_and_the_whole_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = measured.masked_loss

    def masked_loss(model: Any, encoded: Any, **how: Any) -> float:
        read.append(len(encoded))
        return original(model, encoded, **how)

    monkeypatch.setattr(measured, "masked_loss", masked_loss)
    steps: list[None] = []
    rows = {"shared": TINY.initial(ARCHITECTURE, 9), "random": None}
    table = columns()
    scores = list(transfer(TINY, ARCHITECTURE, rows, table, BUDGET, advance=lambda: steps.append(None)))
    assert [(score.row, score.column, score.mode, score.seed) for score in scores] == [
        (row, each.name, mode, seed)
        for each in table
        for row in rows
        for mode in ("frozen", "free")
        for seed in BUDGET.seeds
    ]
    assert len(steps) == BUDGET.steps_of(rows=2, columns=2) == 2 * 2 * 2 * 3 * 12
    assert read.count(50) == len(scores), "a test part is read once for each score"
    again = list(transfer(TINY, ARCHITECTURE, rows, columns(), BUDGET))
    assert scores == again, "the same rows, budget and seeds give the same table"


def test_a_rate_is_chosen_by_the_validation_part_and_a_trunk_that_fits_is_worth_it() -> None:
    """The row that was trained on the domain itself begins ahead of a random one, frozen as well as free; and the rate
    that diverges is not taken."""
    [one, _] = columns()
    model = TINY.build(ARCHITECTURE, one.spec, 0)
    trainer = Trainer(model, model.encode(one.train), InnerOptimizer(warmup_steps=1), seed=0, device="cpu")
    for _ in range(300):
        trainer.step()
    budget = TransferBudget(steps=60, rates=(1e4, 1e-2), seeds=(0, 1), inner=InnerOptimizer(warmup_steps=1))
    trunk = {name: parameter.detach() for name, parameter in model.shared_parameters().items()}
    scores = list(transfer(TINY, ARCHITECTURE, {"own": trunk, "random": None}, [one], budget))
    assert {score.rate for score in scores} == {1e-2}
    for mode in ("frozen", "free"):
        mean = {
            row: np.mean([score.loss for score in scores if (score.row, score.mode) == (row, mode)])
            for row in ("own", "random")
        }
        assert mean["own"] < mean["random"], mode


def test_frozen_rows_keep_the_shared_parameters_that_they_came_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    original = measured.masked_loss

    def masked_loss(model: Any, encoded: Any, **how: Any) -> float:
        seen.append({name: parameter.detach().clone() for name, parameter in model.shared_parameters().items()})
        return original(model, encoded, **how)

    monkeypatch.setattr(measured, "masked_loss", masked_loss)
    row = TINY.initial(ARCHITECTURE, 9)
    for mode, stays in (("frozen", True), ("free", False)):
        seen.clear()
        budget = TransferBudget(steps=5, rates=(1e-2,), seeds=(0,), modes=(mode,))  # type: ignore[arg-type]
        list(transfer(TINY, ARCHITECTURE, {"row": row}, columns()[:1], budget))
        for shared in seen:
            assert all(torch.equal(shared[name], row[name]) for name in row) is stays


def test_a_row_of_another_architecture_is_refused() -> None:
    def cells() -> Iterator[Any]:
        return transfer(TINY, ARCHITECTURE, {"other": TINY.initial({"width": 4}, 0)}, columns()[:1], BUDGET)

    with pytest.raises(ValueError, match="was expected"):
        next(cells())


def test_an_export_with_its_vocabulary_is_a_row_and_frozen_steps_all_go_to_the_private_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the directory is enough: architecture, shared tensors, and the tokenizer as an asset."""
    text = get_encoder_type("text")
    made, given = text.assets(text.architecture(SMALL), {"tokenizer": "bytes"})
    text.export_shared(tmp_path / "encoder", made, text.initial(made, 3), "# Shared encoder text-1\n", given)

    architecture, row = text.architecture_of(tmp_path / "encoder")
    architecture, assets = text.assets(architecture, {"tokenizer": str(tmp_path / "encoder")})
    rows = [f"the {i % 7} and the {i % 5} of {i}" for i in range(80)]
    domain = column("texts", Corpus("text", rows, None, rows[:20], None), text, architecture, assets)
    assert domain.spec["tokenizer"].encode() == assets["tokenizer.json"], "no vocabulary of its own"
    alone: list[bool] = []
    original = TextModel.loss

    def loss(model: TextModel, batch: Any) -> Any:
        alone.append(not batch.get(WITH_PRIVATE, True))
        return original(model, batch)

    monkeypatch.setattr(TextModel, "loss", loss)
    found = {}
    for mode in ("frozen", "free"):
        alone.clear()
        budget = TransferBudget(steps=30, rates=(3e-2,), seeds=(0,), modes=(mode,))  # type: ignore[arg-type]
        [found[mode]] = transfer(text, architecture, {"shared": row}, [domain], budget)
        assert any(alone) is (mode == "free"), "a step without the private parts teaches only the shared ones"
    assert found["free"].loss < found["frozen"].loss < np.log(made["vocab_size"])
