"""What this master has answered to updates since it started, summed up as the rows become durable: for metrics alone.

Nothing here is of the state: a start begins with zeros, as counters of a process do. Labels that others choose are
bounded: an encoder is one of the state, or none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple, TypeVar

from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt, verdict
from master_service.decisions.effects import Effect, Send
from master_service.decisions.records import Entry, Versioned

#: Encoders of which sums are kept, the newest; a master that makes more in one life begins the oldest anew.
KEPT_ENCODERS = 64
#: Upper bounds of weights: 1 is an update of a node that is neither behind nor ahead of the others.
WEIGHTS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)
#: Upper bounds of staleness, in versions.
STALENESS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)

#: What became of an update that came: a receipt counted it, or refused it, or it had come before.
Outcome = Literal["counted", "refused", "duplicate"]
Value = TypeVar("Value")


class Answered(NamedTuple):
    """What is told apart. `encoder`: empty for an update of one that is not known; `reason`: of a refusal."""

    encoder: str
    outcome: Outcome
    reason: str = ""


@dataclass
class Histogram:
    """How many values were at most each of `bounds`, and above the last; and their sum."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound, values up to it), the last one infinite."""
        return list(zip((*self.bounds, float("inf")), accumulate(self.counts), strict=True))

    def copy(self) -> Histogram:
        return Histogram(self.bounds, list(self.counts), self.total)


@dataclass
class Counts:
    """`answered`: updates; `weights` and `staleness`: of counted ones, by encoder; `payload_bytes`: of updates that
    were taken in, by encoder; `version_at`: when the newest version was decided, seconds since 1970, by encoder."""

    answered: dict[Answered, int] = field(default_factory=dict)
    weights: dict[str, Histogram] = field(default_factory=dict)
    staleness: dict[str, Histogram] = field(default_factory=dict)
    payload_bytes: dict[str, int] = field(default_factory=dict)
    version_at: dict[str, float] = field(default_factory=dict)

    def note(self, entry: Entry, effects: Sequence[Effect], encoders: Container[str], *, known: bool) -> None:
        """An entry and what it led to. `encoders`: those of the state; `known`: it is an update that had come before,
        whose answer is the stored one, but for a conflict."""
        body = entry.body
        if entry.skipped:
            return
        if isinstance(body, UpdateManifest):
            encoder = body.encoder if body.encoder in encoders else ""
            if known:
                self._answer(Answered(encoder, "duplicate"))
            elif encoder and entry.payload is not None:
                _newest(self.payload_bytes, encoder, self.payload_bytes.get(encoder, 0) + body.size)
        elif isinstance(body, Versioned):
            _newest(self.version_at, body.encoder, entry.at)
        for effect in effects:
            receipt = effect.message if isinstance(effect, Send) else None
            if isinstance(receipt, Receipt) and (not known or receipt.reason == "conflict"):
                self._receipt(receipt, receipt.encoder if receipt.encoder in encoders else "")

    def copy(self) -> Counts:
        """As it is now, for another thread."""
        return Counts(
            dict(self.answered),
            {name: each.copy() for name, each in self.weights.items()},
            {name: each.copy() for name, each in self.staleness.items()},
            dict(self.payload_bytes),
            dict(self.version_at),
        )

    def _receipt(self, receipt: Receipt, encoder: str) -> None:
        if not receipt.accepted:
            self._answer(Answered(encoder, "refused", verdict(receipt)))
            return
        self._answer(Answered(encoder, "counted"))
        for sums, bounds, value in (
            (self.weights, WEIGHTS, receipt.weight),
            (self.staleness, STALENESS, float(receipt.staleness)),
        ):
            histogram = sums.get(encoder) or Histogram(bounds)
            histogram.add(value)
            _newest(sums, encoder, histogram)

    def _answer(self, answered: Answered) -> None:
        if answered not in self.answered:
            encoders = list(dict.fromkeys(each.encoder for each in (*self.answered, answered)))
            for old in encoders[:-KEPT_ENCODERS]:
                self.answered = {each: count for each, count in self.answered.items() if each.encoder != old}
        self.answered[answered] = self.answered.get(answered, 0) + 1


def _newest(sums: dict[str, Value], encoder: str, value: Value) -> None:
    """Keep the value of an encoder, as the newest; of too many the oldest is forgotten."""
    sums.pop(encoder, None)
    sums[encoder] = value
    while len(sums) > KEPT_ENCODERS:
        del sums[next(iter(sums))]
