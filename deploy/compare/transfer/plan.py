"""What is measured of transfer: the encoders (rows), the domains (columns), the cells, and what each depends on. Pure.

A cell is one encoder in one column for one seed; its encoder comes from a cell of the comparison that was chosen.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from deploy.compare.plan import FINISHED, VERSION, Cell, Comparison, Point
from deploy.compare_settings import ALONE, POOLED, POOLED_ALL, RANDOM, FewLabelConfig, TransferConfig
from node_service.corpus.corpus import Corpus
from node_service.evaluation.few_labels import FewLabels

#: What a cell measures: loss and probes of an encoder, an encoder fine-tuned on few labels, and the reference without
#: an encoder, on the same few labels and on all.
What = Literal["loss", "few-labels", "tfidf", "tfidf-all"]
LOSS: What = "loss"
FEW_LABELS: What = "few-labels"
TFIDF: What = "tfidf"
TFIDF_ALL: What = "tfidf-all"

#: The row that has no encoder.
REFERENCE = "TF-IDF"
#: The loss before the first step.
AT_ONCE = "at once"

#: Goes into every digest: another number means that a cell is computed in another way.
_SCHEMA = 1


@dataclass(frozen=True, order=True)
class Row:
    """An encoder: the shared parameters of `view` in the cells of `arm` (`part` of it), as `domain` has them. `only`:
    the one column that it is for."""

    name: str
    arm: str
    part: str | None
    view: str
    domain: str
    only: str | None = None


@dataclass(frozen=True)
class Column:
    """A domain: whether a node holds it, whether a loss is measured in it, and the labels that both of its parts have,
    none where fewer than two. Its training part has `rows`, of `length` characters in the mean (0: they are no texts).
    """

    name: str
    seen: bool
    loss: bool
    labels: tuple[str, ...]
    rows: int
    length: float


@dataclass(frozen=True, order=True)
class TransferCell:
    """`source` is the cell that the row's encoder comes from, None where there is no encoder."""

    what: What
    row: str
    column: str
    seed: int
    source: Cell | None

    @property
    def name(self) -> str:
        """A file's name: no two cells have the same. No name of a row or a column has a dot in it."""
        return ".".join([self.what, self.row.replace(", ", ".").replace(" ", "."), self.column, f"seed{self.seed}"])


def columns_of(comparison: Comparison, corpora: Mapping[str, Corpus]) -> tuple[Column, ...]:
    """The nodes' domains, those that no node holds, and the pooled labels."""
    settings = comparison.settings.transfer or TransferConfig()
    found = []
    for name in (*comparison.domains, *settings.unseen):
        corpus = corpora[name]
        lengths = [len(sample) for sample in corpus.train if isinstance(sample, str)]
        mean = fmean(lengths) if lengths else 0.0
        found.append(Column(name, name in comparison.domains, True, _labels(corpus), len(corpus.train), mean))
    if settings.pooled_labels:
        rows = sum(column.rows for column in found if column.seen)
        length = sum(column.rows * column.length for column in found if column.seen) / rows
        found.append(Column(settings.pooled_labels, True, False, comparison.domains, rows, length))
    return tuple(found)


def _labels(corpus: Corpus) -> tuple[str, ...]:
    common = tuple(sorted(set(corpus.train_labels or ()) & set(corpus.test_labels or ())))
    return common if len(common) > 1 else ()


