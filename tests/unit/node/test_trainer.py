"""What a trainer computes in, and what it keeps."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from structlog.testing import capture_logs
from torch import Tensor

from common.encoders import get_encoder_type
from common.encoders.windows import NOT_MASKED
from common.errors import UserError
from common.wire.update_rule import InnerOptimizer
from common.workers import AtOnce
from node_service.config import Precision
from node_service.training.checkpoint import read_tensors, write_tensors
from node_service.training.compiled import Gradients
from node_service.training.pieces import in_pieces
from node_service.training.trainer import Trainer

TEXTS = [f"{word} follows {other}, and then comes {word}" for word in "abcdefgh" for other in "klmnop"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INNER = InnerOptimizer(lr=1e-2, warmup_steps=0, schedule="constant", batch_size=4)


@cache
def prepared_text(dropout: bool) -> tuple[Any, Any, Any]:
    """The type `text`, a small architecture of it, with or without dropout, and its private spec."""
    text = get_encoder_type("text")
    bert = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    architecture, assets = text.assets(
        text.architecture(bert if dropout else {"hidden_size": 16, "num_hidden_layers": 1}), {"tokenizer": "bytes"}
    )
    return text, architecture, text.fit_private(TEXTS, architecture, {}, assets)


def fresh(device: str = "cpu", *, dropout: bool = False, inner: InnerOptimizer = INNER, **options: Any) -> Trainer:
    text, architecture, spec = prepared_text(dropout)
    model = text.build(architecture, spec, 0)
    return Trainer(model, model.encode(TEXTS), inner, seed=0, device=device, **options)


def kept(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a checkpoint has of a trainer."""
    return (
        {name: tensor.cpu().clone() for name, tensor in trainer.state().items()},
        {name: tensor.cpu().clone() for name, tensor in trainer.model.state_dict().items()},
    )


def restored(saved: tuple[dict[str, Tensor], dict[str, Tensor]], device: str = "cpu", **options: Any) -> Trainer:
    trainer = fresh(device, **options)
    trainer.model.load_state_dict(saved[1])
    trainer.load_state(saved[0])
    return trainer


def trained(precision: Precision) -> tuple[Trainer, list[float], torch.dtype]:
    text = get_encoder_type("text")
    architecture, assets = text.assets(text.architecture({"hidden_size": 16}), {"tokenizer": "bytes"})
    model = text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), 0)
    inner = InnerOptimizer(lr=1e-2, warmup_steps=0, schedule="constant")
    trainer = Trainer(model, model.encode(TEXTS), inner, seed=0, device="cpu", precision=precision)
    seen: list[torch.dtype] = []
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    layer.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    losses = [loss for _ in range(40) for loss in trainer.step()]
    return trainer, losses, seen[0]


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32() -> None:
    whole, plain, computed = trained("float32")
    mixed, rounded, computed_mixed = trained("bfloat16")
    assert (computed, computed_mixed) == (torch.float32, torch.bfloat16)
    assert rounded != plain and rounded == pytest.approx(plain, abs=0.1)
    assert rounded[-1] < rounded[0] - 1
    for trainer in (whole, mixed):
        kept = [
            *trainer.model.parameters(),
            *(value for each in trainer.optimizer.state.values() for value in each.values()),
        ]
        assert {tensor.dtype for tensor in kept} == {torch.float32}
        assert trainer.shared().vector.dtype == torch.float32


def test_what_is_measured_does_not_depend_on_the_precision_of_training() -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer, _, _ = trained(precision)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.fill_(0.01)
        losses.append(trainer.held_out_loss(trainer.encoded))
    assert losses[0] == losses[1]


