"""Encoders are made beside the thread that decides: that takes seconds, and minutes where one is large. Meanwhile
updates of others are answered."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from functools import partial

import structlog

from master_service.arithmetic.arithmetic import Outcome
from master_service.decisions.effects import Generate
from master_service.decisions.records import GenerationFailed
from master_service.history.state_directory import Background
from master_service.log.deadly import Attempts

log = structlog.get_logger()


class Making:
    """One encoder after the other, in the order in which they were begun.

    Nothing that is asked for may kill the master again and again: what it died of twice, by `attempts`, is not made.
    """

    def __init__(self, make: Callable[[Generate], list[Outcome]], attempts: Attempts, background: Background) -> None:
        self._make = make
        self._attempts = attempts
        self._background = background
        self._waiting: deque[Generate] = deque()
        self._under_way = False
        self._made: queue.SimpleQueue[list[Outcome]] = queue.SimpleQueue()

    def begin(self, effect: Generate) -> None:
        """Make it when those before it are made."""
        self._waiting.append(effect)
        self._next()

    def made(self) -> list[Outcome]:
        """What has come of those that are done since; each is given once."""
        found: list[Outcome] = []
        while not self._made.empty():
            found += self._made.get()
            self._under_way = False
            self._next()
        return found

    def _next(self) -> None:
        if self._under_way or not self._waiting:
            return
        self._under_way = True
        effect = self._waiting.popleft()
        if self._attempts.fatal(_work(effect)):
            log.error("making this encoder has killed the master twice; it is given up", encoder=effect.encoder)
            failed = GenerationFailed(encoder=effect.encoder, reason="making it has killed the master twice")
            self._made.put([Outcome(failed)])
        else:
            self._background("making", partial(self._work_on, effect))

    def _work_on(self, effect: Generate) -> None:
        with self._attempts.at(_work(effect)):
            outcomes = self._make(effect)
        self._made.put(outcomes)


def _work(effect: Generate) -> str:
    return f"generate {effect.encoder}"
