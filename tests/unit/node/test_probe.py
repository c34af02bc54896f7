"""Probes against data whose answer is known, and the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.encoders.base import Batch, EncoderModel
from common.errors import NotProbed
from node_service.evaluation.probe import knn_probe, linear_probe, masked_loss, probe


class Toy(EncoderModel):
    """Samples are rows of numbers, features are those rows; the loss is the mean of what a batch drew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def encode(self, samples: Sequence[Any]) -> Any:
        return torch.tensor(samples)

    def batch(self, encoded: Any, size: int, generator: torch.Generator) -> Batch:
        return {"x": encoded[torch.randint(len(encoded), (size,), generator=generator)]}

    def loss(self, batch: Batch) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return (batch["x"] * self.weight).mean()

    def features(self, samples: Sequence[Any]) -> Tensor:
        self.seen.append(len(samples))
        return torch.tensor(np.asarray(samples), dtype=torch.float32)

    def export(self, directory: Path) -> None: ...


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def clusters(seed: int, rows: int) -> tuple[np.ndarray, list[str]]:
    """Two clusters apart in the second feature only; the first is large noise, the third constant."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, rows)
    x = np.stack([1e6 * random.normal(size=rows), labels * 4.0 + random.normal(size=rows), np.full(rows, 7.0)], axis=1)
    return x, ["left" if label else "right" for label in labels]


@pytest.mark.parametrize("measure", [linear_probe, knn_probe])
def test_probes_find_what_is_there_and_nothing_else(measure: Any) -> None:
    train, test = clusters(0, 400), clusters(1, 400)
    assert measure(*train, *test) > 0.9, "needs standardised features: the noise is a million times larger"
    shuffled = list(np.random.default_rng(2).permutation(train[1]))
    assert 0.35 < measure(train[0], shuffled, *test) < 0.65


def test_knn_with_fewer_rows_than_neighbours() -> None:
    assert knn_probe([[1.0, 0.0], [0.0, 1.0]], ["a", "b"], [[0.9, 0.1]], ["a"]) == 1.0


def test_probe_caps_rows_and_is_repeatable() -> None:
    model, train, test = Toy(), clusters(0, 500), clusters(1, 300)
    first = probe(model, train, test, train_rows=100, test_rows=50)
    assert model.seen == [100, 50]
    assert (first.train_rows, first.test_rows) == (100, 50)
    assert first == probe(model, train, test, train_rows=100, test_rows=50)
    assert first.linear > 0.9 and first.majority < 0.7


def test_probe_majority_is_of_the_training_labels() -> None:
    rows = [[0.0], [1.0], [0.1]]
    assert probe(Toy(), (rows, ["a", "b", "a"]), (rows, ["b", "b", "a"])).majority == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("error")
def test_probe_does_not_warn_when_it_stops_early() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(300, 60)), [str(i % 30) for i in range(300)]
    linear_probe(x, y, x, y)


def test_masked_loss_is_deterministic_and_restores_the_mode() -> None:
    model = Toy().train()
    encoded = torch.arange(1000.0)
    first = masked_loss(model, encoded, seed=1, batches=3, size=8)
    assert first == masked_loss(model, encoded, seed=1, batches=3, size=8)
    assert first != masked_loss(model, encoded, seed=2, batches=3, size=8)
    assert model.training
    whole = masked_loss(model, torch.full((10,), 2.5), batches=4)
    assert whole == 2.5, "a mean over batches, not a sum"


@pytest.mark.parametrize(
    ("train", "test", "why"),
    [
        (([[0.0], [1.0]], ["a", "a"]), ([[1.0]], ["a"]), "two different labels"),
        (([[0.0], [1.0]], ["a", "b"]), ([], []), "labelled samples"),
        (([[0.0], [float("nan")]], ["a", "b"]), ([[1.0]], ["a"]), "not finite"),
    ],
)
def test_f16_what_allows_no_probe_is_told_from_a_bug(train: Any, test: Any, why: str) -> None:
    with pytest.raises(NotProbed, match=why):
        probe(Toy(), train, test)
