"""Transfer after the comparison: first what every encoder loses in every column, then few labels for those chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploy.compare.plan import Point
from deploy.compare.transfer.bench import TransferBench
from deploy.compare.transfer.figures import choosing_mode, figures, validations
from deploy.compare.transfer.plan import TransferCell

#: Has the cells computed that are not there yet.
Do = Callable[[Sequence[TransferCell]], None]


def run_transfer(bench: TransferBench, choices: Mapping[tuple[str, str | None], Point], do: Do) -> dict[str, Any]:
    """All figures (see `figures`), the digests of the columns' samples and labels, and as `notes` what could not be
    measured and why, by cell. `choices` are the comparison's. Which single organisation is the best in a column is
    chosen by validation losses."""
    plan = bench.plan
    losses = plan.loss_cells(choices)
    do(losses)
    best = plan.best_single(validations(plan, _results(bench, losses), choosing_mode(plan)))
    labelled = plan.few_label_cells(choices, best)
    do(labelled)
    results = _results(bench, [*losses, *labelled])
    return {
        **figures(plan, results),
        "samples_sha256": {column.name: bench.content(column.name) for column in plan.columns},
        "notes": {cell.name: found["note"] for cell, found in results.items() if "note" in found},
    }


def _results(bench: TransferBench, cells: Sequence[TransferCell]) -> dict[TransferCell, dict[str, Any]]:
    found = {}
    for cell in cells:
        result = bench.done(cell)
        assert result is not None, f"{cell.name} was measured"
        found[cell] = result
    return found
