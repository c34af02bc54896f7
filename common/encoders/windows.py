"""Texts that are held out, cut into windows in order: every token once, and of each window it is known whose it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from common.encoders.base import Batch

#: What is not predicted, in `labels`; the number that cross entropy skips by default.
NOT_MASKED = -100
#: Windows in one batch at most: a book is a document too.
_MOST_WINDOWS = 256


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


def documents(model: Windowed, texts: Sequence[str], generator: torch.Generator) -> Iterator[tuple[int, Batch, int]]:
    """All texts behind one another, cut into windows in order, each masked once, as in training.

    Gives (which text, a batch of the windows that it reaches into, how many positions are predicted): in each, `labels`
    are those of this text alone, so that a loss of the batch is the text's. A text that is long comes in several; one
    of which nothing is predicted does not come. The masks follow from the generator and the tokens alone. The last
    window reaches back to be whole, and what the one before it had is not predicted again.
    """
    parts = [model.encode([text]) for text in texts]
    if not parts:
        return
    stream = np.concatenate(parts)
    ends = np.cumsum([len(part) for part in parts])
    length, lead = min(model.span, len(stream)), model.lead
    starts = range(0, len(stream), length)
    windows: list[Batch] = []
    for start in starts:
        begin = min(start, len(stream) - length)
        batch = model.batch(stream[begin : begin + length], 1, generator)
        labels = batch["labels"].clone()
        labels[:, : lead + start - begin] = NOT_MASKED
        windows.append({**batch, "labels": labels})
    for index, end in enumerate(ends):
        first = int(end) - len(parts[index])
        for part in _groups(first // length, (int(end) - 1) // length):
            chosen = [
                _of(windows[place], min(place * length, len(stream) - length), length, lead, (first, int(end)))
                for place in part
            ]
            found = {name: torch.cat([each[name] for each in chosen]) for name in chosen[0]}
            predicted = int((found["labels"] != NOT_MASKED).sum())
            if predicted:
                yield index, found, predicted


def _groups(first: int, last: int) -> Iterator[range]:
    for begin in range(first, last + 1, _MOST_WINDOWS):
        yield range(begin, min(begin + _MOST_WINDOWS, last + 1))


def _of(window: Batch, begin: int, length: int, lead: int, tokens: tuple[int, int]) -> Batch:
    """The window of the tokens from `begin` on, with the labels of `tokens` (first to end) alone."""
    first, end = tokens
    labels = torch.full_like(window["labels"], NOT_MASKED)
    own = slice(lead + min(max(first - begin, 0), length), lead + max(0, min(end - begin, length)))
    labels[:, own] = window["labels"][:, own]
    return {**window, "labels": labels}