@dataclass(frozen=True)
class TransferPlan:
    """Everything that a transfer cell depends on, but for the samples."""

    comparison: Comparison
    columns: tuple[Column, ...]

    @property
    def settings(self) -> TransferConfig:
        return self.comparison.settings.transfer or TransferConfig()

    @property
    def rows(self) -> list[Row]:
        """The start, each organisation alone, what is pooled, each federated arm's final version, and in its own domain
        each finished copy."""
        plan = self.comparison
        domains, first = plan.domains, plan.domains[0]
        found = [Row(self.start, RANDOM, None, RANDOM, first)]
        found += [Row(alone(name), ALONE, name, ALONE, name) for name in domains if ALONE in plan.arms]
        found += [Row(arm, arm, None, arm, first) for arm in (POOLED, POOLED_ALL) if arm in plan.arms]
        found += [Row(version(arm), arm, None, VERSION, first) for arm in plan.federated]
        found += [
            Row(f"{arm}, finished {name}", arm, None, FINISHED, name, only=name)
            for arm in plan.federated
            for name in domains
        ]
        return found

    @property
    def start(self) -> str:
        """The row of version 0."""
        return "public start" if self.comparison.initial[0] == "continue" else RANDOM

    @property
    def alone(self) -> list[str]:
        return [row.name for row in self.rows if row.arm == ALONE]

    @property
    def versions(self) -> list[str]:
        """The rows that are judged: the final versions."""
        return [version(arm) for arm in self.comparison.federated]

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    # --- cells -----------------------------------------------------------------------------------------------------

    def loss_cells(self, choices: Mapping[tuple[str, str | None], Point]) -> list[TransferCell]:
        """Losses and probes: every row in every column, for each seed."""
        return [
            self._cell(LOSS, row, column.name, seed, choices)
            for column in self.columns
            for row in self.rows
            if row.only in ((None, column.name) if column.loss else (None,))
            for seed in self.comparison.seeds
        ]

    def few_label_cells(
        self, choices: Mapping[tuple[str, str | None], Point], best: Mapping[str, str]
    ) -> list[TransferCell]:
        """Few labels where they are wanted, and TF-IDF on the same ones. `best` names the single organisation that is
        best in a column; see `best_single`. TF-IDF on all labels comes once, or for each seed where other classes are
        drawn."""
        few = self.settings.few_labels
        found: list[TransferCell] = []
        for column in self.columns:
            if not column.labels:
                continue
            first = self.classes(column.name, self.comparison.seeds[0])
            for seed in self.comparison.seeds:
                if self.is_text and (seed == self.comparison.seeds[0] or self.classes(column.name, seed) != first):
                    found.append(TransferCell(TFIDF_ALL, REFERENCE, column.name, seed, None))
                if few is None or (few.columns == "unseen" and column.seen and column.loss):
                    continue
                if self.is_text:
                    found.append(TransferCell(TFIDF, REFERENCE, column.name, seed, None))
                found += [
                    self._cell(FEW_LABELS, row, column.name, seed, choices)
                    for row in self.rows
                    if row.only is None and (few.rows == "all" or row.arm != ALONE or row.name == best.get(column.name))
                ]
        return found

    def order(self, cell: TransferCell) -> tuple[int, float, str]:
        """What takes longer comes later in this order; cells of one column are together."""
        column = self.column(cell.column)
        return (LOSS, TFIDF, FEW_LABELS, TFIDF_ALL).index(cell.what), column.length, column.name

    @property
    def is_text(self) -> bool:
        return self.comparison.encoder_type == "text"

    def _cell(
        self, what: What, row: Row, column: str, seed: int, choices: Mapping[tuple[str, str | None], Point]
    ) -> TransferCell:
        point = choices.get((row.arm, row.part))
        return TransferCell(what, row.name, column, seed, Cell(row.arm, row.part, seed, point))

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    # --- what a cell depends on --------------------------------------------------------------------------------------

    def classes(self, column: str, seed: int) -> tuple[str, ...]:
        """The labels that are told apart for a seed: all, or so many of them, drawn by it."""
        labels, most = self.column(column).labels, self.settings.most_classes(column)
        if most is None or len(labels) <= most:
            return labels
        drawn = np.random.default_rng([seed, 2]).permutation(len(labels))[:most]
        return tuple(sorted(labels[index] for index in drawn))

    def few_labels(self, seed: int) -> FewLabels:
        """The budget of a seed, whose draws are no other seed's."""
        few, seeds = self.settings.few_labels or FewLabelConfig(), self.comparison.seeds
        each = math.ceil(few.draws / len(seeds))
        return FewLabels(
            few.per_class,
            each,
            few.test_rows,
            few.steps,
            few.batch_size,
            few.rates,
            first_draw=seeds.index(seed) * each,
            choosing_draws=1,
        )

    def digest(self, cell: TransferCell, content: str) -> str:
        """Of everything that a cell's result depends on; `content` is the digest of the column's samples and labels."""
        plan, settings = self.comparison, self.settings
        start = Cell(RANDOM, None, cell.seed, None)  # architecture, assets, where version 0 comes from
        on: dict[str, Any] = {
            "schema": _SCHEMA,
            "cell": [cell.what, cell.row, cell.column, cell.seed],
            "source": None if cell.source is None else [plan.digest(start), plan.digest(cell.source)],
            "content": content,
            "private": self.private(cell.column),
            "validation": plan.settings.validation,
            "classes": self.classes(cell.column, cell.seed),
        }
        if cell.what == LOSS:
            inner = plan.update.inner.model_dump(mode="json")
            on["budget"] = [settings.steps, settings.rates, settings.modes, settings.windows, inner]
            on["probe"] = settings.probe_rows
            on["tested"] = plan.settings.test_documents
        elif cell.what == TFIDF_ALL:
            on["rows"] = [settings.tfidf_rows, self.few_labels(cell.seed).test_rows]
        else:
            on["few_labels"] = asdict(self.few_labels(cell.seed))
        return hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()

    def private(self, column: str) -> dict[str, Any]:
        """The settings of a column's private parts. Where nodes name a base of the encoder, a column of nobody's takes
        the one of the first of them."""
        first = self.comparison.private[self.comparison.domains[0]]
        named = {"base": first["base"]} if "base" in first else {}
        return {**self.comparison.private.get(column, named), **self.settings.private}

    def best_single(self, validation: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
        """By column the single organisation of the least validation loss, mean over the seeds; the first of equals.

        `validation` is by row, by column, then by seed. In the column of the pooled labels, where no loss is measured,
        it is the one that is best in the mean of all nodes' domains. Knows nothing of the test part.
        """
        if not self.alone:
            return {}

        def mean(row: str, columns: Sequence[str]) -> float:
            found = fmean(fmean(validation[row][column]) for column in columns)
            return found if math.isfinite(found) else math.inf

        found = {}
        for column in self.columns:
            judged = [column.name] if column.loss else list(self.comparison.domains)
            found[column.name] = min(self.alone, key=lambda row: mean(row, judged))  # called at once
        return found


def alone(domain: str) -> str:
    """The row of an organisation's own encoder."""
    return f"{ALONE} {domain}"


def version(arm: str) -> str:
    """The row of a federated arm's final version, as its master exports it."""
    return f"{arm} version"
