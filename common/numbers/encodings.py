"""How a slice of a vector becomes bytes: float32, bfloat16, or int8 in blocks of 256 with one float32 scale each.

A vector is encoded slice by slice (see `slicing`), so that every slice is a chunk of its own, fits the cache and is
decoded without its neighbours. int8 loses up to half a step per element; `feedback` carries what was lost into the next
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
    BLOCK,
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

#: Elements of a piece on a CPU: 512 KiB, so that the few that an operation reads and writes stay in the cache of a
#: core, and calling it is little beside what it does. A multiple of BLOCK. On another device a piece is a slice: there
#: it counts how few operations there are.
PIECE = 1 << 17

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
        self._scratch: tuple[Tensor, Tensor] | None = None
        if encoding == "int8":
            one, other = torch.empty((2, piece_length(device) // BLOCK, BLOCK), device=device)
            self._scratch = one, other

    def begin(self, count: int) -> None:
        """Begin a slice of so many elements, over the one before."""
        size = encoded_size(count, self.encoding)
        self._count = count
        if self._body.numel() != size:
            self._body = torch.empty(size, dtype=torch.uint8, device=self._device)

    def put(self, start: int, values: Tensor) -> None:
        """Encode the slice's elements from `start`, a multiple of BLOCK, on. `values` is float32 of shape (count,)."""
        stop = start + values.numel()
        if self.encoding == "int8":
            self._steps(start, values)
        else:
            self._view()[start:stop].copy_(values)

    def back(self, start: int, out: Tensor) -> Tensor:
        """What the elements from `start` on are decoded as, into `out`, float32 of shape (count,)."""
        stop = start + out.numel()
        out.copy_(self._view()[start:stop])
        return out if self.encoding != "int8" else _scale(out, self._scales()[start // BLOCK :])

    def body(self) -> bytes:
        """The bytes of the slice."""
        return self._body.cpu().numpy().tobytes()

    def _view(self) -> Tensor:
        """One number of the encoding for each element."""
        if self.encoding == "int8":
            return self._body[4 * block_count(self._count) :].view(torch.int8)
        return self._body.view(torch.float32 if self.encoding == "float32" else torch.bfloat16)

    def _scales(self) -> Tensor:
        return self._body[: 4 * block_count(self._count)].view(torch.float32)

    def _steps(self, start: int, values: Tensor) -> None:
        assert self._scratch is not None
        count = values.numel()
        rows = block_count(count)
        blocks, absolute = self._scratch if rows == len(self._scratch[0]) else (each[:rows] for each in self._scratch)
        if count < rows * BLOCK:
            # the last block of a slice may be short: it is filled up with zeros
            blocks.view(-1)[:count].copy_(values)
            blocks.view(-1)[count:] = 0
            given = blocks
        else:
            given = values.view(rows, BLOCK)
        scales = torch.amax(torch.abs(given, out=absolute), dim=1, keepdim=True).div_(127.0)
        self._scales()[start // BLOCK : start // BLOCK + rows].copy_(scales.view(-1))
        # a block of zeros has scale 0: dividing by 1 instead keeps it at zero
        torch.div(given, scales.masked_fill(scales == 0, 1.0), out=blocks).round_()
        # steps are finite where the scale is; another device is not asked, because asking would wait for it
        if blocks.device.type != "cpu" or not math.isfinite(scales.amax()):
            blocks.nan_to_num_(0)
        self._view()[start : start + count].copy_(blocks.view(-1)[:count])


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


def squares_of_steps(body: Bytes, count: int) -> float:
    """The sum of squares of the numbers of an int8 slice, in float64, without decoding it: Σ scale² Σ steps², block by
    block. The inner sums are of whole numbers below 2^24, so float32 holds them in whatever order they are added.
    Infinite or no number where one of the decoded numbers is."""
    if not _is_finite(body, count, "int8"):
        return math.inf
    rows = block_count(count)
    scales, steps = np.frombuffer(body, np.float32, rows), np.frombuffer(body, np.int8, count, 4 * rows)
    sums, room = np.empty(rows), np.zeros((PIECE // BLOCK, BLOCK), np.float32)
    for start, stop in pieces(0, count, PIECE):
        first, some = start // BLOCK, block_count(stop - start)
        room.reshape(-1)[: stop - start] = steps[start:stop]
        room.reshape(-1)[stop - start : some * BLOCK] = 0.0
        sums[first : first + some] = np.einsum("ij,ij->i", room[:some], room[:some])
    return float((sums * np.square(scales, dtype=np.float64)).sum())


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
    out.copy_(numbers.view(torch.int8 if scales else torch.float32 if encoding == "float32" else torch.bfloat16))
    return _scale(out, scales[0].view(torch.float32)) if scales else out


def _scale(steps: Tensor, scales: Tensor) -> Tensor:
    """Multiply each block of `steps`, shape (count,), with its scale, in place."""
    whole = steps.numel() // BLOCK
    steps[: whole * BLOCK].view(whole, BLOCK).mul_(scales[:whole].unsqueeze(1))
    if whole * BLOCK < steps.numel():
        steps[whole * BLOCK :].mul_(scales[whole])
    return steps


def _is_finite(body: Bytes, count: int, encoding: EncodingName) -> bool:
    if encoding == "int8":
        scales = np.abs(np.frombuffer(body, np.float32, block_count(count)))
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
