"""The outer optimiser: a weighted mean of pseudo-gradients moves the target parameter set. Elementwise, bit for bit.

Every operation is a plain `mul_` or `add_`: `add_(alpha=)` fuses on some CPUs and would make replay depend on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from master_service.decisions.rules.model import OuterOptimizer


def outer_step(target: Tensor, gradient: Tensor, momentum: Tensor | None, rule: OuterOptimizer) -> None:
    """Move a slice of the target in place. `gradient` (same shape) is used up; `momentum` is updated in place.

    sgd: x ← x − lr·(m ← μm + g). nesterov: x ← x − lr·(g + μm) with the same m (Sutskever et al. 2013, in the form of
    torch.optim.SGD, which DiLoCo uses).
    """
    if momentum is not None and rule.momentum > 0:
        momentum.mul_(rule.momentum).add_(gradient)
        if rule.optimizer == "nesterov":
            gradient.add_(momentum * rule.momentum)
        else:
            gradient.copy_(momentum)
    target.sub_(gradient if rule.lr == 1.0 else gradient.mul_(rule.lr))


def new_momentum(size: int, rule: OuterOptimizer) -> Tensor | None:
    """Zeros of shape (size,) where the rule has momentum."""
    return torch.zeros(size) if rule.momentum > 0 else None
