"""What an update weighs: pure functions of numbers that are in the log.

The step is Σ wᵢ·Δᵢ / Σ samplesᵢ^κ over a buffer, with wᵢ = samplesᵢ^κ · staleness · return count · norm clip. The three
last factors are not divided out again: in a buffer of one node they would cancel, and with them the return count.
Averaged over all returns the balanced factor is 1, because Σ qᵢ·(pᵢ/qᵢ) = Σ pᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from master_service.decisions.rules.model import WeightRule

#: An update counts as made of at most so many times the usual steps: who claims more is not believed.
STEPS_BOUND = 256
#: Fewer recent updates than this say nothing about the next one.
_FEW = 5


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the nodes that an update is compared with: how many, their returns, their samples (each at least 1)."""

    nodes: int
    returns: int
    samples: int


def sample_factor(samples: int, rule: WeightRule) -> float:
    """samples^κ; 1 for κ = 0. An update of no samples weighs as one of a single sample."""
    return math.pow(max(samples, 1), rule.samples_power)


def staleness_factor(staleness: int, rule: WeightRule) -> float:
    """s(τ) of FedAsync (Xie et al. 2019, §5.2): constant 1, polynomial (1+τ)^-a, or hinge 1/(a(τ−b)+1) beyond b."""
    if rule.staleness == "constant":
        return 1.0
    if rule.staleness == "polynomial":
        return float((1.0 + staleness) ** -rule.staleness_exponent)
    over = staleness - rule.hinge_start
    return 1.0 if over <= 0 else 1.0 / (rule.staleness_exponent * over + 1.0)


def count_factor(count: int, samples: int, totals: Totals, rule: WeightRule) -> float:
    """The return-count factor of a node with `count` returns and `samples` samples among the nodes of `totals`, of
    which it is one; both count this update already.

    balanced: p/q clipped to [1/bound, bound], where p is the node's target share and q its share of all returns, each
    node counted as if it had returned once more, so that the first returns of a run are not punished. sqrt: its square
    root. newcomer: 1 − e^(−c/c₀), so that a node gains trust with its returns. increasing: c over the mean count.
    """
    if rule.count == "none":
        return 1.0
    if rule.count == "newcomer":
        return 1.0 - math.exp(-count / rule.count_scale)
    if rule.count == "increasing":
        return _clip(count / (totals.returns / totals.nodes), rule.count_bound)
    share = max(samples, 1) / totals.samples if rule.target_share == "samples" else 1.0 / totals.nodes
    ratio = share * (totals.returns + totals.nodes) / (count + 1)
    return _clip(math.sqrt(ratio) if rule.count == "sqrt" else ratio, rule.count_bound)


def believed_steps(steps: int, recent: Sequence[int]) -> int:
    """The steps that an update was made of, at least 1. What is claimed beyond a multiple of the usual is cut to that,
    where enough updates are known to say what is usual."""
    most = int(STEPS_BOUND * median(recent)) if len(recent) >= _FEW else steps
    return max(1, min(steps, most))


def step_norm(norm: float, steps: int) -> float:
    """An update's norm for a single step. Steps that point anywhere add up to √steps times one of them (a random walk),
    so that updates of few and of many steps can be compared; steps that all agree would add up to more."""
    return norm / math.sqrt(steps)


def norm_factor(norm: float, recent: Sequence[float], multiple: float | None) -> float:
    """Shrinks an update beyond `multiple` × the median of recent norms to that; 1 where too few are known. All norms
    are for a single step (`step_norm`)."""
    if multiple is None or len(recent) < _FEW:
        return 1.0
    limit = multiple * median(recent)
    return 1.0 if norm <= limit or norm == 0 else limit / norm


def _clip(value: float, bound: float) -> float:
    return min(max(value, 1.0 / bound), bound)
