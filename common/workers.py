"""Threads that do not die in silence: the error that ends one is passed to whoever started it. And work that may be
done beside what goes on, by whoever has a thread for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import structlog

log = structlog.get_logger()


class Worker:
    """A daemon thread that runs `work` until it returns.

    If that raises, `failed` is called with the error, in this thread: it should hand it to one that can end the
    service.
    """

    def __init__(self, name: str, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        self.name = name
        self._work = work
        self._failed = failed
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Whether it ended within so many seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # whatever it is: a dead thread behind a live face would be worse
            log.error("a thread has failed, ending", thread=self.name, problem=f"{type(error).__name__}: {error}")
            self._failed(error)


class Beside(Protocol):
    """Does one piece of work after the other, while who handed it over goes on."""

    @property
    def busy(self) -> bool:
        """Whether one is being done."""

    def run(self, work: Callable[[], None]) -> None:
        """Begin this one, once the one before is done. Raises what `wait` raises."""

    def wait(self) -> None:
        """Wait until nothing is being done. Raises the error that ended one."""


class AtOnce:
    """The Beside where there is no other thread: `run` does the work."""

    busy = False

    def run(self, work: Callable[[], None]) -> None:
        work()

    def wait(self) -> None:
        """Nothing is ever being done."""


class OneBeside:
    """A thread for each piece of work, one at a time. Its error is passed on as a Worker's is, and raised by whoever
    waits for it."""

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self._name = name
        self._failed = failed
        self._worker: Worker | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._worker is not None and not self._worker.join(0.0)

    def run(self, work: Callable[[], None]) -> None:
        self.wait()
        self._worker = Worker(self._name, work, self._ended)

    def wait(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Wait, whatever became of it."""
        while self._worker is not None and not self._worker.join(1.0):
            pass

    def _ended(self, error: BaseException) -> None:
        self._error = error
        self._failed(error)
