"""How far the outer optimiser steps: pure functions of numbers that are in the log.

A mean of n updates whose directions have nothing in common moves each direction by an n-th of what its node moved; if
all agree, it moves by the whole. So one rate does not serve both: with the share ρ of its own progress that a node is
to get back, the rate is ρ·n for the former, and 1 is enough for the latter. In between says the mean cosine c between
two updates: the squared norm of their mean is A = (1 + (n − 1)·c) / n of that of one, and the rate is ρ / A.
"""

from __future__ import annotations

from collections.abc import Sequence

from master_service.decisions.rules.model import OuterOptimizer

#: Share of a new version's cosine in the running mean; about the last ten versions count.
_SMOOTHING = 0.2


def mean_cosine(norm: float, coefficients: Sequence[float], norms: Sequence[float]) -> float | None:
    """The mean cosine between two updates of a version, weighted by what they contribute, in [-1, 1].

    `norm` is that of Σ coefficient·Δ, `norms` are those of the Δ. None for fewer than two that move anything.
    """
    parts = [abs(coefficient) * each for coefficient, each in zip(coefficients, norms, strict=True)]
    squares = sum(part * part for part in parts)
    pairs = sum(parts) ** 2 - squares
    if len(parts) < 2 or pairs <= 1e-12 * squares:
        return None
    return max(-1.0, min(1.0, (norm * norm - squares) / pairs))


def smoothed(before: float | None, now: float | None) -> float | None:
    """The running mean of the cosines of versions."""
    if before is None or now is None:
        return now if before is None else before
    return before + _SMOOTHING * (now - before)


def rate(rule: OuterOptimizer, coefficients: Sequence[float], agreement: float | None) -> float:
    """The outer learning rate of a step over updates with these coefficients: `rule.lr`, and with `rule.rho` the larger
    of that and ρ / A, for as many equal updates as would weigh like these. Unknown agreement is taken as complete."""
    total, squares = sum(coefficients), sum(each * each for each in coefficients)
    if rule.rho is None or agreement is None or squares <= 0:
        return rule.lr
    updates = total * total / squares
    common = (1.0 + (updates - 1.0) * max(0.0, agreement)) / updates
    return max(rule.lr, rule.rho / common)
