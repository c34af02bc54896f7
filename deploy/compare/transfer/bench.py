"""Where transfer cells are computed: a chosen encoder within fresh private parts, in one column, for one seed.

In a cell everything is chosen by the column's validation part, or by labelled rows of its training part, before its
test part is read.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Literal

import numpy as np
from torch import Tensor

from common.encoders import get_encoder_type
from common.encoders.base import EncoderModel, PrivateSpec, Samples
from common.errors import NotProbed
from deploy.compare.bench import Bench
from deploy.compare.cells import TRANSFERRED
from deploy.compare.held_out import bounded, fingerprint
from deploy.compare.training import Parts
from deploy.compare.transfer.plan import (
    AT_ONCE,
    FEW_LABELS,
    LOSS,
    TFIDF_ALL,
    TransferCell,
    TransferPlan,
    columns_of,
)
from node_service.corpus.corpus import Corpus, taken
from node_service.evaluation.few_labels import FewLabelScore, few_label_accuracy
from node_service.evaluation.probe import probe
from node_service.evaluation.tfidf import tfidf_accuracy, tfidf_few_labels
from node_service.evaluation.transfer import Column, Prepared, TransferBudget

#: Steps in which the rate rises, of a budget that is long enough for so many.
_WARM_UP = 20
#: Windows that go through a model at once.
_BATCH = 128
#: Labelled rows of a part: samples and their labels.
Labelled = tuple[Samples, list[str]]
Part = Literal["train", "test"]


def one_thread() -> AbstractContextManager[Any]:
    """Inside, scikit-learn's arithmetic has one thread, as torch has: cells are computed side by side, and small
    matrices cost eight times as much where the threads of each wait for one another."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(limits=1)
    return limits


