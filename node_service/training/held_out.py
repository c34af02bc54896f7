"""The self-supervised loss on samples that are not trained on: by it training is steered, and encoders are compared."""

from __future__ import annotations

from typing import Any

import torch

from common.encoders.base import EncoderModel


@torch.no_grad()
def masked_loss(model: EncoderModel, encoded: Any, seed: int = 0, batches: int = 10, size: int = 128) -> float:
    """The self-supervised loss on `encoded` (held-out) samples, mean of `batches` batches of `size`.

    The same seed draws the same samples and masks: two models with the same private spec are compared on equal terms.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    losses = []
    for _ in range(batches):
        batch = model.batch(encoded, size, generator)
        placed = {name: tensor.to(device) for name, tensor in model.prepared(batch).items()}
        losses.append(model.loss(placed).reshape(()))
    model.train(was_training)
    known: list[float] = torch.stack(losses).tolist()  # once, at the end: what waits for a GPU
    return sum(known) / batches
