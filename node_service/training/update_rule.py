"""When a node returns an update: the rule's bounds against what has happened since the last return. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.wire.messages import ReturnWhen

#: Share of a new loss in the running mean; about the last twenty steps count.
_SMOOTHING = 0.1


@dataclass
class SinceReturn:
    """What a node has done since it last returned; `loss_start` is the running mean loss back then.

    `seconds` is the time that the training of it took by the clock, pauses of a throttled node included.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_mean: float = math.nan
    loss_start: float = math.nan

    def step(self, samples: int, loss: float) -> None:
        """Count one training step."""
        self.steps += 1
        self.samples += samples
        self.loss_sum += loss
        if math.isnan(self.loss_mean):
            self.loss_mean = self.loss_start = loss
        else:
            self.loss_mean += _SMOOTHING * (loss - self.loss_mean)

    @property
    def mean_loss(self) -> float:
        """The mean over the steps since the last return; NaN before the first."""
        return self.loss_sum / self.steps if self.steps else math.nan

    def returned(self) -> SinceReturn:
        """A fresh count that goes on with the running mean."""
        return SinceReturn(loss_mean=self.loss_mean, loss_start=self.loss_mean)


def must_return(when: ReturnWhen, since: SinceReturn, drift: float | None = None) -> bool:
    """Whether any bound that the rule sets is reached. A rule without bounds returns every 25 steps.

    `drift` is ‖base − local‖ / ‖base‖, needed only where `when.drift` is set.
    """
    if since.steps == 0:
        return False
    reached = []
    if when.steps is not None:
        reached.append(since.steps >= when.steps)
    if when.seconds is not None:
        reached.append(since.seconds >= when.seconds)
    if when.samples is not None:
        reached.append(since.samples >= when.samples)
    if when.loss_change is not None:
        change = abs(since.loss_mean - since.loss_start)
        reached.append(change >= when.loss_change * abs(since.loss_start))
    if when.drift is not None and drift is not None:
        reached.append(drift >= when.drift)
    unbounded = when == ReturnWhen()
    return any(reached) or (unbounded and since.steps >= 25)
