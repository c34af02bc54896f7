"""`compare`'s figures against scipy and numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from deploy.compare.statistics import DocumentLosses, Interval, bootstrap, figures, gap_closed, t_interval

LOSSES = st.lists(st.integers(10, 1000).map(lambda cents: cents / 100), min_size=2, max_size=8, unique=True)


def documents(*means: float, count: float = 10.0) -> DocumentLosses:
    """One document for each mean loss."""
    return DocumentLosses(np.array(means) * count, np.full(len(means), count))


def seeds(*losses: float) -> list[DocumentLosses]:
    """A model of each seed, on two documents that it finds equally hard."""
    return [documents(loss, loss) for loss in losses]


@given(LOSSES)
def test_a_t_interval_is_scipys(values: list[float]) -> None:
    found = t_interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)
    assert found.mean == pytest.approx(np.mean(values))


def test_a_t_interval_by_hand() -> None:
    """n = 3, s = 1: the half width is t(2, 0.975) / √3 = 4.3027 / 1.7321."""
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-4)
    assert t_interval([1.0]) == Interval(1.0)
    assert t_interval([1.0, math.nan]).low is None


def test_an_interval_beyond_0_decides_and_one_around_it_does_not() -> None:
    verdicts = [Interval(-1, -2, -0.1), Interval(1, 0.1, 2), Interval(0.5, -0.1, 1), Interval(-3.0)]
    assert [each.verdict for each in verdicts] == ["better", "worse", "undecided", "undecided"]


def test_a_loss_weighs_documents_by_what_was_predicted_of_them() -> None:
    losses = DocumentLosses(np.array([10.0, 60.0, 0.0]), np.array([10.0, 20.0, 0.0]))
    assert losses.mean == pytest.approx(70 / 30)
    assert math.isnan(DocumentLosses(np.zeros(2), np.zeros(2)).mean)


def test_the_bootstrap_is_paired_and_as_wide_as_the_documents_differ() -> None:
    """A difference that is the same in every document has an interval without width, however unlike the documents."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 9, 60)
    always = bootstrap([documents(*(hard - 0.5))], [documents(*hard)])
    assert (always.mean, always.low, always.high) == pytest.approx((-0.5, -0.5, -0.5))
    apart = hard - 0.5 + rng.normal(0, 1, 60)
    found = bootstrap([documents(*apart)], [documents(*hard)])
    expected = scipy.stats.bootstrap((apart - hard,), np.mean, n_resamples=4000, method="percentile", random_state=1)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.05)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.05)
    assert found == bootstrap([documents(*apart)], [documents(*hard)]), "the draws are seeded"


def test_the_bootstrap_takes_the_mean_over_the_seeds() -> None:
    found = bootstrap([documents(1, 2), documents(3, 4)], [documents(2, 3), documents(3, 4)])
    assert found.mean == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("alone", "arm", "pooled", "closed"),
    [
        ((4.0, 4.1, 4.2), (3.5, 3.6, 3.7), (3.0, 3.1, 3.2), 0.5),
        ((4.0, 4.1, 4.2), (4.5, 4.6, 4.7), (3.0, 3.1, 3.2), -0.5),
        ((4.0, 4.1, 4.2), (3.5, 3.6, 3.7), (4.5, 3.5, 4.2), None),  # the gap's interval holds 0
        ((4.0, 4.1, 4.2), (3.5, 3.6, 3.7), (5.0, 5.1, 5.2), None),  # pooling is worse: nothing to close
        ((4.0,), (3.5,), (3.0,), None),  # one seed tells no interval
    ],
)
def test_a_gap_is_closed_only_where_there_is_one(
    alone: Sequence[float], arm: Sequence[float], pooled: Sequence[float], closed: float | None
) -> None:
    found = gap_closed(alone, arm, pooled)
    assert found is None if closed is None else found == pytest.approx(closed)


def test_the_figures_of_a_small_comparison_by_hand() -> None:
    measured = {
        "alone": {"a": seeds(4.0, 4.2), "b": seeds(3.0, 3.0), "c": seeds(2.0, 2.2)},
        "shared": {"a": seeds(3.5, 3.7), "b": seeds(3.2, 3.2), "c": seeds(1.0, 2.5)},
        "pooled": {"a": seeds(3.0, 3.2), "b": seeds(3.0, 3.0), "c": seeds(2.0, 2.2)},
    }
    shared = figures(measured, "alone", ["pooled"])["shared"]
    assert {name: row["verdict"] for name, row in shared["domains"].items()} == {
        "a": "better",
        "b": "worse",
        "c": "undecided",
    }
    assert shared["counts"] == {"better": 1, "worse": 1, "undecided": 1}
    assert shared["worst"]["domain"] == "b"
    assert shared["domains"]["a"]["gap_closed"] == {"pooled": pytest.approx(0.5)}
    assert shared["domains"]["b"]["gap_closed"] == {"pooled": None}
    assert shared["mean"]["by_seed"] == pytest.approx([7.7 / 3, 9.4 / 3])
    assert shared["mean"]["difference"]["mean"] == pytest.approx((-1.3 / 3 + 0.0) / 2)


def test_with_one_seed_the_documents_decide() -> None:
    measured = {"alone": {"a": [documents(4.0, 4.2, 3.9)]}, "shared": {"a": [documents(3.0, 3.1, 2.8)]}}
    row = figures(measured, "alone", [])["shared"]["domains"]["a"]
    assert row["difference"]["low"] is None and row["documents"]["high"] < 0 and row["verdict"] == "better"
