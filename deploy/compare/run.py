"""A comparison from the first cell to the figures: the grid, the choice, the other seeds, and last the test part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, TypeVar

from deploy.compare.bench import Bench
from deploy.compare.cells import CellResult, Cells
from deploy.compare.plan import FINISHED, Cell, Comparison, Point, columns
from deploy.compare.pool import Pool, Task
from deploy.compare.statistics import DocumentLosses, figures
from deploy.compare.transfer.bench import TransferBench
from deploy.compare.transfer.plan import TransferCell
from deploy.compare.transfer.run import run_transfer
from deploy.compare_settings import ALONE, POOLED, POOLED_ALL

AnyCell = TypeVar("AnyCell", Cell, TransferCell)

#: (arm, domain or None) → the point of the grid.
Choices = Mapping[tuple[str, str | None], Point]
#: Told of every cell that is done, and of those that were there already.
OnCell = Callable[[Task, Cell | TransferCell, bool], None]


@dataclass(frozen=True)
class Outcome:
    """The choices, and all figures, as plain values; see `statistics.figures`, and `transfer.figures.figures`."""

    choices: list[dict[str, Any]]
    columns: dict[str, Any]
    facts: dict[str, Any]
    transfer: dict[str, Any] | None = None


def run(bench: Bench, cells: Cells, pool: Pool, on_cell: OnCell = lambda task, cell, kept: None) -> Outcome:
    """Compute what is not there yet, and give the figures. Raises what a cell raises; what is done then stays."""
    plan = bench.comparison

    def do(
        task: Task, wanted: Sequence[AnyCell], is_done: Callable[[AnyCell], bool], cost: Callable[[AnyCell], Any]
    ) -> None:
        missing = []
        for cell in wanted:
            if is_done(cell):
                on_cell(task, cell, True)
            else:
                missing.append(cell)
        missing.sort(key=cost, reverse=True)  # the long ones first, so that no process waits for a last one
        for cell in pool.do(task, missing):
            on_cell(task, cell, False)

    def is_trained(cell: Cell) -> bool:
        return bench.trained(cell) is not None

    def is_tested(cell: Cell) -> bool:
        return cells.read_test(cell.name, bench.test_digest(cell)) is not None

    tuning = plan.tuning()
    do("train", tuning, is_trained, plan.cost)
    choices = plan.choose(lambda cell: headline(plan, cell, _result(bench, cell)))
    chosen = plan.chosen(choices)
    do("train", [cell for cell in chosen if cell not in set(tuning)], is_trained, plan.cost)
    # nothing is chosen from here on: now the test part may be read
    do("test", chosen, is_tested, plan.cost)
    transfer = None
    if plan.settings.transfer is not None:
        measures = TransferBench(bench)

        def transferred(wanted: Sequence[TransferCell]) -> None:
            do("transfer", wanted, lambda cell: measures.done(cell) is not None, measures.plan.order)

        transfer = run_transfer(measures, choices, transferred)
    return Outcome(
        _choices(bench, choices),
        figures(_measured(bench, cells, chosen), ALONE, (POOLED, POOLED_ALL)),
        {cell.name: _result(bench, cell).facts for cell in chosen},
        transfer,
    )


def headline(plan: Comparison, cell: Cell, result: CellResult) -> float:
    """What a cell is chosen by: its validation loss, mean over its domains; of a federated arm that after finishing."""
    return fmean(result.validation[FINISHED if cell.arm in plan.federated else cell.arm].values())


def _result(bench: Bench, cell: Cell) -> CellResult:
    found = bench.trained(cell)
    assert found is not None, f"{cell.name} was trained"
    return found


def _choices(bench: Bench, choices: Choices) -> list[dict[str, Any]]:
    """Each choice with the whole grid's validation losses, mean over the seeds of the grid."""
    plan = bench.comparison
    found = []
    for (arm, part), point in choices.items():
        grid = []
        for each in plan.points(arm):
            tried = [Cell(arm, part, seed, each) for seed in plan.tune_seeds]
            losses = [headline(plan, cell, _result(bench, cell)) for cell in tried]
            grid.append({**asdict(each), "validation": fmean(losses)})
        found.append({"arm": arm, "domain": part, **asdict(point), "grid": grid})
    return found


def _measured(bench: Bench, cells: Cells, chosen: Sequence[Cell]) -> dict[str, dict[str, list[DocumentLosses]]]:
    """By column and domain, the seeds in order."""
    plan = bench.comparison
    tests = {cell: cells.read_test(cell.name, bench.test_digest(cell)) for cell in chosen}
    found: dict[str, dict[str, list[DocumentLosses]]] = {
        column: {domain: [] for domain in plan.domains} for column in columns(plan)
    }
    for column, (arm, view) in columns(plan).items():
        for cell in chosen:  # of one arm and part, in the order of the seeds
            losses = tests[cell]
            if cell.arm == arm and losses is not None:
                for domain, each in losses[view].items():
                    found[column][domain].append(each)
    return found
