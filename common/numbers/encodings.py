"""How a slice of a vector becomes bytes: float32, bfloat16, or steps of scales that blocks share (int8, int4; see
`steps`).

A vector is encoded slice by slice (see `slicing`), so that every slice is a chunk of its own, fits the cache and is
decoded without its neighbours. Steps lose up to half of one per element; `feedback` carries what was lost into the next
update. Inside a slice all work goes piece by piece: a piece stays in a core's cache between one operation and the next,
and what is written is a buffer that is there already. The bits do not depend on where a piece ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.numbers.memory import Bytes
from common.numbers.slicing import (
    BLOCKS,
    SLICE,
    EncodingName,
    block_count,
    encoded_size,
    part_ranges,
    payload_size,
    slice_bytes,
    slice_length,
    slices,
)
from common.numbers.steps import Stepper, read_steps, squares_of_steps

#: Elements of a piece on a CPU: 512 KiB, so that the few that an operation reads and writes stay in the cache of a
#: core, and calling it is little beside what it does. A multiple of BLOCK. On another device a piece is a slice: there
#: it counts how few operations there are.
PIECE = 1 << 17

#: How a number is held in the encodings that have no steps.
_TYPES: dict[EncodingName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: The largest scale with which no step is infinite.
_LARGEST_SCALE = np.float32(np.finfo(np.float32).max / 128)


def piece_length(device: torch.device) -> int:
    """Elements of a piece on this device."""
    return PIECE if device.type == "cpu" else SLICE


def pieces(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every piece of a slice; none of an empty one."""
    for begin in range(start, stop, length):
        yield begin, min(begin + length, stop)


