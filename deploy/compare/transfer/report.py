"""The tables of transfer: what each encoder loses and scores in each column, and how the final versions compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.commands.display import number
from deploy.compare.transfer.figures import UNSEEN
from deploy.compare.transfer.plan import AT_ONCE, REFERENCE

#: (title, headings, rows), as the other tables of the report.
Table = tuple[str, list[str], list[list[str]]]
_NONE = "–"


def tables(found: Mapping[str, Any], unit: str) -> list[Table]:
    """All tables of the figures; see `figures.figures`."""
    made = []
    for mode, of_mode in found["losses"].items():
        made.append(_losses(found, mode, of_mode, unit))
        if found["judged"]:
            made.append(_differences(found, mode, of_mode))
    if found["few_labels"]:
        made.append(_few_labels(found))
    if found["probes"]["rows"]:
        made += [_probes(found, "linear", "linear probe"), _probes(found, "knn", "ten nearest neighbours")]
    return made


def _described(found: Mapping[str, Any], mode: str) -> str:
    if mode == AT_ONCE:
        return "at once"
    return f"after {found['steps']} steps, shared parameters {mode}"


def _heading(found: Mapping[str, Any], column: str) -> str:
    return column if found["columns"][column]["seen"] else f"{column} (unseen)"


def _losses(found: Mapping[str, Any], mode: str, of_mode: Mapping[str, Any], unit: str) -> Table:
    columns = [name for name, column in found["columns"].items() if column["loss"]]
    rows = []
    for row in found["rows"]:
        if by_column := of_mode["rows"].get(row):
            cells = [number(by_column[name]["loss"]["mean"], 3) if name in by_column else _NONE for name in columns]
            rows.append([row, *cells])
    title = f"transfer: loss {_described(found, mode)} ({unit}; less is better)"
    return title, ["encoder", *(_heading(found, name) for name in columns)], rows


def _differences(found: Mapping[str, Any], mode: str, of_mode: Mapping[str, Any]) -> Table:
    columns = [name for name, column in found["columns"].items() if column["loss"]]
    rows = []
    for judged, by_column in of_mode["differences"].items():
        names = [name for name in [*columns, UNSEEN] if name in by_column]
        if of_mode["best_single"]:
            cells = [_single(by_column[name]["best_single"], of_mode["best_single"].get(name)) for name in names]
            rows.append([f"{judged} − best single", *cells])
        for row in (found["start"], *_pooled(found)):
            cells = [_interval(by_column[name]["rows"].get(row)) for name in names]
            rows.append([f"{judged} − {row}", *cells])
    title = f"transfer: difference of the loss {_described(found, mode)} on the same seed, 95 % interval over seeds"
    last = [UNSEEN] if any(UNSEEN in by_column for by_column in of_mode["differences"].values()) else []
    return title, ["", *(_heading(found, name) for name in columns), *last], rows


def _pooled(found: Mapping[str, Any]) -> list[str]:
    return [row for row in found["rows"] if row.startswith("pooled")]


def _few_labels(found: Mapping[str, Any]) -> Table:
    """A line for each column and number of labels: every row's accuracy, then the differences of the judged."""
    encoders = [found["start"], "best single", *_pooled(found), *found["judged"]]
    others = [REFERENCE, "best single", found["start"], *_pooled(found)]
    lines = []
    for column, by_size in found["few_labels"].items():
        for size, of_size in by_size.items():
            single = of_size["best_single"]
            accuracies = [_accuracy(of_size["rows"], row, single) for row in [*encoders, REFERENCE]]
            differences = [
                _interval(of_size["differences"].get(judged, {}).get(single if other == "best single" else other))
                for judged in found["judged"]
                for other in others
            ]
            lines.append([f"{column}, {size} a class", *accuracies, *differences])
        if column in found["reference"]:
            reference = found["reference"][column]
            none = [_NONE] * len(found["judged"]) * len(others)
            lines.append([f"{column}, all", *[_NONE] * len(encoders), number(reference["mean"], 3), *none])
    headings = [*encoders, REFERENCE, *(f"{judged} − {other}" for judged in found["judged"] for other in others)]
    title = (
        "transfer: accuracy with few labels, mean over draws and seeds; differences on the same draws, 95 % interval"
    )
    return title, ["labels", *headings], lines


def _accuracy(rows: Mapping[str, Any], row: str, single: str | None) -> str:
    found = rows.get(single or "") if row == "best single" else rows.get(row)
    if found is None:
        return _NONE
    return number(found["mean"], 3) + (f" ({single})" if row == "best single" else "")


def _probes(found: Mapping[str, Any], which: str, title: str) -> Table:
    probed = found["probes"]["rows"]
    columns = [name for name in found["columns"] if any(name in by_column for by_column in probed.values())]
    rows = []
    for row, by_column in probed.items():
        cells = [number(by_column[name][which]["mean"], 3) if name in by_column else _NONE for name in columns]
        rows.append([row, *cells])
    first = next(iter(probed.values()))
    rows.append(
        ["always the most frequent label"]
        + [number(first[name]["majority"]["mean"], 3) if name in first else _NONE for name in columns]
    )
    if found["reference"]:
        means = [found["reference"].get(name) for name in columns]
        rows.append([f"{REFERENCE}, all labels", *(number(each["mean"], 3) if each else _NONE for each in means)])
    return f"transfer: accuracy of {title} on frozen features", ["encoder", *columns], rows


def _single(difference: Mapping[str, Any] | None, name: str | None) -> str:
    return _interval(difference) + (f" {name.removeprefix('alone ')}" if name and difference else "")


def _interval(difference: Mapping[str, Any] | None) -> str:
    if difference is None or difference["mean"] is None:
        return _NONE
    bounds: Sequence[float | None] = (difference["low"], difference["high"])
    if bounds[0] is None or bounds[1] is None:
        return f"{difference['mean']:+.3f}"
    return f"{difference['mean']:+.3f} ({bounds[0]:+.3f}, {bounds[1]:+.3f})"
