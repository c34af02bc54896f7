"""Where a node's time goes: to training, or to waiting for the master."""

from __future__ import annotations

from common.clock import Clock
from common.events import happened
from node_service.figures import NodeFigures
from node_service.training.training import Training


class TimeSpent:
    """Counts the seconds between two looks, in the figures of its node and in what the next update says."""

    def __init__(self, node: str, figures: NodeFigures, clock: Clock) -> None:
        self._node = node
        self._figures = figures
        self._clock = clock
        self._looked_at = clock.monotonic()
        self._was_ready = False

    def look(self, training: Training | None, *, ready: bool, waits: bool) -> None:
        """Where the time since the last look went: to training, pauses of a throttled node included, or to waiting.

        `training`: what could be trained if only the master answered; `ready`: whether a step would be taken now. A
        node that trains on while the master is away `waits` for it too, and says since when.
        """
        now = self._clock.monotonic()
        passed, self._looked_at = now - self._looked_at, now
        was_ready, self._was_ready = self._was_ready, ready
        if training is None:
            self._wait_ended()
            return
        if was_ready:
            training.since.seconds += passed
            self._figures.training_seconds += passed
        else:
            self._figures.waiting_seconds += passed
        if not waits:
            self._wait_ended()
        elif self._figures.waiting_since is None:
            self._figures.waiting_since = self._clock.now()
            about = {"encoder": training.instruction.encoder, "version": training.version}
            happened("waiting for the master", node=self._node, **about)

    def begin_again(self) -> None:
        """What has passed since the last look was neither: a model was built, which takes a while."""
        self._looked_at, self._was_ready = self._clock.monotonic(), False

    def _wait_ended(self) -> None:
        since, self._figures.waiting_since = self._figures.waiting_since, None
        if since is not None:
            waited = max(0.0, self._clock.now() - since)
            happened("waiting ended", node=self._node, encoder=self._figures.encoder, seconds=waited)
