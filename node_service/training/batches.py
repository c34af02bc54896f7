"""The batches of a training, one after the other out of one generator; the next may be drawn beside the step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class _Next(Generic[T]):
    """A batch that is being drawn under a condition, from this state of the generator on."""

    drawn: Future[T]
    condition: Hashable
    before: Tensor


class Batches(Generic[T]):
    """`draw` takes what it needs from the generator, and gives a batch. Drawn `beside` the step or not, the batches are
    the same: if the condition that one was drawn under no longer holds, it is drawn again."""

    def __init__(self, draw: Callable[[], T], generator: torch.Generator, *, beside: bool) -> None:
        self._draw = draw
        self._generator = generator
        self._beside = beside
        self._next: _Next[T] | None = None

    def take(self, condition: Hashable) -> T:
        """The next batch. Raises what drawing it raised."""
        following, self._next = self._next, None
        if following is None:
            return self._draw()
        wait([following.drawn])
        if following.condition != condition:
            self._generator.set_state(following.before)
            return self._draw()
        return following.drawn.result()

    def prepare(self, condition: Hashable) -> None:
        """Begin to draw the one after it, where that is done beside the step."""
        if self._beside and self._next is None:
            self._next = _Next(Future(), condition, self._generator.get_state())
            # a thread for each: it takes a fraction of a millisecond to start, and none is left when training ends
            threading.Thread(target=self._fill, args=(self._next.drawn,), name="batch", daemon=True).start()

    def wait(self) -> None:
        """Nothing is being drawn any more once this returns; whether that failed, `take` says."""
        if self._next is not None:
            wait([self._next.drawn])

    def _fill(self, drawn: Future[T]) -> None:
        try:
            drawn.set_result(self._draw())
        except BaseException as error:  # it is not this thread's: who takes the batch has to know
            drawn.set_exception(error)

    @property
    def state(self) -> Tensor:
        """The generator's state after the last batch that was taken: what was drawn beyond it is drawn again."""
        return self._generator.get_state() if self._next is None else self._next.before

    def go_on_from(self, state: Tensor) -> None:
        """Draw on from a state that `state` gave."""
        self.wait()
        self._next = None
        self._generator.set_state(state)
