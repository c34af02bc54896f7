"""How good an encoder is: probes on its frozen features. Its masked loss is that of `training.held_out`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from common.encoders.base import EncoderModel, Samples
from common.errors import NotProbed
from common.extras import need
from node_service.corpus.corpus import taken

# whoever evaluates finds both measures here
from node_service.training.held_out import masked_loss as masked_loss

#: Rows that a probe is fitted on and tested on at most: features are what costs, more for long texts.
TRAIN_ROWS = 2000
TEST_ROWS = 1000

#: Neighbours that vote in `knn_probe`.
_NEIGHBOURS = 10
_WHO = "probes need"


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies in [0, 1] on held-out samples, and the rows that they rest on."""

    linear: float
    knn: float
    majority: float  # of a classifier that always names the most frequent label: what any accuracy has to beat
    train_rows: int
    test_rows: int


def linear_probe(train_x: ArrayLike, train_y: Sequence[str], test_x: ArrayLike, test_y: Sequence[str]) -> float:
    """Test accuracy of multinomial logistic regression on standardised features (Alain & Bengio 2016).

    Features are (n, d); C = 1 is scikit-learn's default. Raises ValueError for fewer than two labels.
    """
    need("sklearn", _WHO)
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    train, test = _standardised(train_x, test_x)
    classifier = LogisticRegression(C=1.0, max_iter=300)
    with warnings.catch_warnings():
        # an accuracy, not the weights, is wanted: stopping early is no reason to alarm whoever reads the log
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train, np.asarray(train_y))
    return float(np.mean(classifier.predict(test) == np.asarray(test_y)))


def knn_probe(train_x: ArrayLike, train_y: Sequence[str], test_x: ArrayLike, test_y: Sequence[str]) -> float:
    """Test accuracy of a vote of the ten nearest rows by cosine of the standardised features, weighted by distance."""
    need("sklearn", _WHO)
    from sklearn.neighbors import KNeighborsClassifier

    train, test = _standardised(train_x, test_x)
    neighbours = min(_NEIGHBOURS, len(train))
    classifier = KNeighborsClassifier(neighbours, weights="distance", metric="cosine", algorithm="brute")
    classifier.fit(train, np.asarray(train_y))
    return float(np.mean(classifier.predict(test) == np.asarray(test_y)))


def probe(
    model: EncoderModel,
    train: tuple[Samples, Sequence[str]],
    test: tuple[Samples, Sequence[str]],
    seed: int = 0,
    train_rows: int = TRAIN_ROWS,
    test_rows: int = TEST_ROWS,
) -> ProbeResult:
    """Both probes of a model on labelled samples, on at most so many rows, drawn by `seed`: the same for every model.

    Raises NotProbed for an empty part, fewer than two labels among the rows drawn for training, and features that are
    not finite: the linear classifier is defined for none of these.
    """
    (train_samples, train_y), (test_samples, test_y) = _drawn(*train, train_rows, seed), _drawn(*test, test_rows, seed)
    if len(set(train_y)) < 2:
        raise NotProbed("a probe needs two different labels for training")
    train_x, test_x = model.features(train_samples), model.features(test_samples)
    if not (torch.isfinite(train_x).all() and torch.isfinite(test_x).all()):
        raise NotProbed("the features are not finite: the model has diverged")
    names, counts = np.unique(np.asarray(train_y), return_counts=True)
    return ProbeResult(
        linear=linear_probe(train_x, train_y, test_x, test_y),
        knn=knn_probe(train_x, train_y, test_x, test_y),
        majority=float(np.mean(np.asarray(test_y) == names[counts.argmax()])),
        train_rows=len(train_y),
        test_rows=len(test_y),
    )


def _drawn(samples: Samples, labels: Sequence[str], rows: int, seed: int) -> tuple[Samples, list[str]]:
    if not len(samples):
        raise NotProbed("a probe needs labelled samples for training and for the test")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[:rows])
    return taken(samples, chosen), [labels[i] for i in chosen]


def _standardised(train: ArrayLike, test: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both by the training rows' mean and spread; a feature that is constant there stays 0."""
    train, test = np.asarray(train, dtype=np.float64), np.asarray(test, dtype=np.float64)
    spread = train.std(axis=0)
    spread[spread == 0] = 1.0
    mean = train.mean(axis=0)
    return (train - mean) / spread, (test - mean) / spread
