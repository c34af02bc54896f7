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
    width), `up` has a row for each entry and `down` a column for each dimension."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def matrix(self) -> Tensor:
        """What is added to the matrix, (rows, columns)."""
        return self.up @ self.down


class Switch:
    """Whether corrections take part in what is computed now."""

    def __init__(self) -> None:
        self.on = True


def correct(module: nn.Module, correction: LowRank, switch: Switch) -> None:
    """Let a correction act on a Linear or an Embedding, while the switch is on."""

    def linear(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not switch.on:
            return output
        added: Tensor = (args[0] @ correction.down.T) @ correction.up.T
        return output + added

    def lookup(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not switch.on:
            return output
        return output + embedding(args[0], correction.up) @ correction.down

    module.register_forward_hook(lookup if isinstance(module, nn.Embedding) else linear)


def within(block: nn.Module, width: int) -> dict[str, nn.Linear]:
    """The matrices of a block that give `width` numbers a token, by name: those that write to the residual stream, and
    where a model keeps them apart its queries, keys and values."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width
    }
