"""Transfer: what is frozen stays, every row gets the same budget, and the test part is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import node_service.evaluation.transfer as measured
from common.encoders import get_encoder_type
from common.encoders.text_model import WITHOUT_PRIVATE, TextModel
from common.wire.update_rule import InnerOptimizer
from node_service.evaluation.transfer import Advance, Column, Mode, Prepared, TransferBudget
from node_service.training.trainer import Trainer
from tests.faults.tiny import ASSETS, TinyEncoderType, samples

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY = TinyEncoderType()
ARCHITECTURE = {"width": 8}
MODES: tuple[Mode, ...] = ("frozen", "free")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
BUDGET = TransferBudget(steps=12, rates=(1e-3, 3e-2), inner=InnerOptimizer(warmup_steps=1))


def prepared(seed: int, budget: TransferBudget = BUDGET, advance: Advance = lambda: None) -> Prepared:
    train = samples(seed=seed)
    spec = TINY.fit_private(train, ARCHITECTURE, {}, ASSETS)
    column = Column(f"domain-{seed}", train[20:], train[:20], samples(seed=seed, count=50), spec)
    return Prepared(TINY, ARCHITECTURE, column, budget, advance=advance)


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


def test_each_rate_has_the_whole_budget_and_the_test_part_is_read_by_the_chosen_model_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    original = measured.masked_loss

    def masked_loss(model: Any, encoded: Any, **how: Any) -> float:
        read.append(len(encoded))
        return original(model, encoded, **how)

    monkeypatch.setattr(measured, "masked_loss", masked_loss)
    steps: list[None] = []
    losses = []
    for _ in range(2):
        domain = prepared(3, advance=lambda: steps.append(None))
        found = domain.best(TINY.initial(ARCHITECTURE, 9), "free", 0)
        assert 50 not in read, "everything is chosen before"
        losses.append(domain.tested(found.model))
        assert read == [20, 20, 50]
        read.clear()
    assert len(steps) == 2 * 2 * 12
    assert losses[0] == losses[1], "the same row, budget and seed give the same loss"


def test_a_rate_is_chosen_by_the_validation_part_and_a_trunk_that_fits_is_worth_it() -> None:
    """The row that was trained on the domain itself begins ahead of a random one, frozen as well as free; and the rate
    that diverges is not taken."""
    budget = TransferBudget(steps=60, rates=(1e4, 1e-2), inner=InnerOptimizer(warmup_steps=1))
    domain = prepared(3, budget)
    model = TINY.build(ARCHITECTURE, domain.column.spec, 0)
    trainer = Trainer(model, model.encode(domain.column.train), budget.inner, seed=0, device="cpu")
    for _ in range(300):
        trainer.step()
    own = {name: parameter.detach() for name, parameter in model.shared_parameters().items()}
    for mode in MODES:
        of = {
            row: [domain.best(tensors, mode, seed) for seed in (0, 1)]
            for row, tensors in (("own", own), ("random", None))
        }
        assert {each.rate for fitted in of.values() for each in fitted} == {1e-2}
        mean = {row: np.mean([domain.tested(each.model) for each in fitted]) for row, fitted in of.items()}
        assert mean["own"] < mean["random"], mode


def test_frozen_rows_keep_the_shared_parameters_that_they_came_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    original = measured.masked_loss

    def masked_loss(model: Any, encoded: Any, **how: Any) -> float:
        seen.append({name: parameter.detach().clone() for name, parameter in model.shared_parameters().items()})
        return original(model, encoded, **how)

    monkeypatch.setattr(measured, "masked_loss", masked_loss)
    row = TINY.initial(ARCHITECTURE, 9)
    for mode in MODES:
        seen.clear()
        domain = prepared(3, TransferBudget(steps=5, rates=(1e-2,)))
        domain.tested(domain.best(row, mode, 0).model)
        assert len(seen) == 2
        for shared in seen:
            assert all(torch.equal(shared[name], row[name]) for name in row) is (mode == "frozen")


def test_a_row_of_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="was expected"):
        prepared(3).model(TINY.initial({"width": 4}, 0), 0)


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
    spec = text.fit_private(rows, architecture, {}, assets)
    assert spec["tokenizer"].encode() == assets["tokenizer.json"], "no vocabulary of its own"
    alone: list[bool] = []
    original = TextModel.loss

    def loss(model: TextModel, batch: Any) -> Any:
        alone.append(WITHOUT_PRIVATE in batch)
        return original(model, batch)

    monkeypatch.setattr(TextModel, "loss", loss)
    found = {}
    budget = TransferBudget(steps=30, rates=(3e-2,))
    domain = Prepared(text, architecture, Column("texts", rows, rows[:20], rows[:20], spec), budget)
    for mode in MODES:
        alone.clear()
        best = domain.best(row, mode, 0)
        assert any(alone) is (mode == "free"), "a step without the private parts teaches only the shared ones"
        found[mode] = domain.tested(best.model)
    assert found["free"] < found["frozen"] < np.log(made["vocab_size"])