class TransferBench:
    """Computes transfer cells beside the cells of `bench`, whose encoders they take."""

    def __init__(self, bench: Bench) -> None:
        self.plan = TransferPlan(bench.comparison, columns_of(bench.comparison, bench.corpora))
        self._bench = bench
        self._type = get_encoder_type(bench.comparison.encoder_type)
        # what a column has is the same for every row
        self._spec = cache(self._make_spec)
        self._column = cache(self._make_column)
        self._start = cache(self._make_start)
        self._places = cache(self._make_places)
        self.content = cache(self._make_content)
        self.labelled = cache(self._make_labelled)

    def do(self, cell: TransferCell) -> None:
        """Compute a cell and keep it."""
        started = time.monotonic()
        with one_thread():
            found = self._loss(cell) if cell.what == LOSS else self._scored(cell)
        found["seconds"] = round(time.monotonic() - started, 2)
        self._bench.cells.write_plain(TRANSFERRED, cell.name, self._digest(cell), found)

    def done(self, cell: TransferCell) -> dict[str, Any] | None:
        """What `do` kept; None if that is still to be done."""
        return self._bench.cells.read_plain(TRANSFERRED, cell.name, self._digest(cell))

    def untrained(self, column: str) -> EncoderModel:
        """A model of the column, to see what it costs. Reads training samples alone."""
        seed = self.plan.comparison.base_seed
        return self._type.build(
            self.plan.comparison.architecture, self._spec(column, self._drawn_by(column, seed)), seed
        )

    # --- what a cell measures --------------------------------------------------------------------------------------

    def _loss(self, cell: TransferCell) -> dict[str, Any]:
        column, losses = self.plan.column(cell.column), {}
        if column.loss:
            losses = self._losses(cell)
        found: dict[str, Any] = {"losses": losses, "probe": None}
        if column.labels and self.plan.row(cell.row).only is None:
            rows = self.plan.settings.probe_rows
            train, test = (self.labelled(cell.column, cell.seed, part) for part in ("train", "test"))
            model = self._model(cell)
            model.eval()
            try:
                result = probe(model, train, test, cell.seed, rows, max(1, rows // 2))
                found["probe"] = {
                    "linear": result.linear,
                    "knn": result.knn,
                    "majority": result.majority,
                    "train_rows": result.train_rows,
                    "test_rows": result.test_rows,
                }
            except NotProbed as reason:
                found["note"] = str(reason)
        return found

    def _losses(self, cell: TransferCell) -> dict[str, Any]:
        """By mode: the validation loss and the test loss. The test part is read when the last rate is chosen."""
        prepared, row = self._prepared(cell), self._row(cell)
        fitted = {mode: prepared.best(row, mode, cell.seed) for mode in self.plan.settings.modes}
        untouched = prepared.model(row, cell.seed)
        losses: dict[str, Any] = {AT_ONCE: {"rate": None, "validation": prepared.validated(untouched)}}
        losses |= {mode: {"rate": each.rate, "validation": each.validation} for mode, each in fitted.items()}
        losses[AT_ONCE]["loss"] = prepared.tested(untouched)
        for mode, each in fitted.items():
            losses[mode]["loss"] = prepared.tested(each.model)
        return losses

    def _scored(self, cell: TransferCell) -> dict[str, Any]:
        try:
            return {"scores": [score.plain() for score in self._scores(cell)]}
        except NotProbed as reason:
            return {"scores": [], "note": str(reason)}

    def _scores(self, cell: TransferCell) -> Iterator[FewLabelScore]:
        train, test = (self.labelled(cell.column, cell.seed, part) for part in ("train", "test"))
        budget = self.plan.few_labels(cell.seed)
        if cell.what == FEW_LABELS:
            for score in few_label_accuracy(self._model(cell), train, test, budget):
                self._bench.on_step()
                yield score
        elif cell.what == TFIDF_ALL:
            most = self.plan.settings.tfidf_rows
            yield tfidf_accuracy(_some(train, most), test, budget.test_rows)
        else:
            yield from tfidf_few_labels(train, test, budget)

    # --- rows and columns --------------------------------------------------------------------------------------------

    def _row(self, cell: TransferCell) -> dict[str, Tensor]:
        """The shared tensors of the cell's encoder."""
        source, row = cell.source, self.plan.row(cell.row)
        assert source is not None, "TF-IDF has no encoder"
        if source.point is None:
            return self._start(source.seed)
        result = self._bench.trained(source)
        assert result is not None, "it was chosen"
        state = self._bench.cells.states(source.name)[result.models[row.view][row.domain].key or ""]
        return {name: state[path] for name, path in self._places(row.domain).items()}

    def _make_start(self, seed: int) -> dict[str, Tensor]:
        """Version 0."""
        model = self._bench.model(self.plan.comparison.domains[0], seed)
        return {name: parameter.detach().clone() for name, parameter in model.shared_parameters().items()}

    def _make_places(self, domain: str) -> dict[str, str]:
        """By their names the shared parameters' places in a domain's model, as its stored states have them."""
        model = self._bench.model(domain, self.plan.comparison.base_seed)
        paths = {id(parameter): path for path, parameter in model.named_parameters()}
        return {name: paths[id(parameter)] for name, parameter in model.shared_parameters().items()}

    def _model(self, cell: TransferCell) -> EncoderModel:
        """The cell's encoder within the column's fresh private parts."""
        return self._prepared(cell).model(self._row(cell), cell.seed)

    def _prepared(self, cell: TransferCell) -> Prepared:
        """The cell's column, as all rows have it."""
        return self._column(cell.column, self._drawn_by(cell.column, cell.seed))

    def _drawn_by(self, column: str, seed: int) -> int:
        """The seed that draws a column's validation part: the same for all where the corpus has one of its own."""
        drawn = column in self._bench.corpora and not len(self._bench.corpora[column].validation)
        return seed if drawn else self.plan.comparison.base_seed

    def _parts(self, name: str, seed: int) -> Parts:
        if self.plan.column(name).loss:
            return self._bench.parts(name, seed)
        return Parts(self._whole(name, "train")[0], ())

    def _make_spec(self, name: str, seed: int) -> PrivateSpec:
        """Fitted to the training samples alone."""
        comparison = self.plan.comparison
        train = self._parts(name, seed).train
        return self._type.fit_private(train, comparison.architecture, self.plan.private(name), comparison.assets)

    def _make_column(self, name: str, seed: int) -> Prepared:
        comparison, settings, parts = self.plan.comparison, self.plan.settings, self._parts(name, seed)
        test: Samples = ()
        if self.plan.column(name).loss:
            test = bounded(self._bench.corpora[name].test, comparison.settings.test_documents)
        inner = comparison.update.inner.model_copy(
            update={"schedule": "cosine", "warmup_steps": min(_WARM_UP, settings.steps // 5)}
        )
        size = min(_BATCH, settings.windows // 2)
        budget = TransferBudget(
            settings.steps,
            settings.rates,
            inner,
            validation_batches=max(1, settings.windows // 2 // size),
            test_batches=max(1, settings.windows // size),
            batch_windows=size,
        )
        return Prepared(
            self._type,
            comparison.architecture,
            Column(name, parts.train, parts.validation, test, self._spec(name, seed)),
            budget,
            device=comparison.settings.device,
            precision=comparison.settings.precision,
            advance=self._bench.on_step,
        )

    def _make_labelled(self, name: str, seed: int, part: Part) -> Labelled:
        """The labelled rows of a part, of the classes that are told apart for a seed."""
        samples, labels = self._whole(name, part)
        wanted = set(self.plan.classes(name, seed))
        rows = [row for row, label in enumerate(labels) if label in wanted]
        return taken(samples, rows), [labels[row] for row in rows]

    def _whole(self, name: str, part: Part) -> Labelled:
        """All rows of a part; in the column of the pooled labels with the name of whose they are."""
        if self.plan.column(name).loss:
            return _part(self._bench.corpora[name], part)
        return _joined({each: _part(self._bench.corpora[each], part)[0] for each in self.plan.comparison.domains})

    def _digest(self, cell: TransferCell) -> str:
        return self.plan.digest(cell, self.content(cell.column))

    def _make_content(self, name: str) -> str:
        """The digest of a column's samples and labels."""
        names = [name] if self.plan.column(name).loss else list(self.plan.comparison.domains)
        digest = hashlib.sha256(" ".join(names).encode())
        for each in names:
            corpus: Corpus = self._bench.corpora[each]
            for part in (corpus.train, corpus.validation, corpus.test, corpus.train_labels, corpus.test_labels):
                digest.update(fingerprint(part if part is not None else ()).encode())
        return digest.hexdigest()


def _part(corpus: Corpus, part: Part) -> Labelled:
    if part == "train":
        return corpus.train, list(corpus.train_labels or ())
    return corpus.test, list(corpus.test_labels or ())


def _some(part: Labelled, most: int | None) -> Labelled:
    samples, labels = part
    if most is None or len(labels) <= most:
        return part
    rows = np.sort(np.random.default_rng(0).permutation(len(labels))[:most]).tolist()
    return taken(samples, rows), [labels[row] for row in rows]


def _joined(parts: Mapping[str, Samples]) -> Labelled:
    """All rows of several parts, each with its part's name for a label."""
    labels = [name for name, samples in parts.items() for _ in range(len(samples))]
    joined: Any = [sample for samples in parts.values() for sample in samples]
    if all(isinstance(samples, np.ndarray) for samples in parts.values()):
        joined = np.stack(joined)
    return joined, labels
