"""What transfer will cost, measured before anything begins, on training samples alone: a batch of fine-tuning in each
column, a row's features, a fit of TF-IDF."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.encoders.base import Samples
from common.errors import NotProbed
from deploy.compare.cost import Cost
from deploy.compare.transfer.bench import TransferBench, one_thread
from deploy.compare.transfer.plan import FEW_LABELS, LOSS, TFIDF, TransferCell, TransferPlan
from node_service.corpus.corpus import taken
from node_service.evaluation.tfidf import CHOSEN_ON, tfidf_accuracy

#: Rows that are timed: of an encoder, and of TF-IDF, where few are mostly overhead.
_ROWS, _REFERENCE_ROWS = 64, 256
#: A choice of C fits this many times all rows: in each of four parts three quarters, for each of three.
_FITS = 9


@dataclass(frozen=True)
class TransferCost:
    """Seconds of one process: for a step, and for a window of a loss; by column for a step of fine-tuning, and for a
    row's features; for a character in each class and fit of TF-IDF."""

    plan: TransferPlan
    step: float
    window: float
    tuning: Mapping[str, float]
    features: Mapping[str, float]
    character: float

    def seconds(self, cell: TransferCell) -> float:
        """What it takes to compute a cell."""
        settings, column = self.plan.settings, self.plan.column(cell.column)
        classes, budget = len(self.plan.classes(column.name, cell.seed)), self.plan.few_labels(cell.seed)
        if cell.what == LOSS:
            tried = len(settings.modes) * len(settings.rates)
            windows = (tried + 1) * settings.windows / 2 + (len(settings.modes) + 1) * settings.windows
            fitting = tried * settings.steps * self.step + windows * self.window if column.loss else 0.0
            probed = settings.probe_rows * 1.5 if column.labels else 0.0
            return fitting + probed * self.features.get(column.name, 0.0)
        if cell.what == FEW_LABELS:
            tuned = budget.steps_in_all * self.tuning.get(column.name, 0.0)
            tested = budget.draws * len(budget.per_class) * budget.test_rows
            return tuned + tested * self.features.get(column.name, 0.0)
        if cell.what == TFIDF:
            rows = float(budget.draws * sum(budget.per_class) * classes * (_FITS + 1))
        else:
            # of the drawn classes alone
            all_rows = min(settings.tfidf_rows or column.rows, column.rows) * classes / len(column.labels)
            rows = min(all_rows, CHOSEN_ON) * _FITS + all_rows
        return rows * column.length * classes * self.character


def measured(bench: TransferBench, cost: Cost) -> TransferCost:
    """On a random encoder, in every column with labels; what cannot be built in one of the others fails here too, and
    not after everything is trained."""
    plan, seed = bench.plan, bench.plan.comparison.seeds[0]
    tuning, features, character = dict[str, float](), dict[str, float](), 0.0
    for column in plan.columns:
        if not column.labels:
            bench.untrained(column.name)
            continue
        samples, labels = bench.labelled(column.name, seed, "train")
        chosen = np.random.default_rng(0).permutation(len(samples))[:_REFERENCE_ROWS].tolist()
        features[column.name], tuning[column.name] = _encoder(bench, column.name, taken(samples, chosen[:_ROWS]))
        names = [labels[row] for row in chosen]
        if plan.is_text and not character and len(set(names)) > 1:
            part = taken(samples, chosen), names
            begun = time.monotonic()
            with one_thread():
                tfidf_accuracy(part, part)
            read = len(chosen) * column.length * len(set(names)) * (_FITS + 1)
            character = (time.monotonic() - begun) / read
    windows = plan.comparison.settings.look_windows
    return TransferCost(plan, cost.step, cost.look / windows, tuning, features, character)


def _encoder(bench: TransferBench, column: str, rows: Samples) -> tuple[float, float]:
    """Seconds for the features of a row, and for a step of fine-tuning (0 where a model cannot be fine-tuned)."""
    model = bench.untrained(column)
    begun = time.monotonic()
    model.features(rows)
    read = time.monotonic()
    batch = taken(rows, range(min(len(rows), bench.plan.few_labels(bench.plan.comparison.base_seed).batch_size)))
    try:
        model.backward(model.pooled(batch).sum())
    except NotProbed:
        return (read - begun) / len(rows), 0.0
    return (read - begun) / len(rows), time.monotonic() - read
