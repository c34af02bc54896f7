"""What a trainer computes in, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from common.encoders import get_encoder_type
from common.wire.update_rule import InnerOptimizer
from node_service.config import Precision
from node_service.training.trainer import Trainer

TEXTS = [f"{word} follows {other}, and then comes {word}" for word in "abcdefgh" for other in "klmnop"]


def trained(precision: Precision) -> tuple[Trainer, list[float], torch.dtype]:
    text = get_encoder_type("text")
    architecture, assets = text.assets(text.architecture({"hidden_size": 16}), {"tokenizer": "bytes"})
    model = text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), 0)
    inner = InnerOptimizer(lr=1e-2, warmup_steps=0, schedule="constant")
    trainer = Trainer(model, model.encode(TEXTS), inner, seed=0, device="cpu", precision=precision)
    seen: list[torch.dtype] = []
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    layer.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    losses = [trainer.step() for _ in range(40)]
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
    text = get_encoder_type("text")
    sizes = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    architecture, assets = text.assets(text.architecture(sizes), {"tokenizer": "bytes"})
    spec, inner = text.fit_private(TEXTS, architecture, {}, assets), InnerOptimizer(lr=1e-2, warmup_steps=0)

    def fresh() -> Trainer:
        model = text.build(architecture, spec, 0)
        return Trainer(model, model.encode(TEXTS), inner, seed=0, device="cpu")

    once = fresh()
    losses = [once.step() for _ in range(4)]
    state = {name: tensor.clone() for name, tensor in once.state().items()}
    parameters = {name: tensor.clone() for name, tensor in once.model.state_dict().items()}
    rest = [once.step() for _ in range(3)]

    before = torch.manual_seed(2).get_state()
    again = fresh()
    assert [again.step() for _ in range(4)] == losses and torch.equal(torch.get_rng_state(), before)
    restored = fresh()
    restored.model.load_state_dict(parameters)
    restored.load_state(state)
    assert [restored.step() for _ in range(3)] == rest, "after a kill too"
