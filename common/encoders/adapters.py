"""Low-rank corrections of a model's matrices (LoRA, Hu et al. 2021, arXiv:2106.09685): W·x becomes W·x + up·(down·x).

`up` begins as zeros, so that a fresh one changes nothing. A node's private encoder and private decoder consist of such
corrections; because they are linear they merge into the matrices exactly, and what is exported is a plain model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class LowRank(nn.Module):
    """One correction of rank r: `down` (r, in) begins at random, `up` (out, r) as zeros. For an embedding, of (entries,
    width), `up` has a row for each entry and `down` a column for each dimension. A given `down` stands still."""

    down: Tensor

    def __init__(self, rows: int, columns: int, rank: int, down: Tensor | None = None) -> None:
        super().__init__()
        if down is None:
            self.down = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        else:
            self.register_buffer("down", down, persistent=False)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def matrix(self) -> Tensor:
        """What is added to the matrix, (rows, columns)."""
        return self.up @ self.down


class Switch:
    """Whether corrections take part in what is computed now."""

    def __init__(self) -> None:
        self.on = True


class _Added:
    """The forward hook of a corrected module. An object and no closure: a copy of the model has its own corrections."""

    def __init__(self, correction: LowRank, switch: Switch) -> None:
        self.correction, self.switch = correction, switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.switch.on:
            return output
        down, up = self.correction.down, self.correction.up
        if isinstance(module, nn.Embedding):
            return output + embedding(args[0], up) @ down
        added: Tensor = (args[0] @ down.T) @ up.T
        return output + added


def correct(module: nn.Module, correction: LowRank, switch: Switch) -> None:
    """Let a correction act on a Linear or an Embedding, while the switch is on."""
    module.register_forward_hook(_Added(correction, switch))


def within(block: nn.Module, width: int) -> dict[str, nn.Linear]:
    """The matrices of a block that give `width` numbers a token, by name: those that write to the residual stream, and
    where a model keeps them apart its queries, keys and values."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width
    }
