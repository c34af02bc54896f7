"""Texts that are held out, cut into windows in order: every token once, and of each window it is known whose it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.encoders.base import Batch

#: What is not predicted, in `labels`; the number that cross entropy skips by default.
NOT_MASKED = -100
#: Windows in one batch at most.
_MOST_WINDOWS = 64


class Windowed(Protocol):
    """What is needed of a text model: tokens of texts, and a batch of one window out of a corpus that is just that.

    A window has `span` tokens of text, behind `lead` special ones.
    """

    @property
    def span(self) -> int: ...

    @property
    def lead(self) -> int: ...

    def encode(self, samples: Sequence[Any]) -> NDArray[Any]: ...

    def batch(self, encoded: NDArray[Any], size: int, generator: torch.Generator) -> Batch: ...


def in_order(model: Windowed, texts: Sequence[str], generator: torch.Generator) -> Iterator[tuple[Batch, Tensor]]:
    """All texts behind one another, cut into windows in order, each masked once, as in training.

    Gives (a batch of windows, whose each position is: the text's index, int64 (windows, window)). A text's windows may
    lie in several batches, and a window have several texts in it. The masks follow from the generator and the tokens
    alone. The last window reaches back to be whole, and what the one before it had is not predicted again.
    """
    parts = [model.encode([text]) for text in texts]
    if not parts:
        return
    stream = np.concatenate(parts)
    owners = torch.from_numpy(np.repeat(np.arange(len(parts)), [len(part) for part in parts]))
    length, lead = min(model.span, len(stream)), model.lead
    together: list[tuple[Batch, Tensor]] = []
    for start in range(0, len(stream), length):
        begin = min(start, len(stream) - length)
        batch = model.batch(stream[begin : begin + length], 1, generator)
        labels = batch["labels"].clone()
        labels[:, : lead + start - begin] = NOT_MASKED
        whose = torch.zeros_like(labels)
        whose[:, lead : lead + length] = owners[begin : begin + length]
        together.append(({**batch, "labels": labels}, whose))
        if len(together) == _MOST_WINDOWS or start + length >= len(stream):
            windows, theirs = zip(*together, strict=True)
            yield {name: torch.cat([each[name] for each in windows]) for name in windows[0]}, torch.cat(theirs)
            together = []
