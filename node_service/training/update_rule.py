"""When a node returns an update: the rule's bounds against what has happened since the last return. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.wire.update_rule import ReturnWhen, UpdateRule

#: Share of a new loss in the running mean; about the last twenty steps count.
_SMOOTHING = 0.1
#: The largest batch, samples: what is beyond is a slip or malice, and would be tried until the memory ends.
_MAX_BATCH = 1 << 16
#: The highest learning rate, weight decay and share of a finishing phase that are no slip.
_MAX_RATE, _MAX_SHARE = 1e3, 1e3
#: Steps of an update where the rule sets no bound.
_UNBOUNDED_STEPS = 25


def impossible(rule: UpdateRule) -> str:
    """Why no node can train by a rule, for its master; empty if it can be tried."""
    inner = rule.inner
    if not all(0.0 <= beta < 1.0 for beta in inner.betas):
        return f"inner.betas are {inner.betas[0]:g} and {inner.betas[1]:g}; AdamW wants them from 0 to below 1"
    if inner.batch_size > _MAX_BATCH:
        return f"inner.batch_size is {inner.batch_size}, at most {_MAX_BATCH} are tried"
    if not inner.lr <= _MAX_RATE or not inner.weight_decay <= _MAX_RATE:
        return f"inner.lr {inner.lr:g} or inner.weight_decay {inner.weight_decay:g} is beyond {_MAX_RATE:g}"
    if rule.finish.share > _MAX_SHARE:
        return f"finish.share is {rule.finish.share:g}, at most {_MAX_SHARE:g} are tried"
    return ""


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
        self.took(samples)
        self.saw(loss)

    def took(self, samples: int) -> None:
        """Count one training step whose loss is seen later."""
        self.steps += 1
        self.samples += samples

    def saw(self, loss: float) -> None:
        """Count the loss of the next step that has none yet."""
        self.loss_sum += loss
        if math.isnan(self.loss_mean):
            self.loss_mean = self.loss_start = loss
        else:
            self.loss_mean += _SMOOTHING * (loss - self.loss_mean)

    @property
    def mean_loss(self) -> float:
        """The mean over the steps since the last return, all of whose losses were seen; NaN before the first."""
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
    if not reached and when.drift is None:
        return since.steps >= _UNBOUNDED_STEPS
    return any(reached)
