"""Weights, buffers and outer optimisers against numbers worked by hand, the papers' formulas, and torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from master_service.arithmetic.outer import new_momentum, outer_step
from master_service.decisions.rules.buffer import Turnout, is_ready
from master_service.decisions.rules.model import BufferRule, OuterOptimizer, WeightRule, aggregation_rule, warnings
from master_service.decisions.rules.rate import mean_cosine, rate, smoothed
from master_service.decisions.rules.weights import (
    STEPS_BOUND,
    Totals,
    believed_steps,
    norm_factor,
    sample_factor,
    staleness_factor,
    step_norm,
)
from master_service.decisions.rules.weights import count_factor as factor


def count_factor(node: str, returns: dict[str, int], samples: dict[str, int], rule: WeightRule) -> float:
    """The factor of one of these nodes, with the sums taken anew."""
    totals = Totals(len(returns), sum(returns.values()), sum(max(each, 1) for each in samples.values()))
    return factor(returns[node], samples[node], totals, rule)


COUNTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(1, 500), min_size=1, max_size=8)


@given(COUNTS)
def test_the_balanced_factor_is_one_for_equal_counts_and_falls_with_the_count(returns: dict[str, int]) -> None:
    rule, ones = WeightRule(), dict.fromkeys(returns, 1)
    equal = dict.fromkeys(returns, 7)
    assert all(count_factor(node, equal, ones, rule) == pytest.approx(1.0) for node in returns)
    factors = {node: count_factor(node, returns, ones, rule) for node in returns}
    ordered = sorted(returns, key=lambda node: returns[node])
    assert all(factors[a] >= factors[b] for a, b in itertools.pairwise(ordered))
    assert all(0.25 <= factor <= 4.0 for factor in factors.values())


@given(COUNTS, st.booleans())
def test_unclipped_balance_gives_every_node_its_target_share(returns: dict[str, int], by_samples: bool) -> None:
    rule = WeightRule(count_bound=1e9, target_share="samples" if by_samples else "uniform")
    samples = {node: 10 * index + 1 for index, node in enumerate(returns)}
    # count+1 is the share that the factor is taken from; share × factor must be the target share
    shares = {node: (count + 1) / (sum(returns.values()) + len(returns)) for node, count in returns.items()}
    mass = {node: shares[node] * count_factor(node, returns, samples, rule) for node in returns}
    assert sum(mass.values()) == pytest.approx(1.0)
    for node in returns:
        target = samples[node] / sum(samples.values()) if by_samples else 1 / len(returns)
        assert mass[node] == pytest.approx(target)


def test_other_factors_by_hand() -> None:
    returns, samples = {"a": 30, "b": 10}, {"a": 1, "b": 1}
    assert count_factor("a", returns, samples, WeightRule(count="none")) == 1.0
    assert count_factor("a", returns, samples, WeightRule()) == pytest.approx(0.5 * 42 / 31)
    assert count_factor("a", returns, samples, WeightRule(count="sqrt")) == pytest.approx(math.sqrt(0.5 * 42 / 31))
    assert count_factor("a", returns, samples, WeightRule(count="increasing")) == pytest.approx(1.5)
    assert count_factor("b", returns, samples, WeightRule(count="newcomer")) == pytest.approx(1 - math.exp(-1))
    assert count_factor("b", {"a": 999, "b": 1}, samples, WeightRule()) == 4.0
    assert [staleness_factor(t, WeightRule()) for t in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])
    hinge = WeightRule(staleness="hinge", staleness_exponent=0.5, hinge_start=4)
    assert [staleness_factor(t, hinge) for t in (0, 4, 6, 14)] == pytest.approx([1, 1, 1 / 2, 1 / 6])
    assert sample_factor(9, WeightRule(samples_power=0.5)) == 3.0
    assert sample_factor(0, WeightRule(samples_power=1.0)) == 1.0
    assert norm_factor(30.0, [1.0] * 5, 10.0) == pytest.approx(1 / 3)
    assert norm_factor(30.0, [1.0] * 4, 10.0) == norm_factor(5.0, [1.0] * 9, 10.0) == norm_factor(9.0, [], None) == 1.0


def test_f13_the_norms_of_few_and_of_many_steps_are_compared_by_the_step() -> None:
    usual = [step_norm(2.0, 25)] * 5
    # two hundred times the steps of a random walk go √200 times as far: nothing to cut
    assert norm_factor(step_norm(2.0 * math.sqrt(200), 5000), usual, 10.0) == 1.0
    assert norm_factor(step_norm(2.0 * math.sqrt(200), 25), usual, 10.0) == pytest.approx(10 / math.sqrt(200))
    # but nobody can claim any number of steps, where it is known what is usual
    assert believed_steps(5000, [25] * 5) == 5000 and believed_steps(0, [25] * 5) == 1
    assert believed_steps(1 << 60, [25] * 5) == STEPS_BOUND * 25 and believed_steps(1 << 60, [25] * 4) == 1 << 60


@pytest.mark.parametrize(
    ("kind", "waiting", "active", "ready"),
    [
        ("arrival", "", "abc", False),
        ("arrival", "a", "abc", True),
        ("count", "ab", "abc", False),
        ("count", "aab", "abc", True),
        ("count", "aaaaa", "ab", False),  # one node alone is not a buffer while another is active
        ("count", "aaa", "a", True),
        ("count", "a", "a", False),
        ("count", "aa", "a", True),  # with two unanswered at most a third will not come
        ("half", "a", "abcde", False),
        ("half", "ab", "abcde", False),
        ("half", "abc", "abcde", True),
        ("half", "a", "a", True),
        ("half", "aa", "ab", False),
        ("cohort", "aab", "abc", False),
        ("cohort", "abc", "abc", True),
        ("cohort", "ab", "", True),
    ],
)
def test_when_a_buffer_is_ready(kind: str, waiting: str, active: str, ready: bool) -> None:
    rule = BufferRule(kind=kind, size=3)  # type: ignore[arg-type]
    turnout = Turnout(len(waiting), len(set(waiting)), len(active), len(set(active) - set(waiting)))
    assert is_ready(turnout, rule, max_unanswered=2) is ready


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_outer_step_is_torchs_sgd(nesterov: bool) -> None:
    torch.manual_seed(1)
    rule = OuterOptimizer(optimizer="nesterov" if nesterov else "sgd", lr=0.7, momentum=0.9)
    parameter = torch.nn.Parameter(torch.randn(50))
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=nesterov)
    target, momentum = parameter.detach().clone(), new_momentum(50, rule)
    for _ in range(6):
        gradient = torch.randn(50)
        parameter.grad = gradient.clone()
        optimizer.step()
        outer_step(target, gradient, momentum, rule)
    assert torch.allclose(target, parameter.detach(), atol=1e-5)


def test_presets_and_what_is_warned_of() -> None:
    assert aggregation_rule("fedavg", {"outer": {"lr": 0.5}}).outer.lr == 0.5
    assert aggregation_rule("fedavg").weights.samples_power == 1.0
    with pytest.raises(UserError, match="no aggregation rule 'fedprox'; there are: return-count, fedavg"):
        aggregation_rule("fedprox")
    assert warnings(aggregation_rule("fedasync", {"outer": {"momentum": 0.9}}))
    assert not warnings(aggregation_rule("diloco"))


VECTORS = st.lists(
    st.lists(st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3)), min_size=3, max_size=3),
    min_size=2,
    max_size=6,
)


@given(VECTORS, st.data())
def test_the_mean_cosine_follows_from_norms_alone(vectors: list[list[float]], data: st.DataObject) -> None:
    coefficients = data.draw(st.lists(st.floats(0.05, 2), min_size=len(vectors), max_size=len(vectors)))
    moved = [torch.tensor(each, dtype=torch.float64) for each in vectors]
    norms = [float(each.norm()) for each in moved]
    total = sum((c * each for c, each in zip(coefficients, moved, strict=True)), torch.zeros(3, dtype=torch.float64))
    found = mean_cosine(float(total.norm()), coefficients, norms)
    pairs = [
        (coefficients[i] * coefficients[j] * norms[i] * norms[j], float(moved[i] @ moved[j]))
        for i, j in itertools.combinations(range(len(moved)), 2)
    ]
    weight = sum(each for each, _ in pairs)
    if found is None:
        assert weight < 1e-6
    elif weight > 1e-3:
        dots = sum(coefficients[i] * coefficients[j] * float(moved[i] @ moved[j])
                   for i, j in itertools.combinations(range(len(moved)), 2))  # fmt: skip
        assert found == pytest.approx(max(-1.0, min(1.0, dots / weight)), abs=1e-6)


def test_the_rate_gives_a_share_of_what_each_moved() -> None:
    rule = OuterOptimizer(rho=0.67)
    third = [1 / 3] * 3
    assert rate(rule, third, 0.0) == pytest.approx(2.01), "three that have nothing in common"
    assert rate(rule, third, 1.0) == 1.0, "all alike: the plain mean"
    assert rate(rule, [0.1] * 10, 0.3) == pytest.approx(0.67 / 0.37)
    assert rate(rule, third, None) == 1.0 and rate(OuterOptimizer(lr=0.7), third, 0.0) == 0.7
    assert rate(rule, [1.0], 0.0) == 1.0, "one update alone is taken whole"
    stale = [each * 0.5 for each in third]
    assert rate(rule, stale, 0.0) == rate(rule, third, 0.0), "what staleness takes away stays away"
    assert mean_cosine(1.0, [1.0], [1.0]) is None and mean_cosine(0.0, third, [0.0] * 3) is None
    assert smoothed(None, 0.5) == 0.5 and smoothed(0.5, None) == 0.5 and smoothed(0.0, 1.0) == pytest.approx(0.2)


@given(st.lists(st.floats(0.01, 4), min_size=1, max_size=20), st.floats(-1, 1), st.floats(0.1, 2), st.floats(0.1, 2))
def test_the_rate_is_bounded_by_the_number_of_updates(
    coefficients: list[float], agreement: float, rho: float, lr: float
) -> None:
    found = rate(OuterOptimizer(rho=rho, lr=lr), coefficients, agreement)
    assert lr <= found <= max(lr, rho * len(coefficients)) * (1 + 1e-9)
