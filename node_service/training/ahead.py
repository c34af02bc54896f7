"""How far a trainer runs ahead of its device: a GPU takes steps while later ones are being prepared."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

#: Steps that were begun and not yet taken, at most. One keeps a GPU busy while the next is launched; with two it stays
#: so over a pause of the launching thread.
_MOST = 2


class Ahead:
    """The losses of a trainer's steps, each known once its step was taken.

    A step on a GPU is launched and not waited for, until there are too many; so in the long run `begun` takes as long
    as a step does, and `settle` what was launched and not waited for. Elsewhere a step is taken when it has begun.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._begun: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def begun(self, loss: Tensor) -> list[float]:
        """A step was launched, whose loss is going to be this, of one element. Gives those that are known by now."""
        if self._device.type != "cuda":
            return [float(loss)]
        # the loss crosses by itself, and nothing waits for it before its step has been waited for
        place = torch.empty((), dtype=loss.dtype, pin_memory=True)
        place.copy_(loss.detach().reshape(()), non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._begun.append((event, place))
        return self._taken(_MOST)

    def settle(self) -> list[float]:
        """Wait until the device has nothing left to do. Gives the losses that are known by that, in order."""
        losses = self._taken(0)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return losses

    def _taken(self, most: int) -> list[float]:
        losses = []
        while len(self._begun) > most:
            event, loss = self._begun.popleft()
            event.synchronize()
            losses.append(float(loss))
        return losses
