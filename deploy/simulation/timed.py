"""Real training under a virtual clock: a step takes the virtual time that the node's speed says."""

from __future__ import annotations

import time
from typing import Any

from node_service.training.session import Session


class TimedSession(Session):
    """A real session, a step of which takes 1 / `speed` virtual seconds. It takes no more than `most` steps (None: as
    many as there is time for); what it may not take passes as time, in which it is a node like any other.
    `real_seconds`: what each step really took."""

    def __init__(self, *arguments: Any, speed: float, most: int | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._seconds = 1.0 / speed
        self._most = most
        self.real_seconds: list[float] = []

    def step(self) -> float:
        if self._most is None or self.steps < self._most:
            begun = time.perf_counter()
            super().step()
            self.real_seconds.append(time.perf_counter() - begun)
        return self._seconds