class SliceEncoder:
    """Encodes slices one after the other, a piece at a time, on the device of what it is given. Its scratch is kept."""

    def __init__(self, encoding: EncodingName, device: torch.device) -> None:
        self.encoding = encoding
        self._device = device
        self._count = 0
        self._body = torch.empty(0, dtype=torch.uint8, device=device)
        self._stepper = Stepper(encoding, device, piece_length(device)) if encoding in BLOCKS else None

    def begin(self, count: int) -> None:
        """Begin a slice of so many elements, over the one before."""
        size = encoded_size(count, self.encoding)
        self._count = count
        if self._body.numel() != size:
            self._body = torch.empty(size, dtype=torch.uint8, device=self._device)

    def put(self, start: int, values: Tensor) -> None:
        """Encode the slice's elements from `start`, a multiple of BLOCK, on. `values` is float32 of shape (count,)."""
        scales, numbers = self._part(start, start + values.numel())
        if self._stepper is None:
            numbers.copy_(values)
        else:
            self._stepper.put(values, scales, numbers)

    def back(self, start: int, out: Tensor) -> Tensor:
        """What the elements from `start` on are decoded as, into `out`, float32 of shape (count,)."""
        scales, numbers = self._part(start, start + out.numel())
        return out.copy_(numbers) if self._stepper is None else read_steps(scales, numbers, self.encoding, out)

    def body(self) -> bytes:
        """The bytes of the slice."""
        return self._body.cpu().numpy().tobytes()

    def _part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The scales of some elements, if any, and their numbers, to be read and written."""
        ranges = part_ranges(self._count, self.encoding, start, stop)
        *scales, numbers = (self._body[offset : offset + length] for offset, length in ranges)
        if scales:
            return scales[0].view(torch.float32), numbers
        return self._body[:0], numbers.view(_TYPES[self.encoding])


class EncodedVector:
    """A vector of `size` elements as its encoded slices, decoded where it is read. Raises ValueError for slices that
    are not as long as slices of such a vector are."""

    def __init__(self, bodies: Sequence[Bytes], size: int, encoding: EncodingName) -> None:
        wanted = [encoded_size(stop - start, encoding) for start, stop in slices(size)]
        if [len(body) for body in bodies] != wanted:
            came = sum(len(body) for body in bodies)
            raise ValueError(f"{sum(wanted)} bytes were expected for {size} elements, {came} came")
        self.size = size
        self.encoding = encoding
        self.bodies = bodies

    @classmethod
    def of_payload(cls, payload: Bytes, size: int, encoding: EncodingName) -> EncodedVector:
        """Of slices that stand one behind the other; not copied. Raises ValueError if the length does not fit."""
        if len(payload) != payload_size(size, encoding):
            raise ValueError(
                f"{payload_size(size, encoding)} bytes were expected for {size} elements, {len(payload)} came"
            )
        view, width = memoryview(payload), slice_bytes(encoding)
        return cls([view[at : at + width] for at in range(0, max(len(view), 1), width)], size, encoding)

    def read(self, index: int, start: int, out: Tensor) -> Tensor:
        """Decode a part of slice `index`, from its element `start`, a multiple of BLOCK, on into `out`, float32 of
        shape (count,)."""
        return _decode(self.bodies[index], slice_length(self.size, index), self.encoding, start, out)

    def decode(self, out: Tensor) -> Tensor:
        """All of it into `out`, float32 of shape (size,)."""
        for index, (start, stop) in enumerate(slices(self.size)):
            decode_into(self.bodies[index], out[start:stop], self.encoding)
        return out


def encode_slice(values: Tensor, encoding: EncodingName) -> bytes:
    """The bytes of a float32 slice of shape (count,). A value that is not finite survives as one that is not finite."""
    return _encoded(SliceEncoder(encoding, values.device), values)


def decode_into(data: Bytes, out: Tensor, encoding: EncodingName) -> Tensor:
    """Decode a slice into `out`, float32 of shape (count,), on any device. Raises ValueError if `data` is not
    `encoded_size(count)` long."""
    count = out.numel()
    if len(data) != encoded_size(count, encoding):
        raise ValueError(f"{encoded_size(count, encoding)} bytes were expected for {count} elements, {len(data)} came")
    for start, stop in pieces(0, count, piece_length(out.device)):
        _decode(data, count, encoding, start, out[start:stop])
    return out


def decode_slice(data: Bytes, count: int, encoding: EncodingName) -> Tensor:
    """A fresh float32 tensor of shape (count,). Raises ValueError if `data` is not `encoded_size(count)` long."""
    return decode_into(data, torch.empty(count), encoding)


def encode_vector(vector: Tensor, encoding: EncodingName) -> list[bytes]:
    """One body per slice."""
    return list(encoded_slices(vector, encoding))


def encoded_slices(vector: Tensor, encoding: EncodingName) -> Iterator[bytes]:
    """The same, one after the other."""
    encoder = SliceEncoder(encoding, vector.device)
    return (_encoded(encoder, vector[start:stop]) for start, stop in slices(vector.numel()))


def decode_vector(payload: Bytes, size: int, encoding: EncodingName) -> Tensor:
    """The float32 vector of shape (size,) of the concatenated slices. Raises ValueError if the length does not fit."""
    return EncodedVector.of_payload(payload, size, encoding).decode(torch.empty(size))


def is_finite(payload: Bytes, size: int, encoding: EncodingName) -> bool:
    """Whether every number of an encoded vector is finite, without decoding it: a float says so by its exponent, and a
    step by its scale. Raises ValueError if the length does not fit."""
    vector = EncodedVector.of_payload(payload, size, encoding)
    return all(_is_finite(body, slice_length(size, index), encoding) for index, body in enumerate(vector.bodies))


def squares_of_slice(body: Bytes, count: int, encoding: EncodingName) -> float:
    """The sum of squares of the numbers of a slice that has steps, in float64, without decoding it; infinite where one
    of the decoded numbers is, or is no number."""
    return squares_of_steps(body, count, encoding) if _is_finite(body, count, encoding) else math.inf


def _encoded(encoder: SliceEncoder, values: Tensor) -> bytes:
    encoder.begin(values.numel())
    for start, stop in pieces(0, values.numel(), piece_length(values.device)):
        encoder.put(start, values[start:stop])
    return encoder.body()


def _decode(data: Bytes, count: int, encoding: EncodingName, start: int, out: Tensor) -> Tensor:
    """Elements of a slice of `count`, from `start` on."""
    parts = [
        np.frombuffer(data, np.uint8, length, offset)
        for offset, length in part_ranges(count, encoding, start, start + out.numel())
    ]
    if encoding == "float32" and out.device.type == "cpu":
        np.copyto(out.numpy(), parts[0].view(np.float32))
        return out
    # a copy that fits the cache: torch takes no bytes that it might not write to
    *scales, numbers = (torch.from_numpy(part.copy()).to(out.device) for part in parts)
    if scales:
        return read_steps(scales[0].view(torch.float32), numbers, encoding, out)
    return out.copy_(numbers.view(_TYPES[encoding]))


def _is_finite(body: Bytes, count: int, encoding: EncodingName) -> bool:
    if encoding in BLOCKS:
        scales = np.abs(np.frombuffer(body, np.float32, block_count(count, encoding)))
        if bool((scales <= _LARGEST_SCALE).all()):
            return True
        # too large a scale may still stand beside small steps
        return bool(decode_slice(body, count, encoding).isfinite().all())
    numbers: np.ndarray[Any, Any]
    if encoding == "float32":
        numbers, exponent = np.frombuffer(body, np.uint32, count), 0x7F800000
    else:
        numbers, exponent = np.frombuffer(body, np.uint16, count), 0x7F80
    # of an infinity and of what is no number all bits of the exponent are set
    return all(bool(((numbers[start:stop] & exponent) != exponent).all()) for start, stop in pieces(0, count, PIECE))
