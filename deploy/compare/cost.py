"""What a comparison will cost, measured before it begins: a few steps, a look, some documents of a validation part."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from deploy.compare.bench import Bench
from deploy.compare.held_out import document_losses
from deploy.compare.plan import Cell, Point, columns

_WARM_STEPS = 2
_STEPS = 6
_DOCUMENTS = 100


@dataclass(frozen=True)
class Cost:
    """Seconds of one process: for a training step, for a look at a validation part, and for a held-out document."""

    step: float
    look: float
    document: float


def measured(bench: Bench) -> Cost:
    """On the first domain and the first seed."""
    plan = bench.comparison
    domain, seed = plan.domains[0], plan.seeds[0]
    settings = plan.settings
    model = bench.model(domain, seed)
    inner = bench.inner(Point(settings.learning_rates[0], settings.weight_decays[0]))
    trainer, validation = bench.trainer(domain, seed, inner, model), bench.validation(domain, seed)
    for _ in range(_WARM_STEPS):
        trainer.step()
    begun = time.monotonic()
    for _ in range(_STEPS):
        trainer.step()
    stepped = time.monotonic()
    validation.loss(model)
    looked = time.monotonic()
    documents = bench.parts(domain, seed).validation[:_DOCUMENTS]
    document_losses(model, documents, seed)
    ended = time.monotonic()
    return Cost((stepped - begun) / _STEPS, looked - stepped, (ended - looked) / len(documents))


def train_seconds(bench: Bench, cells: Iterable[Cell], cost: Cost) -> float:
    """What it takes one process to train these cells."""
    plan = bench.comparison
    total = 0.0
    for cell in cells:
        steps = plan.cost(cell)
        looks = math.ceil(steps / plan.settings.look_every) + (1 if cell.domain else len(plan.domains))
        total += steps * cost.step + looks * cost.look
    return total


def test_seconds(bench: Bench, documents: int, cost: Cost) -> float:
    """What it takes one process to measure every column on every seed; `documents` in the test parts of all domains."""
    return len(bench.comparison.seeds) * len(columns(bench.comparison)) * documents * cost.document


def words(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
