"""Threads that do not die in silence: the error that ends one is passed to whoever started it."""

from __future__ import annotations

import threading
from collections.abc import Callable

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
