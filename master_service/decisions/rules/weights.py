"""What an update weighs: pure functions of numbers that are in the log.

The step is Σ wᵢ·Δᵢ / Σ samplesᵢ^κ over a buffer, with wᵢ = samplesᵢ^κ · staleness · return count · norm clip. The three
last factors are not divided out again: in a buffer of one node they would cancel, and with them the return count.
Averaged over all returns the balanced factor is 1, because Σ qᵢ·(pᵢ/qᵢ) = Σ pᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from master_service.decisions.rules.model import WeightRule


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


def count_factor(node: str, returns: Mapping[str, int], samples: Mapping[str, int], rule: WeightRule) -> float:
    """The return-count factor of `node` among the active nodes; `returns` counts this update already.

    balanced: p/q clipped to [1/bound, bound], where p is the node's target share and q its share of all returns, each
    node counted as if it had returned once more, so that the first returns of a run are not punished. sqrt: its square
    root. newcomer: 1 − e^(−c/c₀), so that a node gains trust with its returns. increasing: c over the mean count.
    """
    if rule.count == "none":
        return 1.0
    count = returns[node]
    if rule.count == "newcomer":
        return 1.0 - math.exp(-count / rule.count_scale)
    if rule.count == "increasing":
        mean = sum(returns.values()) / len(returns)
        return _clip(count / mean, rule.count_bound)
    if rule.target_share == "samples":
        share = max(samples[node], 1) / sum(max(n, 1) for n in samples.values())
    else:
        share = 1.0 / len(returns)
    ratio = share * (sum(returns.values()) + len(returns)) / (count + 1)
    return _clip(math.sqrt(ratio) if rule.count == "sqrt" else ratio, rule.count_bound)


def norm_factor(norm: float, recent: Sequence[float], multiple: float | None) -> float:
    """Shrinks an update beyond `multiple` × the median of recent norms to that; 1 where too few are known."""
    if multiple is None or len(recent) < 5:
        return 1.0
    limit = multiple * median(recent)
    return 1.0 if norm <= limit or norm == 0 else limit / norm


def _clip(value: float, bound: float) -> float:
    return min(max(value, 1.0 / bound), bound)
