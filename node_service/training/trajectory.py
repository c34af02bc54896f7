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


class Frame:
    """The path of one node's shared parameters. The model's own are passed in and moved by the caller."""

    def __init__(self, start: ParameterSet) -> None:
        self.origin = start.vector.clone()
        self.pending: dict[int, Pending] = {}
        self._feedback = ErrorFeedback(start.layout.size)
        self.last_settled = -1

    @classmethod
    def restored(cls, layout: Layout, saved: Mapping[str, Tensor], last_settled: int) -> Frame:
        """The frame whose `state` and `last_settled` were saved."""
        frame = cls(ParameterSet(layout, saved["origin"]))
        frame.last_settled = last_settled
        frame._feedback.residual.copy_(saved["residual"])
        for name, anchor in saved.items():
            kind, _, sequence = name.partition("/")
            if kind == "anchor":
                frame.pending[int(sequence)] = Pending(anchor, saved[f"residual/{sequence}"])
        return frame

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides `last_settled`; not copied."""
        found = {"origin": self.origin, "residual": self._feedback.residual}
        for sequence, pending in self.pending.items():
            found |= {f"anchor/{sequence}": pending.anchor, f"residual/{sequence}": pending.residual}
        return found

    @property
    def anchor(self) -> Tensor:
        """Where the last update was handed in."""
        newest = max(self.pending, default=-1)
        return self.pending[newest].anchor if newest > self.last_settled else self.origin

    def hand_in(self, sequence: int, local: Tensor, encoding: EncodingName) -> list[bytes]:
        """The encoded pseudo-gradient (anchor − local) since the last hand-in; the anchor moves up to `local`."""
        bodies, residual = self._feedback.encode(self.anchor - local, encoding)
        self.pending[sequence] = Pending(local.clone(), residual)
        return bodies

    def settle(self, sequence: int, accepted: bool) -> None:
        """A receipt came: what was handed in then is counted, or never will be; either way the path starts there."""
        pending = self.pending.pop(sequence, None)
        if pending is None:
            return
        if not accepted:
            self._feedback.refused(pending.residual)
        if sequence > self.last_settled:
            self.last_settled, self.origin = sequence, pending.anchor

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
