"""What a node sees of its validation loss: when it looks, and what follows in its finishing phase. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.wire.update_rule import FinishRule, InnerOptimizer

#: The share of a phase that runs at the full learning rate where the schedule is a cosine.
_FULL_RATE = 0.6
#: Looks of a phase where the rule does not say how often, and the fewest steps between two of those.
_LOOKS, _FEWEST_BETWEEN = 10, 10


#: A node's own steps between two measurements of versions at least: one takes as long as five, so they take a tenth of
#: its time at most, however fast the versions of faster nodes come.
_STEPS_BETWEEN = 50


@dataclass(frozen=True)
class HeldOut:
    """A node's masked loss on its validation samples (nats for text) under a version as it came, and the steps that the
    node had taken by then. Of a model that has diverged the loss is not finite."""

    version: int
    loss: float
    steps: int

    @property
    def finite(self) -> bool:
        """Whether it is said to anybody."""
        return math.isfinite(self.loss)


def must_evaluate(every: int, newest: HeldOut | None, version: int, steps: int) -> bool:
    """Whether a version that is being adopted after so many steps is to be measured: the first one, and from there on
    one of every so many, if the node has trained for a while since the last."""
    if every == 0 or newest is None:
        return every > 0
    return version >= newest.version + every and steps >= newest.steps + _STEPS_BETWEEN


@dataclass
class Looks:
    """How far a phase of `total` steps is, and what was seen of the validation loss in it: pure.

    `before`, `newest` and `best` are losses; None: nothing was measured, or it was not finite. `without_gain`: looks
    since the best one.
    """

    total: int
    every: int
    patience: int | None
    steps: int = 0
    before: float | None = None
    newest: float | None = None
    best: float | None = None
    without_gain: int = 0

    @classmethod
    def planned(cls, rule: FinishRule, steps_so_far: int) -> Looks | None:
        """The phase after so many steps of a node; None if there is none."""
        total = rule.steps if rule.steps is not None else round(rule.share * steps_so_far)
        if rule.what == "none" or total == 0:
            return None
        return cls(total, rule.look_every or max(_FEWEST_BETWEEN, total // _LOOKS), rule.patience)

    def first(self, loss: float) -> None:
        """Before the first step: what the phase has to be better than."""
        self.before = self.newest = self.best = loss if math.isfinite(loss) else None

    def look(self, loss: float) -> bool:
        """Note the loss of this moment; whether it is the best so far."""
        self.newest = loss if math.isfinite(loss) else None
        better = self.newest is not None and (self.best is None or self.newest < self.best)
        self.without_gain = 0 if better else self.without_gain + 1
        if better:
            self.best = self.newest
        return better

    @property
    def due(self) -> bool:
        """Whether a look is due after the step that was just taken."""
        return self.steps % self.every == 0 or self.steps == self.total

    @property
    def over(self) -> bool:
        tired = self.patience is not None and self.without_gain >= self.patience
        return self.steps >= self.total or tired

    def rate(self, inner: InnerOptimizer) -> float:
        """The learning rate of the next step: see FinishRule."""
        falling = max(0.0, (self.steps / self.total - _FULL_RATE) / (1.0 - _FULL_RATE))
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, falling)))
        return inner.lr * (inner.final_fraction + (1.0 - inner.final_fraction) * cosine)
