"""What the losses of a comparison say: paired differences, intervals, gaps closed. Pure functions of numbers.

A loss is in nats a predicted position; a difference is arm − baseline on the same seed, so that less than 0 is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

#: Draws of the bootstrap, and the seed of its draws: the same losses give the same interval.
DRAWS = 1000
_BOOTSTRAP_SEED = 8
LEVEL = 0.95

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class DocumentLosses:
    """The held-out loss of one model on one domain by document: float64 `sums` over the predicted positions, and how
    many those are, both of shape (documents,)."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Over all predicted positions; NaN where none was predicted."""
        predicted = self.counts.sum()
        return float(self.sums.sum() / predicted) if predicted else math.nan


#: Losses by column (an arm, or one view of it), by domain, then by seed: the same seeds in the same order everywhere.
Measured = Mapping[str, Mapping[str, Sequence[DocumentLosses]]]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; without bounds where they cannot be told."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Of a difference: which side of 0 all of the interval is on."""
        if self.low is None or self.high is None:
            return "undecided"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "undecided"


def t_interval(values: Sequence[float]) -> Interval:
    """Mean ± t · s / √n with n − 1 degrees of freedom (Student 1908); no bounds for one value, or any not finite."""
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if len(found) < 2 or not np.isfinite(found).all():
        return Interval(mean)
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return Interval(mean, mean - half, mean + half)


def bootstrap(arm: Sequence[DocumentLosses], baseline: Sequence[DocumentLosses], draws: int = DRAWS) -> Interval:
    """The difference of the losses, mean over the seeds, with a percentile interval over `draws` resamplings of the
    documents (Efron 1979). A draw takes the same documents for both and for every seed: they are paired.

    Both are by seed, and of the same documents. The interval is that of the corpus, given the models.
    """
    documents = len(arm[0].sums)
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    times = generator.multinomial(documents, np.full(documents, 1 / documents), size=draws).astype(np.float64)
    times = np.concatenate([np.ones((1, documents)), times])  # the first is the corpus as it is
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.mean([_losses(times, a) - _losses(times, b) for a, b in zip(arm, baseline, strict=True)], axis=0)
    drawn = found[1:][np.isfinite(found[1:])]
    if documents < 2 or not len(drawn):
        return Interval(float(found[0]))
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(found[0]), float(low), float(high))


def gap_closed(alone: Sequence[float], arm: Sequence[float], pooled: Sequence[float]) -> float | None:
    """(alone − arm) / (alone − pooled), each a mean over the seeds: 1 is as good as pooling. None where the interval of
    the gap does not lie above 0: then there is no gap to close."""
    gap = t_interval(_differences(alone, pooled))
    if gap.low is None or gap.low <= 0:
        return None
    return float(np.mean(_differences(alone, arm))) / gap.mean


def figures(measured: Measured, baseline: str, pooled: Sequence[str]) -> dict[str, Any]:
    """All figures of all columns as plain values.

    By column: `domains` (loss with its interval over seeds, losses by seed, difference to the baseline over seeds and
    over documents, gap closed to each of `pooled`, verdict), the same for the `mean` of all domains, the `worst` domain
    by its difference, and how many domains are better, worse, undecided.
    """
    return {column: _column(measured, column, baseline, pooled) for column in measured}


def _column(measured: Measured, column: str, baseline: str, pooled: Sequence[str]) -> dict[str, Any]:
    own, base = measured[column], measured[baseline]
    references = {name: measured[name] for name in pooled if name in measured and name != column}
    domains: dict[str, dict[str, Any]] = {}
    for domain in own:
        losses = [each.mean for each in own[domain]]
        row = _row(
            losses,
            [each.mean for each in base[domain]],
            {name: [each.mean for each in reference[domain]] for name, reference in references.items()},
        )
        documents = bootstrap(own[domain], base[domain])
        if row["difference"]["low"] is None:
            row["verdict"] = documents.verdict  # of one seed, the documents are all there is to go by
        domains[domain] = {**row, "documents": asdict(documents)}
    mean = _row(
        _means(own),
        _means(base),
        {name: _means(reference) for name, reference in references.items()},
    )
    worst = max(domains, key=lambda domain: _or_worst(domains[domain]["difference"]["mean"]))
    verdicts = [row["verdict"] for row in domains.values()]
    return {
        "domains": domains,
        "mean": mean,
        "worst": {"domain": worst, "difference": domains[worst]["difference"]},
        "counts": {verdict: verdicts.count(verdict) for verdict in ("better", "worse", "undecided")},
    }


def _row(losses: Sequence[float], base: Sequence[float], references: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    difference = t_interval(_differences(losses, base))
    return {
        "loss": asdict(t_interval(losses)),
        "by_seed": list(losses),
        "difference": asdict(difference),
        "verdict": difference.verdict,
        "gap_closed": {name: gap_closed(base, losses, reference) for name, reference in references.items()},
    }


def _means(column: Mapping[str, Sequence[DocumentLosses]]) -> list[float]:
    """The mean over the domains, by seed."""
    by_seed = zip(*([each.mean for each in seeds] for seeds in column.values()), strict=True)
    return [float(np.mean(losses)) for losses in by_seed]


def _or_worst(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _losses(times: NDArray[np.float64], losses: DocumentLosses) -> NDArray[np.float64]:
    """The loss of each draw, shape (draws,); `times` (draws, documents) says how often each document was drawn."""
    return np.asarray((times @ losses.sums) / (times @ losses.counts), dtype=np.float64)
