"""What the transfer cells say: losses, paired differences by seed, few labels paired draw by draw. Pure functions.

A difference of losses is judged row − other row on the same seed, so that less than 0 is better; one of accuracies
likewise, where more than 0 is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from deploy.compare.statistics import Interval, t_interval
from deploy.compare.transfer.plan import AT_ONCE, LOSS, TFIDF_ALL, TransferCell, TransferPlan

#: What a cell gave, as plain values.
Results = Mapping[TransferCell, Mapping[str, Any]]
#: Accuracy by (labels a class, seed of the comparison, draw).
Scores = Mapping[tuple[int, int, int], float]
#: The columns that no node holds, taken together.
UNSEEN = "mean of the unseen"


def validations(plan: TransferPlan, results: Results, mode: str) -> dict[str, dict[str, list[float]]]:
    """By row, by column, the seeds in order: what the best single organisation is chosen by."""
    return _losses(plan, results, mode, "validation")


def choosing_mode(plan: TransferPlan) -> str:
    """By whose validation losses the best single organisation is chosen where no mode is compared: the last one."""
    return plan.settings.modes[-1] if plan.settings.modes else AT_ONCE


def figures(plan: TransferPlan, results: Results) -> dict[str, Any]:
    """All figures as plain values.

    `losses` by mode: by row and column loss and losses by seed; by column the best single organisation (`best_single`);
    by judged row and column the differences to each other row, and to the best single organisation; the same for the
    mean of the unseen columns. `probes` by row and column, with the differences of the judged rows. `few_labels` by
    column and labels a class: by row accuracy, scores by seed and draw; differences of each judged row. `reference`:
    TF-IDF with all labels, by column.
    """
    modes = (AT_ONCE, *plan.settings.modes)
    single = plan.best_single(validations(plan, results, choosing_mode(plan)))
    return {
        "rows": [row.name for row in plan.rows],
        "judged": plan.versions,
        "start": plan.start,
        "columns": {
            column.name: {"seen": column.seen, "loss": column.loss, "labels": len(column.labels)}
            for column in plan.columns
        },
        "steps": plan.settings.steps,
        "losses": {mode: _of_mode(plan, results, mode) for mode in modes},
        "best_single": single,
        "probes": _probes(plan, results),
        "few_labels": _few_labels(plan, results, single),
        "reference": _reference(plan, results),
    }


# --- losses ----------------------------------------------------------------------------------------------------------


def _losses(plan: TransferPlan, results: Results, mode: str, part: str) -> dict[str, dict[str, list[float]]]:
    """By row, by column, the seeds in order."""
    by_place = {
        (cell.row, cell.column, cell.seed): found["losses"][mode][part]
        for cell, found in results.items()
        if cell.what == LOSS and found["losses"]
    }
    found: dict[str, dict[str, list[float]]] = {}
    for (row, column, _), value in sorted(by_place.items(), key=lambda each: each[0][2]):
        found.setdefault(row, {}).setdefault(column, []).append(math.nan if value is None else value)
    return found


def _of_mode(plan: TransferPlan, results: Results, mode: str) -> dict[str, Any]:
    losses = _losses(plan, results, mode, "loss")
    best = plan.best_single(validations(plan, results, mode))
    columns = [column.name for column in plan.columns if column.loss]
    unseen = [column.name for column in plan.columns if column.loss and not column.seen]
    table = {
        row: {column: {"loss": asdict(t_interval(seeds)), "by_seed": seeds} for column, seeds in by_column.items()}
        for row, by_column in losses.items()
    }
    differences: dict[str, dict[str, Any]] = {}
    for judged in plan.versions:
        own = losses[judged]
        differences[judged] = {column: _to_others(own[column], losses, column, best) for column in columns}
        if unseen:
            differences[judged][UNSEEN] = _mean_of(differences[judged], unseen)
    single = {column: name for column, name in best.items() if column in columns}
    return {"rows": table, "best_single": single, "differences": differences}


def _to_others(
    own: Sequence[float], losses: Mapping[str, Mapping[str, Sequence[float]]], column: str, best: Mapping[str, str]
) -> dict[str, Any]:
    """Differences to each other row of the column, and again to the best single organisation."""
    found = {row: paired(own, by_column[column]) for row, by_column in losses.items() if column in by_column}
    return {"rows": found, "best_single": found.get(best.get(column, ""))}


def _mean_of(columns: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The differences, mean over columns on each seed, to the rows that are in all of them."""
    rows = [row for row in columns[names[0]]["rows"] if all(row in columns[name]["rows"] for name in names)]
    singles = [columns[name]["best_single"] for name in names]
    return {
        "rows": {row: _mean_difference([columns[name]["rows"][row] for name in names]) for row in rows},
        "best_single": _mean_difference(singles) if all(singles) else None,
    }


