"""The reference that an encoder of texts has to beat: TF-IDF and logistic regression, on the same labelled rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from common.encoders.base import Samples
from common.errors import NotProbed
from common.extras import need
from node_service.corpus.corpus import taken
from node_service.evaluation.few_labels import USUAL, FewLabels, FewLabelScore, draws, tested_rows

#: The inverse strength of the penalty: what is tried, and what is taken where there are too few rows to choose.
_GRID = (1.0, 10.0, 100.0)
_PLAIN = 10.0
#: Parts of the cross-validation, and the rows that it looks at at most: many classes are slow.
_FOLDS = 4
CHOSEN_ON = 2000


def tfidf_accuracy(
    train: tuple[Samples, Sequence[str]], test: tuple[Samples, Sequence[str]], test_rows: int = FewLabels.test_rows
) -> FewLabelScore:
    """Accuracy with all labels, on the same rows as `few_label_accuracy` tests. `per_class` and `seed` are 0.

    Raises NotProbed for samples that are no texts or have no words, and for fewer than two labels.
    """
    chosen = tested_rows(len(test[0]), test_rows)
    _check(train)
    return _scored(train, _rows(test, chosen), 0, 0)


def tfidf_few_labels(
    train: tuple[Samples, Sequence[str]],
    test: tuple[Samples, Sequence[str]],
    budget: FewLabels = USUAL,
) -> Iterator[FewLabelScore]:
    """A score for each draw of `few_label_accuracy`, in its order; `rate` is the C of the regression. Raises NotProbed
    as `tfidf_accuracy` does."""
    tested = _rows(test, tested_rows(len(test[0]), budget.test_rows))
    _check(train)
    for draw in draws(train[1], budget):
        yield _scored(_rows(train, draw.rows), tested, draw.per_class, draw.seed)


def _check(train: tuple[Samples, Sequence[str]]) -> None:
    samples, labels = train
    if not all(isinstance(sample, str) for sample in samples):
        raise NotProbed("TF-IDF is for texts, and these samples are none")
    if len(set(labels)) < 2:
        raise NotProbed("TF-IDF needs two different labels for training")
    need("sklearn", "TF-IDF needs")


def _rows(part: tuple[Samples, Sequence[str]], rows: Sequence[int]) -> tuple[Samples, list[str]]:
    return taken(part[0], rows), [part[1][row] for row in rows]


def _scored(
    train: tuple[Samples, Sequence[str]], test: tuple[Samples, Sequence[str]], per_class: int, seed: int
) -> FewLabelScore:
    from sklearn.exceptions import ConvergenceWarning

    texts, labels = list(train[0]), np.asarray(train[1])
    with warnings.catch_warnings():
        # an accuracy, not the weights, is wanted
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            strength = _strength(texts, labels)
            fitted = _pipeline(strength).fit(texts, labels)
        except ValueError as error:
            if "empty vocabulary" not in str(error):
                raise
            raise NotProbed("no text has a word for TF-IDF") from None
    accuracy = float(np.mean(fitted.predict(list(test[0])) == np.asarray(test[1])))
    return FewLabelScore(per_class, seed, accuracy, len(labels), len(test[1]), strength)


def _pipeline(strength: float) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # the words' weights are fitted inside, so that a part that is kept back takes no part in them
    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=strength, max_iter=300)
    )


def _strength(texts: list[str], labels: Any) -> float:
    """C by cross-validation on the labelled rows, where every class has a row for each part."""
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    rows = np.random.default_rng(0).permutation(len(texts))[:CHOSEN_ON]
    texts, labels = [texts[row] for row in rows], labels[rows]
    _, counts = np.unique(labels, return_counts=True)
    if counts.min() < _FOLDS or len(counts) < 2:
        return _PLAIN
    search = GridSearchCV(
        _pipeline(_PLAIN),
        {"logisticregression__C": list(_GRID)},
        cv=StratifiedKFold(_FOLDS, shuffle=True, random_state=0),
        refit=False,
    )
    return float(search.fit(texts, labels).best_params_["logisticregression__C"])
