"""Where a node's time goes: to steps, to waiting for the master, or to what keeps it from steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

from common.clock import Clock
from common.events import happened
from node_service.figures import Lost, NodeFigures
from node_service.training.training import Training

_NO_TIME = 0.0, 0.0
#: What time goes to.
Work = Literal["steps"] | Lost


class TimeSpent:
    """Gives every second its place, in the figures of its node and in what the next update says.

    A second is lost if no step runs in it though there are samples, and the master waits for nothing and is not waited
    for. Until the moment that `until` names nothing is: a throttled node would have rested, a modelled one be training.
    """

    def __init__(self, node: str, figures: NodeFigures, clock: Clock) -> None:
        self._node = node
        self._figures = figures
        self._clock = clock
        self._looked_at = clock.monotonic()
        #: Up to here every second has its place.
        self._placed = self._looked_at
        self._busy_until = self._looked_at
        #: What the time since the last look goes to, as far as no work is named for it.
        self._goes_to: Literal["training", "waiting", "nothing"] = "nothing"
        works: tuple[Work, ...] = ("steps", *get_args(Lost))
        self._on = {work: _On(self, work) for work in works}

    def look(self, training: Training | None, *, ready: bool, waits: bool) -> None:
        """Where the time since the last look went: to training, pauses of a throttled node included, or to waiting.

        `training`: what could be trained if only the master answered; `ready`: whether a step would be taken now. A
        node that trains on while the master is away `waits` for it too, and says since when.
        """
        now = self._clock.monotonic()
        passed, self._looked_at = now - self._looked_at, now
        self.place_rest()
        if self._goes_to == "training":
            self._figures.training_seconds += passed
            if training is not None:
                training.since.seconds += passed
        self._goes_to = "training" if ready else "waiting" if training is not None else "nothing"
        if training is None or not waits:
            self._wait_ended()
        elif self._figures.waiting_since is None:
            self._figures.waiting_since = self._clock.now()
            about = {"encoder": training.instruction.encoder, "version": training.version}
            happened("waiting for the master", node=self._node, **about)

    def on(self, work: Work) -> AbstractContextManager[None]:
        """Inside, the time goes to this."""
        return self._on[work]

    def place_rest(self) -> None:
        """What has no place yet goes to what was going on at the last look."""
        passed, lost = self._since_placed()
        if self._goes_to == "training":
            self._figures.lost_seconds["other"] += lost
        elif self._goes_to == "waiting":
            self._figures.waiting_seconds += passed

    def place(self, work: Work) -> None:
        """What has no place yet goes to this."""
        passed, lost = self._since_placed()
        if work == "steps":
            self._figures.step_seconds += passed
        else:
            self._figures.lost_seconds[work] += lost

    def until(self, moment: float) -> None:
        """Nothing is lost before this moment of the clock, whatever is done."""
        self._busy_until = moment

    def begin_again(self) -> None:
        """What has passed since the last look was none of it: a model was built, which takes a while."""
        self._looked_at = self._placed = self._clock.monotonic()
        self._goes_to = "nothing"

    def _since_placed(self) -> tuple[float, float]:
        """The seconds that have no place yet, and how many of them come after `until`."""
        now, begun = self._clock.monotonic(), self._placed
        if now == begun:
            return _NO_TIME
        self._placed = now
        return now - begun, max(0.0, now - max(begun, self._busy_until))

    def _wait_ended(self) -> None:
        since, self._figures.waiting_since = self._figures.waiting_since, None
        if since is not None:
            waited = max(0.0, self._clock.now() - since)
            happened("waiting ended", node=self._node, encoder=self._figures.encoder, seconds=waited)


class _On:
    """One work of a node, entered again and again: at every step."""

    def __init__(self, spent: TimeSpent, work: Work) -> None:
        self._spent = spent
        self._work = work

    def __enter__(self) -> None:
        self._spent.place_rest()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._spent.place(self._work)
