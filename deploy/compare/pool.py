"""Cells side by side: a pool of processes, each with a bench and one torch thread; or this process alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from common.errors import SharedEncoderError
from deploy.compare.bench import Bench
from deploy.compare.cells import Cells
from deploy.compare.plan import Cell, Comparison
from deploy.compare.transfer.bench import TransferBench
from deploy.compare.transfer.plan import TransferCell
from node_service.corpus.corpus import Corpus

Task = Literal["train", "test", "transfer"]
AnyCell = TypeVar("AnyCell", Cell, TransferCell)


class Pool(Protocol):
    """Does tasks."""

    def do(self, task: Task, cells: Sequence[AnyCell]) -> Iterator[AnyCell]:
        """Give each cell once it is done, in whatever order. Raises what a cell raises."""


class _Benches:
    """Both benches of a process: what they have prepared serves the next cell."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._transfer = TransferBench(bench)

    def do(self, task: Task, cell: Cell | TransferCell) -> None:
        if isinstance(cell, TransferCell):
            self._transfer.do(cell)
        elif task == "train":
            self._bench.train(cell)
        else:
            self._bench.test(cell)


class OneProcess:
    """A pool that is a bench."""

    def __init__(self, bench: Bench) -> None:
        self._benches = _Benches(bench)

    def do(self, task: Task, cells: Sequence[AnyCell]) -> Iterator[AnyCell]:
        for cell in cells:
            self._benches.do(task, cell)
            yield cell


class ManyProcesses:
    """A pool of worker processes."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def do(self, task: Task, cells: Sequence[AnyCell]) -> Iterator[AnyCell]:
        waiting = {self._executor.submit(_work, task, cell): cell for cell in cells}
        try:
            for future in as_completed(waiting):
                future.result()
                yield waiting[future]
        except BrokenProcessPool:
            raise SharedEncoderError(
                "a process of the comparison died, perhaps for want of memory; go on with --resume and fewer --jobs"
            ) from None


class Cancelled(Exception):
    """The comparison was stopped in the middle of a cell."""


@contextmanager
def pool(jobs: int, bench: Bench, corpora: Mapping[str, Corpus], directory: Path) -> Iterator[Pool]:
    """A pool of `jobs` processes, which end with the block: after an exception within a step of training, and what they
    were at is lost. With one job it is `bench` in this process."""
    if jobs == 1:
        yield OneProcess(bench)
        return
    # spawned, not forked: torch's and the console's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    executor = ProcessPoolExecutor(
        jobs, context, initializer=_begin, initargs=(bench.comparison, corpora, directory, stop, os.getpid())
    )
    try:
        yield ManyProcesses(executor)
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)


def kill_workers() -> None:
    """End the processes of a pool at once: what they were at is lost, and what is whole stays."""
    for process in multiprocessing.active_children():
        process.kill()


# --- in a worker -----------------------------------------------------------------------------------------------------

_benches: _Benches | None = None


def _begin(comparison: Comparison, corpora: Mapping[str, Corpus], directory: Path, stop: Event, parent: int) -> None:
    """Ctrl-C reaches every process of a terminal: only the one that was started by hand answers it."""
    global _benches
    import torch

    from deploy.logging import configure_logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(level="error")
    torch.set_num_threads(1)

    def on_step() -> None:
        if os.getppid() != parent:
            os._exit(1)  # killed: nobody waits for this cell
        if stop.is_set():
            raise Cancelled

    _benches = _Benches(Bench(comparison, corpora, Cells(directory), on_step))


def _work(task: Task, cell: Cell | TransferCell) -> None:
    assert _benches is not None
    _benches.do(task, cell)
