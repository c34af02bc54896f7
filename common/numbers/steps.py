"""Numbers as whole steps of a scale that a block of them shares: int8 with a byte a step, int4 with half a byte.

A slice of either is all its scales (float32), and then all its steps. int4 has steps from -7 to 7, each with 8 added to
it. The bytes of a block have its first half in their lower halves, its second half in their upper ones; the last block
of a slice is filled up with zeros, at which no reader looks. Every byte is read in one way: a half that is 0, which is
not written, is the step -8, as int8 has -128.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.numbers.memory import Bytes
from common.numbers.slicing import BLOCKS, EncodingName, block_count

#: The largest step that is written. By it, the largest element of a block is the largest step.
LARGEST: dict[EncodingName, int] = {"int8": 127, "int4": 7}
#: Added to a step of int4.
MIDDLE = 8

#: By byte, the sum of the squares of the two steps in it.
_SQUARES = np.square(np.arange(16) - MIDDLE).astype(np.float32)
_SQUARES = (_SQUARES[:, None] + _SQUARES).reshape(-1)
#: Elements of int8, or bytes of int4, whose squares are summed at once.
_PIECE = 1 << 17


class Stepper:
    """Turns numbers into scales and steps, at most `most` of them at once, a multiple of the block. Its scratch is
    kept."""

    def __init__(self, encoding: EncodingName, device: torch.device, most: int) -> None:
        self._encoding = encoding
        block = BLOCKS[encoding]
        one, other = torch.empty((2, most // block, block), device=device)
        self._scratch = one, other

    def put(self, values: Tensor, scales: Tensor, steps: Tensor) -> None:
        """Write what `values`, float32 of shape (count,), become: `scales` are float32, `steps` bytes. The last block
        may be short."""
        count, rows, block = values.numel(), scales.numel(), BLOCKS[self._encoding]
        blocks, absolute = self._scratch if rows == len(self._scratch[0]) else (each[:rows] for each in self._scratch)
        if count < rows * block:
            # it is filled up with zeros
            blocks.view(-1)[:count].copy_(values)
            blocks.view(-1)[count:] = 0
            given = blocks
        else:
            given = values.view(rows, block)
        largest = LARGEST[self._encoding]
        found = torch.amax(torch.abs(given, out=absolute), dim=1, keepdim=True).div_(float(largest))
        scales.copy_(found.view(-1))
        # a block of zeros has scale 0: dividing by 1 instead keeps it at zero
        torch.div(given, found.masked_fill(found == 0, 1.0), out=blocks).round_()
        # steps are finite where the scale is; another device is not asked, because asking would wait for it
        if blocks.device.type != "cpu" or not found.amax().isfinite():
            blocks.nan_to_num_(0)
        if self._encoding == "int8":
            steps.view(torch.int8).copy_(blocks.view(-1)[:count])
            return
        # a subnormal scale is rounded so much that there would be more steps
        first, second = blocks.clamp_(-largest, largest).view(rows, 2, block // 2).unbind(1)
        pairs = torch.add(first, second, alpha=16, out=absolute[:, : block // 2]).add_(MIDDLE * 17)
        steps.view(rows, block // 2).copy_(pairs)


def read_steps(scales: Tensor, steps: Tensor, encoding: EncodingName, out: Tensor) -> Tensor:
    """The numbers that `scales`, float32, and `steps`, bytes, stand for, into `out`, float32 of shape (count,)."""
    count, rows, block = out.numel(), scales.numel(), BLOCKS[encoding]
    whole = count // block
    if encoding == "int8":
        out.copy_(steps.view(torch.int8))
        out[: whole * block].view(whole, block).mul_(scales[:whole].unsqueeze(1))
        if whole < rows:
            out[whole * block :].mul_(scales[whole])
        return out
    blocks = out.view(rows, block) if whole == rows else torch.empty((rows, block), device=out.device)
    pairs = steps.view(rows, block // 2)
    blocks[:, : block // 2].copy_(pairs & 15)
    blocks[:, block // 2 :].copy_(pairs >> 4)
    blocks.sub_(MIDDLE).mul_(scales.unsqueeze(1))
    return out if whole == rows else out.copy_(blocks.view(-1)[:count])


def squares_of_steps(body: Bytes, count: int, encoding: EncodingName) -> float:
    """The sum of squares of the finite numbers of a slice, in float64, without decoding it: Σ scale² Σ steps², block by
    block. The inner sums are of whole numbers below 2^24, so float32 holds them in whatever order they are added."""
    rows = block_count(count, encoding)
    scales = np.frombuffer(body, np.float32, rows)
    of_steps = _squares_of_bytes if encoding == "int8" else _squares_of_halves
    sums = of_steps(np.frombuffer(body, np.uint8, offset=4 * rows), count, rows)
    return float((sums * np.square(scales, dtype=np.float64)).sum())


def _squares_of_bytes(steps: NDArray[np.uint8], count: int, rows: int) -> NDArray[np.float64]:
    """By block, of int8."""
    block = BLOCKS["int8"]
    sums, room = np.empty(rows), np.zeros((_PIECE // block, block), np.float32)
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        first, some = start // block, block_count(stop - start, "int8")
        room.reshape(-1)[: stop - start] = steps[start:stop].view(np.int8)
        room.reshape(-1)[stop - start : some * block] = 0.0
        sums[first : first + some] = np.einsum("ij,ij->i", room[:some], room[:some])
    return sums


def _squares_of_halves(steps: NDArray[np.uint8], count: int, rows: int) -> NDArray[np.float64]:
    """By block, of int4."""
    half = BLOCKS["int4"] // 2
    pairs, sums, room = steps.reshape(rows, half), np.empty(rows), np.empty((_PIECE // half, half), np.float32)
    for start in range(0, rows, len(room)):
        some = pairs[start : start + len(room)]
        np.take(_SQUARES, some, out=room[: len(some)], mode="clip")
        sums[start : start + len(some)] = np.einsum("ij->i", room[: len(some)])
    if rest := count % (2 * half):
        last = np.concatenate([pairs[-1] & 15, pairs[-1] >> 4])[:rest]
        sums[-1] = np.square(last.astype(np.float32) - MIDDLE).sum()
    return sums
