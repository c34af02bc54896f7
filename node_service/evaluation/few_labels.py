"""What an encoder is worth with a handful of labels: it is fine-tuned on them under a linear classifier, and tested.

Which rows carry a label, and which are tested, follows from the labels and the seed alone: every encoder gets the same
draws, so that two of them can be compared draw by draw.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.encoders.base import EncoderModel, Samples
from common.encoders.hugging_face import seeded
from common.errors import NotProbed
from node_service.corpus.corpus import taken

#: The classifier starts at zero and learns at this rate, or at the encoder's where that is larger.
_HEAD_RATE = 1e-2
#: Of four labelled rows of a class, one is kept back while the rate is chosen.
_KEPT_BACK = 4


@dataclass(frozen=True)
class FewLabels:
    """The budget of the measure, the same for every encoder.

    `per_class`: labels a class. `steps` of at most `batch_size` rows each, once for each of the `rates` (of the
    encoder, Adam) on three quarters of the labelled rows, and once more, at the rate that named the last quarter best,
    on all of them. At most `test_rows` rows are tested. The draws are numbered from `first_draw` on.
    `choosing_draws`: that many of each size choose a rate together, for all of that size; None: each for itself.
    """

    per_class: tuple[int, ...] = (4, 16, 64)
    draws: int = 10
    test_rows: int = 500
    steps: int = 40
    batch_size: int = 32
    rates: tuple[float, ...] = (1e-4, 1e-3, 5e-3)
    first_draw: int = 0
    choosing_draws: int | None = None

    @property
    def steps_in_all(self) -> int:
        """The training steps for one encoder, to be said before it is begun: 4,800 by default, about 0.1 s each for
        32 texts of 125 tokens through 82 k parameters on one core."""
        choosing = self.draws if self.choosing_draws is None else min(self.choosing_draws, self.draws)
        return len(self.per_class) * (choosing * len(self.rates) + self.draws) * self.steps


#: Ten draws of 4, 16 and 64 labels a class.
USUAL = FewLabels()


@dataclass(frozen=True)
class Draw:
    """The rows of the training part whose labels may be read; class by class, in the order in which they were drawn."""

    per_class: int
    seed: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class FewLabelScore:
    """Accuracy in [0, 1] of one draw, the rows that it was trained on and tested on, and the rate that was chosen."""

    per_class: int
    seed: int
    accuracy: float
    rows: int
    test_rows: int
    rate: float

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def draws(labels: Sequence[str], budget: FewLabels) -> list[Draw]:
    """Every draw of a budget, smallest first. Of one seed, the draw of four is among that of sixteen, and so on.

    A class with fewer rows than are wanted gives what it has. Raises NotProbed for fewer than two classes.
    """
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise NotProbed("few-label accuracy needs two different labels for training")
    of_class = {name: np.flatnonzero(np.asarray(labels) == name) for name in classes}
    found = []
    for seed in range(budget.first_draw, budget.first_draw + budget.draws):
        generator = np.random.default_rng(seed)
        shuffled = {name: generator.permutation(rows) for name, rows in of_class.items()}
        for count in budget.per_class:
            rows = tuple(int(row) for name in classes for row in shuffled[name][:count])
            found.append(Draw(count, seed, rows))
    return sorted(found, key=lambda draw: (draw.per_class, draw.seed))


def tested_rows(rows: int, most: int) -> list[int]:
    """Which rows of the test part are tested: at most so many, the same for everybody. Raises NotProbed for none."""
    if not rows:
        raise NotProbed("few-label accuracy needs labelled samples for the test")
    return sorted(int(row) for row in np.random.default_rng(0).permutation(rows)[:most])


def few_label_accuracy(
    model: EncoderModel,
    train: tuple[Samples, Sequence[str]],
    test: tuple[Samples, Sequence[str]],
    budget: FewLabels = USUAL,
) -> Iterator[FewLabelScore]:
    """One score for each draw, as it is known; `model` is left as it is.

    The classifier is linear on the model's pooled output, standardised as the labelled rows were before the first step,
    and is trained together with the whole model. Raises NotProbed for a model without a pooled output, fewer than two
    labels, no test rows, and for a model that diverges at every rate.
    """
    (samples, labels), (test_samples, test_labels) = train, test
    classes = sorted(set(labels))
    number = {name: index for index, name in enumerate(classes)}
    chosen = tested_rows(len(test_samples), budget.test_rows)
    tested, truth = taken(test_samples, chosen), [number.get(test_labels[row], -1) for row in chosen]
    tuner = _Tuner(model, len(classes), budget)

    def labelled(draw: Draw) -> NDArray[np.int64]:
        return np.asarray([number[labels[row]] for row in draw.rows])

    def kept_back(draw: Draw, rate: float) -> tuple[float, float]:
        y, rows = labelled(draw), np.asarray(draw.rows)
        fit, back = _parted(y)
        return tuner.judged((taken(samples, rows[fit]), y[fit]), (taken(samples, rows[back]), y[back]), rate, draw.seed)

    def best(choosing: Sequence[Draw]) -> float:
        judged = {rate: np.mean([kept_back(draw, rate) for draw in choosing], axis=0).tolist() for rate in budget.rates}
        # the first of equals: the smaller rate, if they are given in that order
        return max(judged, key=lambda rate: judged[rate])

    every, chosen_for = draws(labels, budget), dict[int, float]()
    for draw in every:
        if budget.choosing_draws is None:
            rate = best([draw])
        elif draw.per_class not in chosen_for:
            same = [each for each in every if each.per_class == draw.per_class]
            rate = chosen_for[draw.per_class] = best(same[: budget.choosing_draws])
        else:
            rate = chosen_for[draw.per_class]
        y = labelled(draw)
        accuracy, _ = tuner.judged((taken(samples, draw.rows), y), (tested, np.asarray(truth)), rate, draw.seed)
        if accuracy < 0:
            raise NotProbed("the features are not finite: the model has diverged")
        yield FewLabelScore(draw.per_class, draw.seed, accuracy, len(draw.rows), len(chosen), rate)


def _parted(y: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Labelled rows to fit, and those kept back to choose by: every fourth of a class, and at least one of a class of
    two or more. Where every class has one row, the rows that are fitted choose."""
    fit: list[int] = []
    kept_back: list[int] = []
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        back = max(1, len(rows) // _KEPT_BACK) if len(rows) > 1 else 0
        kept_back += rows[:back].tolist()
        fit += rows[back:].tolist()
    return fit, kept_back or fit


class _Tuner:
    """One copy of a model, fine-tuned again and again from the same parameters."""

    def __init__(self, model: EncoderModel, classes: int, budget: FewLabels) -> None:
        self._model = copy.deepcopy(model)
        self._before = {name: value.clone() for name, value in self._values()}
        self._classes = classes
        self._budget = budget

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in chain(self._model.named_parameters(), self._model.named_buffers()):
            yield name, value.detach()

    def judged(
        self, fit: tuple[Samples, NDArray[np.int64]], judge: tuple[Samples, NDArray[np.int64]], rate: float, seed: int
    ) -> tuple[float, float]:
        """(accuracy, −cross entropy) on `judge` after fine-tuning on `fit`; (−1, −∞) if it diverged. A label of −1 in
        `judge` is one that nobody could know: it is missed."""
        head, mean, spread = self._tuned(*fit, rate, seed)
        self._model.eval()
        with torch.no_grad():
            logits = head((self._model.pooled(judge[0]) - mean) / spread).cpu()
        y = torch.from_numpy(judge[1])
        if not torch.isfinite(logits).all():
            return -1.0, -float("inf")
        known = y >= 0
        loss = float(cross_entropy(logits[known], y[known])) if known.any() else 0.0
        return float((logits.argmax(dim=1) == y).float().mean()), -loss

    def _tuned(
        self, samples: Samples, labels: NDArray[np.int64], rate: float, seed: int
    ) -> tuple[nn.Linear, Tensor, Tensor]:
        """The model fine-tuned in place; gives the classifier on top, and the mean and spread that it was given."""
        model, budget = self._model, self._budget
        with torch.no_grad():
            for name, value in self._values():
                value.copy_(self._before[name])
            model.eval()
            start = model.pooled(samples)
        mean, spread = start.mean(dim=0), start.std(dim=0, correction=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        head = nn.Linear(start.shape[1], self._classes).to(start.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": trained, "lr": rate, "peak": rate},
                {"params": list(head.parameters()), "lr": _HEAD_RATE, "peak": max(rate, _HEAD_RATE)},
            ],
            weight_decay=0.01,
            fused=True,
        )
        order = _batches(len(labels), budget.batch_size, budget.steps, np.random.default_rng(seed))
        model.train()
        with seeded(seed):  # what a model with dropout leaves out is the same for every row
            for step, rows in enumerate(order):
                for group in optimizer.param_groups:  # to nothing, linearly: Devlin et al. 2019
                    group["lr"] = group["peak"] * (1.0 - step / budget.steps)
                outputs = head((model.pooled(taken(samples, rows)) - mean) / spread)
                loss = cross_entropy(outputs, torch.from_numpy(labels[rows]).to(outputs.device))
                optimizer.zero_grad(set_to_none=True)
                model.zero_grad(set_to_none=True)
                model.backward(loss)
                nn.utils.clip_grad_norm_([*trained, *head.parameters()], 1.0)
                optimizer.step()
        return head, mean, spread


def _batches(rows: int, size: int, steps: int, generator: np.random.Generator) -> Iterator[list[int]]:
    """`steps` batches that go through all rows before one comes again; all of them each time where they are few."""
    queue: list[int] = []
    for _ in range(steps):
        if len(queue) < min(size, rows):
            queue += generator.permutation(rows).tolist()
        yield queue[:size]
        queue = queue[size:]
