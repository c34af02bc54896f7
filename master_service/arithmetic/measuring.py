"""What is looked at in an update while it comes: whether all its numbers are finite, and their L2 norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.numbers.encodings import decode_into, squares_of_slice
from common.numbers.memory import Bytes
from common.numbers.slicing import BLOCKS, SLICE, EncodingName, encoded_size, slice_count, slice_length

#: Elements summed at once for a norm; a fixed block and a single thread give the same sum everywhere.
_NORM_BLOCK = 1 << 16


def scratch() -> Tensor:
    """Room for a slice, float32, that measurements which do not overlap share: fresh memory costs more than what is
    done in it."""
    return torch.empty(SLICE)


class Measurement:
    """Of an encoded vector of `size` elements, slice by slice in their order, by the same sums however it comes."""

    def __init__(self, size: int, encoding: EncodingName, room: Tensor) -> None:
        """`room`: see `scratch`."""
        self._size = size
        self._encoding = encoding
        self._room = room
        self._next = 0
        self._fits = True
        #: What the norm is the root of the sum of, added in order.
        self.squares: list[float] = []

    def add(self, body: Bytes) -> None:
        """The slice that comes next."""
        index, self._next = self._next, self._next + 1
        if not self._fits or index >= slice_count(self._size):
            self._fits = False
            return
        count = slice_length(self._size, index)
        if len(body) != encoded_size(count, self._encoding):
            self._fits = False
            return
        if self._encoding in BLOCKS:
            self.squares.append(squares_of_slice(body, count, self._encoding))
            return
        if self._encoding == "float32":
            values = np.frombuffer(body, np.float32)
        else:
            values = decode_into(body, self._room[:count], self._encoding).numpy()
        self.squares += squares_of(values)

    @property
    def complete(self) -> bool:
        """Whether it fitted, in whole and in each slice."""
        return self._fits and self._next == slice_count(self._size)

    def result(self) -> tuple[bool, float]:
        """(finite, L2 norm); (False, 0) if it did not fit, in whole or in a slice, or something is not finite."""
        norm = norm_of(self.squares)
        return (True, norm) if self.complete and math.isfinite(norm) else (False, 0.0)


def norm_of(squares: Iterable[float]) -> float:
    """The root of their sum, added in order, one after the other: whoever measured them."""
    total = 0.0
    for each in squares:
        total += each
    return math.sqrt(total) if total >= 0 else math.nan


def squares_of(values: NDArray[np.float32]) -> Iterator[float]:
    """The sums of squares of fixed blocks, to be added in order: the same whatever the number of threads."""
    for start in range(0, len(values), _NORM_BLOCK):
        yield float(np.square(values[start : start + _NORM_BLOCK], dtype=np.float64).sum())
