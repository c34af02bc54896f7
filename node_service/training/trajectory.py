"""Where the local shared parameters stand relative to the target: what was handed in, what is counted, what is new.

Training goes on while updates travel, so three points on the node's path matter, all float32 of shape (size,):
`origin`, up to which everything local is counted in the newest version that was read; `anchor`, where the last update
was handed in; and the model's own parameters, ahead of both. Reading version V moves the whole path by V − origin, so
that no step is lost and none is handed in twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.numbers.encodings import ErrorFeedback
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import EncodingName


@dataclass(frozen=True)
class Pending:
    """An update without a receipt: where the path stood when it was handed in, what its encoding left for later."""

    anchor: Tensor
    residual: Tensor


class Trajectory:
    """The path of one node's shared parameters. The model's own are passed in and moved by the caller."""

    def __init__(self, start: ParameterSet) -> None:
        self.origin = start.vector.clone()
        self.pending: dict[int, Pending] = {}
        self._feedback = ErrorFeedback(start.layout.size)
        self.last_answered = -1

    @classmethod
    def restored(cls, layout: Layout, saved: Mapping[str, Tensor], last_answered: int) -> Trajectory:
        """The trajectory whose `state` and `last_answered` were saved."""
        found = cls(ParameterSet(layout, saved["origin"]))
        found.last_answered = last_answered
        found._feedback.residual.copy_(saved["residual"])
        for name, anchor in saved.items():
            kind, _, sequence = name.partition("/")
            if kind == "anchor":
                found.pending[int(sequence)] = Pending(anchor, saved[f"residual/{sequence}"])
        return found

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides `last_answered`; not copied."""
        tensors = {"origin": self.origin, "residual": self._feedback.residual}
        for sequence, pending in self.pending.items():
            tensors |= {f"anchor/{sequence}": pending.anchor, f"residual/{sequence}": pending.residual}
        return tensors

    @property
    def anchor(self) -> Tensor:
        """Where the last update was handed in."""
        newest = max(self.pending, default=-1)
        return self.pending[newest].anchor if newest > self.last_answered else self.origin

    def hand_in(self, sequence: int, local: Tensor, encoding: EncodingName) -> list[bytes]:
        """The encoded pseudo-gradient (anchor − local) since the last hand-in; the anchor moves up to `local`."""
        bodies, residual = self._feedback.encode(self.anchor - local, encoding)
        self.pending[sequence] = Pending(local.clone(), residual)
        return bodies

    def count(self, sequence: int) -> None:
        """What was handed in as this update is counted: the path starts there."""
        pending = self.pending.pop(sequence, None)
        if pending is not None and sequence > self.last_answered:
            self.last_answered, self.origin = sequence, pending.anchor

    def discard(self, sequence: int) -> None:
        """What was handed in as this update never counts: the path starts there all the same, and what its encoding had
        left for the next one is taken back."""
        if (pending := self.pending.get(sequence)) is not None:
            self._feedback.refused(pending.residual)
        self.count(sequence)

    def adopt(self, target: Tensor, local: Tensor) -> Tensor:
        """The new local parameters once `target` was read: target + what is not counted in it. Steps taken stay."""
        moved = target + (local - self.origin)
        shift = target - self.origin
        self.pending = {
            sequence: Pending(pending.anchor + shift, pending.residual) for sequence, pending in self.pending.items()
        }
        self.origin = target.clone()
        return moved

    def restart(self, target: Tensor) -> Tensor:
        """Forget the path and start from `target`: after a divergence, or as a new incarnation."""
        self.origin = target.clone()
        self.pending = {}
        self._feedback.residual.zero_()
        return target.clone()

    def drift(self, local: Tensor) -> float:
        """‖anchor − local‖ / ‖anchor‖."""
        anchor = self.anchor
        return float(torch.linalg.vector_norm(anchor - local) / torch.linalg.vector_norm(anchor))
