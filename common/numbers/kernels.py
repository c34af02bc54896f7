"""The arithmetic on parameter vectors as loops over their elements, compiled by numba (https://numba.readthedocs.io):
one pass over memory, where torch takes one for every operation.

The bits are those of the same operations by torch, one after the other: each is rounded to float32, none is fused or
moved (numba does neither unless it is told to). Only what is no number may be another pattern of bits. `compiled` says
when these run.

A vector is given as four arrays of one slice, of which `kind` says which are read: PLAIN numbers, the upper HALVES of
numbers (bfloat16), or else scales and steps, STEPS with a byte each (int8) or PAIRS of them in a byte (int4; see
`steps`). All functions let go of the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from common.numbers.compiled import HALVES, PAIRS, PLAIN, STEPS
from common.numbers.slicing import BLOCK, BLOCKS
from common.numbers.steps import LARGEST, MIDDLE

#: The pattern of bits of infinity; above it is no number. And all but the sign.
_INFINITE: Final = 0x7F800000
_NO_SIGN: Final = 0x7FFFFFFF

#: Of PAIRS: elements that share a scale, and half of them. Then the largest step, what is added to a step, the bits of
#: the lower half of a byte, and how many they are; of 32 bits each, because numba counts in 64, which is slower here.
_SHORT: Final = BLOCKS["int4"]
_HALF: Final = _SHORT // 2
_MOST: Final = np.int32(LARGEST["int4"])
_MIDDLE: Final = np.int32(MIDDLE)
_LOWER: Final = np.int32(15)
_FOUR: Final = np.int32(4)

Floats = NDArray[np.float32]
F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F, inline: str = "never") -> F:
    options = {"nogil": True, "error_model": "numpy", "inline": inline}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to keep machine code, as where all is read-only: it is made at every start
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


@partial(_compiled, inline="always")
def _load(
    kind: int,
    plain: Floats,
    halves: NDArray[np.uint16],
    scales: Floats,
    steps: NDArray[np.int8],
    start: int,
    count: int,
    out: Floats,
    bits: NDArray[np.uint32],
) -> None:
    """The numbers of a block, which begins at `start`, into `out`, whose bits are `bits`."""
    if kind == PLAIN:
        for i in range(count):
            out[i] = plain[start + i]
    elif kind == HALVES:
        for i in range(count):
            bits[i] = np.uint32(halves[start + i]) << np.uint32(16)
    elif kind == STEPS:
        scale = scales[start // BLOCK]
        for i in range(count):
            out[i] = np.float32(steps[start + i]) * scale
    else:
        for short in range((count + _SHORT - 1) // _SHORT):
            number, first = start // _SHORT + short, _SHORT * short
            scale = scales[number]
            for i in range(_HALF):
                pair = np.int32(steps[_HALF * number + i])
                out[first + i] = np.float32((pair & _LOWER) - _MIDDLE) * scale
                out[first + _HALF + i] = np.float32(((pair >> _FOUR) & _LOWER) - _MIDDLE) * scale


@partial(_compiled, inline="always")
def _pack(
    sent: Floats, bits: NDArray[np.uint32], first: int, number: int, scales: Floats, pairs: NDArray[np.int8]
) -> None:
    """Write the whole block of pairs of this number, and its scale. What it is made of begins in `sent`, whose bits are
    `bits`, at `first`, and becomes what is read."""
    largest = np.uint32(0)
    for i in range(_SHORT):
        largest = max(largest, bits[first + i] & np.uint32(_NO_SIGN))
    scale = _number(largest) / np.float32(_MOST)
    scales[number] = scale
    divisor = np.float32(1.0) if scale == 0 else scale
    if largest < np.uint32(_INFINITE):
        for i in range(_HALF):
            # a subnormal scale is rounded so much that there would be more steps
            one = min(max(np.int32(np.rint(sent[first + i] / divisor)), -_MOST), _MOST)
            other = min(max(np.int32(np.rint(sent[first + _HALF + i] / divisor)), -_MOST), _MOST)
            sent[first + i] = np.float32(one) * scale
            sent[first + _HALF + i] = np.float32(other) * scale
            pairs[_HALF * number + i] = np.int8(one + _MIDDLE + ((other + _MIDDLE) << _FOUR))
    else:
        for i in range(_HALF):
            sent[first + i] = np.float32(0.0) * scale
            sent[first + _HALF + i] = np.float32(0.0) * scale
            pairs[_HALF * number + i] = np.int8(_MIDDLE + (_MIDDLE << _FOUR))


@_compiled
def hand_in(
    kind: int,
    plain: Floats,
    halves: NDArray[np.uint16],
    scales: Floats,
    steps: NDArray[np.int8],
    local: Floats,
    after: Floats,
    has_residual: bool,
    residual: Floats,
    out_kind: int,
    out_plain: Floats,
    out_halves: NDArray[np.uint16],
    out_scales: Floats,
    out_steps: NDArray[np.int8],
) -> None:
    """Encode a slice of what a vector is ahead of `local`, plus the residual; what that loses is added to it, and
    `local` copied to `after`."""
    size = len(local)
    update, sent = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    update_bits, sent_bits = update.view(np.uint32), sent.view(np.uint32)
    for block in range((size + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        count = min(BLOCK, size - start)
        _load(kind, plain, halves, scales, steps, start, count, update, update_bits)
        for i in range(count):
            update[i] = update[i] - local[start + i]
            after[start + i] = local[start + i]
        if has_residual:
            for i in range(count):
                sent[i] = update[i] + residual[start + i]
        else:
            for i in range(count):
                sent[i] = update[i] + np.float32(0.0)
        if out_kind == PLAIN:
            for i in range(count):
                out_plain[start + i] = sent[i]
        elif out_kind == HALVES:
            for i in range(count):
                # to the nearest, of two as near to the even one
                odd = (sent_bits[i] >> np.uint32(16)) & np.uint32(1)
                half = (sent_bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
                no_number = (sent_bits[i] & np.uint32(_NO_SIGN)) > np.uint32(_INFINITE)
                out_halves[start + i] = np.uint16(0x7FC0) if no_number else np.uint16(half)
                sent_bits[i] = np.uint32(out_halves[start + i]) << np.uint32(16)
        elif out_kind == PAIRS:
            sent[count:] = 0.0
            for short in range((count + _SHORT - 1) // _SHORT):
                _pack(sent, sent_bits, _SHORT * short, start // _SHORT + short, out_scales, out_steps)
        else:
            largest = np.uint32(0)
            for i in range(count):
                # without their signs, numbers are in the order of their bits
                largest = max(largest, sent_bits[i] & np.uint32(_NO_SIGN))
            scale = _number(largest) / np.float32(127.0)
            out_scales[block] = scale
            divisor = np.float32(1.0) if scale == 0 else scale
            if largest < np.uint32(_INFINITE):
                for i in range(count):
                    step = np.int8(np.int32(np.rint(sent[i] / divisor)))
                    out_steps[start + i] = step
                    sent[i] = np.float32(step) * scale
            else:
                for i in range(count):
                    # a finite number has no steps of infinite length, nor has what is no number
                    out_steps[start + i] = 0
                    sent[i] = np.float32(0.0) * scale
        if has_residual:
            for i in range(count):
                residual[start + i] = residual[start + i] + (update[i] - sent[i])


@_compiled
def _number(bits: np.uint32) -> np.float32:
    pattern = np.empty(1, np.uint32)
    pattern[0] = bits
    number: np.float32 = pattern.view(np.float32)[0]
    return number


@_compiled
def accumulate(
    kind: int,
    plain: Floats,
    halves: NDArray[np.uint16],
    scales: Floats,
    steps: NDArray[np.int8],
    coefficient: np.float32,
    total: Floats,
) -> None:
    """Add a slice, times the coefficient, to `total`."""
    size = len(total)
    values = np.empty(BLOCK, np.float32)
    bits = values.view(np.uint32)
    for block in range((size + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        count = min(BLOCK, size - start)
        _load(kind, plain, halves, scales, steps, start, count, values, bits)
        for i in range(count):
            total[start + i] = total[start + i] + values[i] * coefficient