def test_what_dropout_leaves_out_follows_from_the_seed() -> None:
    once = fresh(dropout=True)
    losses = [once.step() for _ in range(4)]
    saved = kept(once)
    rest = [once.step() for _ in range(3)]
    before = torch.manual_seed(2).get_state()
    again = fresh(dropout=True)
    assert [again.step() for _ in range(4)] == losses and torch.equal(torch.get_rng_state(), before)
    killed = restored(saved, dropout=True)
    assert [killed.step() for _ in range(3)] == rest, "after a kill too"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_loss_is_missed_and_a_checkpoint_is_gone_on_from(device: str, precision: Precision) -> None:
    whole = fresh(device, precision=precision)
    losses = [loss for _ in range(6) for loss in whole.step()] + whole.settle()
    assert len(losses) == 6 and whole.settle() == []
    half = fresh(device, precision=precision)
    first = [loss for _ in range(3) for loss in half.step()] + half.settle()
    half = restored(kept(half), device, precision=precision)
    rest = [loss for _ in range(3) for loss in half.step()] + half.settle()
    assert [*first, *rest] == pytest.approx(losses, abs=0.1) and losses[-1] < losses[0]  # a GPU adds up in any order
    if device == "cpu":
        assert [*first, *rest] == losses


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 9), most=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_pieces_of_a_batch_have_its_gradient(size: int, most: int, seed: int) -> None:
    """Of windows that have unequally many masked tokens, too: a mean of means would be another gradient."""
    model = fresh().model
    batch = model.batch(model.encode(TEXTS), size, torch.Generator().manual_seed(seed))
    batch["labels"][0, :20] = NOT_MASKED
    gradients = Gradients(model, compiled=False)
    found: list[list[Tensor]] = []
    losses = []
    for pieces in ([(batch, 1.0)], list(in_pieces(model, batch, size, most))):
        model.zero_grad()
        losses.append(float(gradients.of(pieces, 0, lambda: torch.autocast("cpu", enabled=False))))
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(list(in_pieces(model, batch, size, most))) == -(-size // most)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(found[0]) == len(found[1])
    for whole, pieced in zip(*found, strict=True):
        torch.testing.assert_close(pieced, whole, rtol=1e-4, atol=1e-6)


def test_a_small_memory_trains_the_same() -> None:
    whole, pieced = fresh(), fresh(micro_batch=3)
    losses = [[loss for _ in range(5) for loss in trainer.step()] for trainer in (whole, pieced)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and pieced.steps == 5
    torch.testing.assert_close(pieced.vector(), whole.vector(), rtol=1e-3, atol=1e-4)


def test_a_batch_that_is_no_rows_of_samples_is_not_cut() -> None:
    with pytest.raises(UserError, match="micro_batch 2: batches of this encoder type are not cut"):
        list(in_pieces(fresh().model, {"packed": torch.zeros(7, 3)}, 4, 2))


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_a_compiled_loss_leaves_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own tracing, with the machine's compiler left out: names, shared memory and what is trained."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = fresh(), fresh(compiled=True)
    with capture_logs() as logs:
        losses = [[loss for _ in range(4) for loss in trainer.step()] for trainer in (plain, compiled)]
    assert not logs, "it did compile, private parts at rest or not"
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert compiled.state().keys() == plain.state().keys()
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    assert compiled.vector().data_ptr() == next(iter(compiled.model.shared_parameters().values())).data_ptr()


def test_where_compiling_fails_training_goes_on_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine\nand a long story")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    plain, compiled = fresh(), fresh(compiled=True)
    with capture_logs() as logs:
        assert [compiled.step() for _ in range(3)] == [plain.step() for _ in range(3)]
    [warning] = logs
    assert warning["event"] == "the model is trained as it is: compiling it failed" and "\n" not in warning["problem"]


# --- kept -------------------------------------------------------------------------------------------------------------


class _Facts(BaseModel):
    number: int


class _Later(AtOnce):
    """Work that is done when somebody says so."""

    def __init__(self) -> None:
        self.work: list[Any] = []

    def run(self, work: Any) -> None:
        self.work.append(work)


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_is_of_the_moment_of_the_call_whenever_it_is_on_disk(device: str, tmp_path: Path) -> None:
    moving, later, place = torch.zeros(3, device=device), _Later(), tmp_path / "kept.safetensors"
    write_tensors(place, {"a": {"moving": moving, "count": torch.tensor(4)}}, _Facts(number=1), later)
    moving += 1.0
    assert read_tensors(place, _Facts, ["a"]) is None
    later.work.pop()()
    facts, groups = read_tensors(place, _Facts, ["a"]) or (None, {})
    assert facts == _Facts(number=1) and groups["a"]["moving"].tolist() == [0.0] * 3 and groups["a"]["count"] == 4
