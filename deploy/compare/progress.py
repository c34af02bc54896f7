"""What is said while a comparison runs: its cost before it begins, then each cell, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from deploy.compare.bench import Bench
from deploy.compare.cost import Cost, measured, test_seconds, train_seconds, words
from deploy.compare.plan import Cell
from deploy.compare.pool import Task
from deploy.compare.transfer.bench import TransferBench
from deploy.compare.transfer.cost import TransferCost
from deploy.compare.transfer.cost import measured as measured_transfer
from deploy.compare.transfer.plan import TransferCell
from node_service.corpus.corpus import Corpus


class Narrator:
    """Says it on stderr: a bar on a terminal, a line for each cell elsewhere. `done` counts whole cells."""

    def __init__(self, bench: Bench, jobs: int, corpora: Mapping[str, Corpus]) -> None:
        most = bench.comparison.settings.test_documents
        sizes = [len(corpora[name].test) for name in bench.comparison.domains]
        self.done = 0
        self._documents = sum(size if most is None else min(size, most) for size in sizes)
        self._bench = bench
        self._jobs = jobs
        self._cost: Cost | None = None
        self._transfer: TransferCost | None = None
        self._begun = time.monotonic()
        #: Work in seconds of one process, as it was estimated: all, done now, and done by an earlier run.
        self._all = self._now = self._before = 0.0
        self._screen = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._screen,
            disable=not self._screen.is_terminal,
        )
        self._task = self._bar.add_task("comparing", total=1.0, left="")

    def __enter__(self) -> Narrator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def announce(self) -> None:
        """Measure a few steps, and say how many cells there are, and about how long they will take."""
        plan, bench = self._bench.comparison, self._bench
        self._cost = measured(bench)
        # which points are chosen is not known yet; their cells cost alike
        points = {(arm, part): plan.points(arm)[0] for arm in plan.arms if plan.points(arm) for part in plan.parts(arm)}
        tuning = plan.tuning()
        cells = list(dict.fromkeys([*tuning, *plan.chosen(points)]))
        steps = sum(map(plan.cost, cells))
        self._all = train_seconds(bench, cells, self._cost) + test_seconds(bench, self._documents, self._cost)
        transfer = ""
        if plan.settings.transfer is not None:
            measures = TransferBench(bench)
            self._transfer = measured_transfer(measures, self._cost)
            # which single organisation is the best is not known yet
            best = {column.name: measures.plan.alone[0] for column in measures.plan.columns if measures.plan.alone}
            elsewhere = [*measures.plan.loss_cells(points), *measures.plan.few_label_cells(points, best)]
            seconds = sum(map(self._transfer.seconds, elsewhere))
            self._all += seconds
            transfer = f", {len(elsewhere):,} of transfer (about {seconds / self._all:.0%} of the time)"
        self._screen.print(
            f"{len(cells):,} cells ({len(tuning):,} for the choice), {steps:,} training steps{transfer}; "
            f"{1000 * self._cost.step:.0f} ms a step here: about {words(self._all / self._jobs)} with "
            f"{self._jobs} {'process' if self._jobs == 1 else 'processes'}",
            highlight=False,
            soft_wrap=True,
        )
        self._begun = time.monotonic()
        self._bar.start()

    def on_cell(self, task: Task, cell: Cell | TransferCell, kept: bool) -> None:
        """A cell is done, or was there already (`kept`)."""
        assert self._cost is not None, "announced first"
        if isinstance(cell, TransferCell):
            assert self._transfer is not None, "announced too"
            work = self._transfer.seconds(cell)
            self.done += 1
        elif task == "train":
            work = train_seconds(self._bench, [cell], self._cost)
            self.done += 1
        else:
            plan = self._bench.comparison
            tested = sum(len(plan.parts(arm)) for arm in plan.arms) * len(plan.seeds)
            work = test_seconds(self._bench, self._documents, self._cost) / tested
        if kept:
            self._before += work
        else:
            self._now += work
        left = self._left()
        what = f"{'trained' if task == 'train' else 'measured'} {cell.name}"
        self._bar.update(self._task, completed=(self._now + self._before) / self._all, description=what, left=left)
        if not kept and not self._screen.is_terminal:
            self._screen.print(f"{what}; {left}", highlight=False, soft_wrap=True)

    def _left(self) -> str:
        """By how long the work of this run took so far."""
        passed = time.monotonic() - self._begun
        missing = max(0.0, self._all - self._now - self._before)
        seconds = missing * passed / self._now if self._now else missing / self._jobs
        return f"about {words(seconds)} left"
