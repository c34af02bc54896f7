"""Where the local shared parameters stand relative to the target: what was handed in, what is counted, what is new.

Training goes on while updates travel, so three points on the node's path matter, all of `size` float32 elements:
`origin`, up to which everything local is counted in the newest version that was read; `anchor`, where the last update
was handed in; and the model's own parameters, ahead of both. Reading version V moves the whole path by V − origin, so
that no step is lost and none is handed in twice.

Everything is done in place, a piece that fits the cache at a time, and nothing is kept that follows from something
else: a version is the origin as it came, encoded; what an encoding left is worked out from where the update began.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from common.numbers.encodings import EncodedVector
from common.numbers.feedback import ErrorFeedback, Left, Part, Point, at, parts, scratch
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import EncodingName


@dataclass(frozen=True)
class Pending:
    """An update without a receipt: where the path stood when it was handed in, what its encoding left for later."""

    anchor: Tensor
    left: Left | None


class Trajectory:
    """The path of one node's shared parameters. The model's own are passed in, and moved in place."""

    def __init__(self, start: ParameterSet | EncodedVector, device: torch.device | str = "cpu") -> None:
        """`start` is copied, unless it is a version as it came. `device`: that of the model's own."""
        self._device = device
        self._origin: Point = start if isinstance(start, EncodedVector) else start.vector.to(device, copy=True)
        self.pending: dict[int, Pending] = {}
        self._feedback = ErrorFeedback()
        self.last_answered = -1
        #: A point that is needed no more: the next one is written over it.
        self._spare: Tensor | None = None

    @classmethod
    def restored(
        cls, layout: Layout, saved: Mapping[str, Tensor], last_answered: int, device: str = "cpu"
    ) -> Trajectory:
        """The trajectory whose `state` and `last_answered` were saved."""
        found = cls(ParameterSet(layout, saved["origin"]), device)
        found.last_answered = last_answered
        residual = saved.get("residual")
        # releases that kept one whatever the encoding wrote zeros where nothing is lost
        if residual is not None and bool((residual != 0).any()):
            found._feedback.residual = residual.to(device)
        anchors = {int(name.partition("/")[2]): each for name, each in saved.items() if name.startswith("anchor/")}
        for sequence in sorted(anchors):
            anchor = anchors[sequence].to(device)
            found.pending[sequence] = Pending(anchor, found._left(sequence, anchor, saved))
        return found

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides `last_answered`; not copied."""
        tensors = {"origin": self.origin}
        if self._feedback.residual is not None:
            tensors["residual"] = self._feedback.residual
        for sequence, pending in self.pending.items():
            tensors[f"anchor/{sequence}"] = pending.anchor
            left = pending.left
            if left is None:
                continue
            if left.sent is not None and left.before is self._before(sequence):
                tensors[f"{left.sent.encoding}/{sequence}"] = torch.frombuffer(
                    bytearray().join(left.sent.bodies), dtype=torch.uint8
                )
            else:
                tensors[f"residual/{sequence}"] = left.values
        return tensors

    @property
    def origin(self) -> Tensor:
        """Up to where everything is counted, float32 of shape (size,)."""
        if isinstance(self._origin, EncodedVector):
            encoded, self._origin = self._origin, self._origin.decode(self._room(self._origin.size))
            for pending in self.pending.values():
                if pending.left is not None and pending.left.before is encoded:
                    pending.left.before = self._origin
        return self._origin

    def hand_in(self, sequence: int, local: Tensor, encoding: EncodingName) -> list[bytes]:
        """The encoded pseudo-gradient (anchor − local) since the last hand-in; the anchor moves up to `local`."""
        before = self._anchor()
        after = self._room(local.numel())
        bodies, left = self._feedback.encode(before, local, after, encoding)
        self.pending[sequence] = Pending(after, left)
        return bodies

    def count(self, sequence: int) -> None:
        """What was handed in as this update is counted: the path starts there."""
        pending = self.pending.pop(sequence, None)
        if pending is None:
            return
        if sequence > self.last_answered:
            self.last_answered = sequence
            self._begin_at(pending.anchor)
        else:
            self._give_up(pending.anchor)

    def discard(self, sequence: int) -> None:
        """What was handed in as this update never counts: the path starts there all the same, and what its encoding had
        left for the next one is taken back."""
        if (pending := self.pending.get(sequence)) is not None:
            self._feedback.refused(pending.left)
        self.count(sequence)

    def adopt(self, target: Point, local: Tensor) -> Tensor:
        """Move `local` to where it stands once `target` was read, target + what is not counted in it, and give it.
        Steps taken stay. An encoded target is kept; a tensor is copied."""
        for pending in self.pending.values():
            if pending.left is not None:
                pending.left.keep()  # the points that it is worked out from move
        origin, anchors, room = self._origin, [each.anchor for each in self.pending.values()], scratch(2, local.device)
        for part in parts(local.numel(), local.device):
            _move(part, at(target, part, room[0]), at(origin, part, room[1]), local, anchors, room[1])
            if isinstance(target, Tensor) and isinstance(origin, Tensor):
                origin[part.start : part.stop].copy_(target[part.start : part.stop])
        if isinstance(target, EncodedVector):
            self._begin_at(target)
        elif isinstance(origin, EncodedVector):
            self._begin_at(target.clone())
        return local

    def restart(self, target: Tensor) -> Tensor:
        """Forget the path and start from `target`: after a divergence, or as a new incarnation. Gives a copy of it."""
        self.pending = {}
        self._feedback.forget()
        self._origin = target.clone()
        return target.clone()

    def drift(self, local: Tensor) -> float:
        """‖anchor − local‖ / ‖anchor‖."""
        anchor, room = self._anchor(), scratch(2, local.device)
        moved = length = torch.zeros((), dtype=torch.float64, device=local.device)
        for part in parts(local.numel(), local.device):
            here = at(anchor, part, room[0])
            apart = torch.sub(here, local[part.start : part.stop], out=room[1][: part.stop - part.start])
            moved, length = moved + torch.dot(apart, apart), length + torch.dot(here, here)
        moved_by, from_zero = math.sqrt(float(moved)), math.sqrt(float(length))
        return moved_by / from_zero if from_zero else math.inf if moved_by else math.nan

    def _anchor(self) -> Point:
        """Where the last update was handed in."""
        newest = max(self.pending, default=-1)
        return self.pending[newest].anchor if newest > self.last_answered else self._origin

    def _before(self, sequence: int) -> Point:
        """Where the update before this one was handed in, if it is still known."""
        earlier = max((each for each in self.pending if each < sequence), default=-1)
        return self.pending[earlier].anchor if earlier > self.last_answered else self._origin

    def _left(self, sequence: int, anchor: Tensor, saved: Mapping[str, Tensor]) -> Left | None:
        """What was saved of what an update's encoding left; nothing is if it left nothing."""
        if (values := saved.get(f"residual/{sequence}")) is not None:
            return Left.kept(values.to(anchor.device))
        for encoding in get_args(EncodingName):
            if (sent := saved.get(f"{encoding}/{sequence}")) is not None:
                payload = sent.numpy().tobytes()
                return Left(self._before(sequence), anchor, EncodedVector.of_payload(payload, anchor.numel(), encoding))
        return None

    def _begin_at(self, point: Point) -> None:
        old, self._origin = self._origin, point
        if isinstance(old, Tensor):
            self._give_up(old)

    def _give_up(self, point: Tensor) -> None:
        """A point that the path does not need; unless what an encoding left is still to be worked out from it."""
        if all(each.left is None or each.left.before is not point for each in self.pending.values()):
            self._spare = point

    def _room(self, size: int) -> Tensor:
        """A tensor to write a point into."""
        spare, self._spare = self._spare, None
        return torch.empty(size, device=self._device) if spare is None else spare


def _move(part: Part, target: Tensor, origin: Tensor, local: Tensor, anchors: list[Tensor], room: Tensor) -> None:
    """One part of everything that a version moves."""
    here = local[part.start : part.stop]
    torch.add(target, here.sub_(origin), out=here)
    if anchors:
        shift = torch.sub(target, origin, out=room[: part.stop - part.start])
        for anchor in anchors:
            anchor[part.start : part.stop].add_(shift)