def _mean_difference(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return _difference([fmean(seed) for seed in zip(*(each["by_seed"] for each in found), strict=True)])


def paired(own: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """The difference on the same seeds, with a t interval over them. Raises ValueError for other seeds."""
    return _difference([a - b for a, b in zip(own, other, strict=True)])


def _difference(by_seed: Sequence[float]) -> dict[str, Any]:
    interval = t_interval(by_seed)
    return {**asdict(interval), "by_seed": list(by_seed), "verdict": interval.verdict}


# --- labels ----------------------------------------------------------------------------------------------------------


def _probes(plan: TransferPlan, results: Results) -> dict[str, Any]:
    """By row and column; without a column where a model could not be probed for some seed."""
    found: dict[str, dict[str, Any]] = {}
    for row in plan.rows:
        for column in plan.columns:
            cells = sorted(
                (cell for cell in results if (cell.what, cell.row, cell.column) == (LOSS, row.name, column.name)),
                key=lambda cell: cell.seed,
            )
            probes = [results[cell]["probe"] for cell in cells]
            if probes and all(probes):
                of = {name: [each[name] for each in probes] for name in ("linear", "knn", "majority")}
                found.setdefault(row.name, {})[column.name] = {
                    **{name: asdict(t_interval(values)) for name, values in of.items()},
                    "by_seed": of,
                    "train_rows": probes[0]["train_rows"],
                    "test_rows": probes[0]["test_rows"],
                }
    return {"rows": found, "differences": {judged: _probed(found, judged) for judged in plan.versions}}


def _probed(rows: Mapping[str, Mapping[str, Any]], judged: str) -> dict[str, Any]:
    """The differences of a judged row to each other, by column and probe, on the same seeds."""
    return {
        column: {
            which: {
                row: _gained(paired(own["by_seed"][which], by_column[column]["by_seed"][which]))
                for row, by_column in rows.items()
                if column in by_column
            }
            for which in ("linear", "knn")
        }
        for column, own in rows.get(judged, {}).items()
    }


def _gained(difference: dict[str, Any]) -> dict[str, Any]:
    """A difference of accuracies, of which more is better."""
    turned = {"better": "worse", "worse": "better"}
    return {**difference, "verdict": turned.get(difference["verdict"], difference["verdict"])}


def _few_labels(plan: TransferPlan, results: Results, single: Mapping[str, str]) -> dict[str, Any]:
    """By column, by labels a class (a string, as JSON has it)."""
    found: dict[str, Any] = {}
    for column in plan.columns:
        by_row: dict[str, dict[tuple[int, int, int], float]] = {}
        for cell, result in results.items():
            if cell.column == column.name and cell.what not in (LOSS, TFIDF_ALL):
                own = by_row.setdefault(cell.row, {})
                for score in result["scores"]:
                    own[score["per_class"], cell.seed, score["seed"]] = score["accuracy"]
        # one that diverged for some seed has not the draws of the others
        whole = max((len(scores) for scores in by_row.values()), default=0)
        complete = {row: scores for row, scores in by_row.items() if scores and len(scores) == whole}
        for per_class in sorted({key[0] for scores in complete.values() for key in scores}):
            of = {row: _only(scores, per_class) for row, scores in complete.items()}
            found.setdefault(column.name, {})[str(per_class)] = {
                "rows": {row: accuracy(scores) for row, scores in of.items()},
                "differences": {
                    judged: {row: accuracy(paired_draws(of[judged], scores)) for row, scores in of.items()}
                    for judged in plan.versions
                    if judged in of
                },
                "best_single": single.get(column.name),
            }
    return found


def _only(scores: Scores, per_class: int) -> dict[tuple[int, int, int], float]:
    return {key: value for key, value in scores.items() if key[0] == per_class}


def paired_draws(own: Scores, other: Scores) -> dict[tuple[int, int, int], float]:
    """The differences draw by draw. Raises ValueError for other draws: then there is nothing to pair."""
    if own.keys() != other.keys():
        raise ValueError("these two were not fine-tuned on the same draws")
    return {key: value - other[key] for key, value in own.items()}


def accuracy(scores: Scores) -> dict[str, Any]:
    """The mean of what was scored with an interval over seeds, of the means over their draws; over the draws where
    there is one seed."""
    by_seed: dict[int, list[float]] = {}
    for (_, seed, _), value in sorted(scores.items()):
        by_seed.setdefault(seed, []).append(value)
    means = [fmean(values) for values in by_seed.values()]
    interval: Interval = t_interval(means if len(means) > 1 else next(iter(by_seed.values())))
    return {
        **asdict(interval),
        "over": "seeds" if len(means) > 1 else "draws",
        "by_seed": means,
        "draws": list(by_seed.values()),
    }


def _reference(plan: TransferPlan, results: Results) -> dict[str, Any]:
    """TF-IDF with all labels: where the classes are the same for every seed, measured once."""
    found = {}
    for column in plan.columns:
        cells: Iterable[TransferCell] = sorted(
            (cell for cell in results if cell.what == TFIDF_ALL and cell.column == column.name),
            key=lambda cell: cell.seed,
        )
        scores = [results[cell]["scores"][0] for cell in cells if results[cell]["scores"]]
        if scores:
            accuracies = [score["accuracy"] for score in scores]
            found[column.name] = {
                **asdict(t_interval(accuracies)),
                "by_seed": accuracies,
                "rows": scores[0]["rows"],
                "test_rows": scores[0]["test_rows"],
            }
    return found
