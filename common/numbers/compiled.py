"""Where the compiled loops of `kernels` run: on vectors of the processor, if numba is there. Elsewhere torch does the
same, operation by operation."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, Final

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.numbers.encodings import EncodedVector, piece_length, pieces
from common.numbers.memory import Bytes
from common.numbers.slicing import SLICE, EncodingName, block_count, encoded_size, slice_length

#: Elements of the shortest vector for which it is worth its memory, about 100 MiB, and a second at the start.
LEAST = 4_000_000

#: Whether the length makes no difference.
_for_all = False

#: Arrays of one slice, as `kernels` takes them.
Slice = tuple[int, NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]

#: What of such a slice is read.
PLAIN: Final = 0
HALVES: Final = 1
STEPS: Final = 2
PAIRS: Final = 3

_KINDS: dict[EncodingName, int] = {"float32": PLAIN, "bfloat16": HALVES, "int8": STEPS, "int4": PAIRS}
_NOTHING = np.empty(0, np.float32), np.empty(0, np.uint16), np.empty(0, np.float32), np.empty(0, np.int8)


def kernels(device: torch.device, size: int) -> Any | None:
    """The module `kernels`, if it is for vectors of so many elements on this device; else None."""
    return _imported() if device.type == "cpu" and (size >= LEAST or _for_all) else None


def take_for_all() -> None:
    """From now on vectors of every length go through the compiled loops in this process: for whoever has so many short
    ones that the start is worth it. A loop is called in a fraction of the time that torch's operations are."""
    global _for_all
    _for_all = True


@cache
def _imported() -> ModuleType | None:
    try:
        from common.numbers import kernels
    except ImportError as error:
        structlog.get_logger().debug("arithmetic by torch alone, which takes longer", why=str(error))
        return None
    return kernels


def slice_of(vector: Tensor | EncodedVector, index: int) -> Slice:
    """Slice `index` of a vector, float32 on the processor or encoded, to be read."""
    if isinstance(vector, Tensor):
        return _read_only((PLAIN, part_of(vector, index), *_NOTHING[1:]))
    return read_slice(vector.bodies[index], slice_length(vector.size, index), vector.encoding)


def part_of(vector: Tensor, index: int) -> NDArray[np.float32]:
    """Slice `index` of a float32 vector on the processor: its own memory."""
    start = index * SLICE
    part: NDArray[np.float32] = vector[start : start + slice_length(vector.numel(), index)].detach().numpy()
    return part


def read_slice(body: Bytes, count: int, encoding: EncodingName) -> Slice:
    """A slice of `count` elements as it was sent, to be read. Raises ValueError if it is not as long."""
    return _read_only(_arrays(body, count, encoding))


def written_slice(body: bytearray, count: int, encoding: EncodingName) -> Slice:
    """The same, to be written."""
    return _arrays(body, count, encoding)


def _arrays(body: Bytes, count: int, encoding: EncodingName) -> Slice:
    if len(body) != encoded_size(count, encoding):
        raise ValueError(f"{encoded_size(count, encoding)} bytes were expected for {count} elements, {len(body)} came")
    plain, halves, scales, steps = _NOTHING
    if encoding == "float32":
        plain = np.frombuffer(body, np.float32)
    elif encoding == "bfloat16":
        halves = np.frombuffer(body, np.uint16)
    else:
        scales = np.frombuffer(body, np.float32, block_count(count, encoding))
        steps = np.frombuffer(body, np.int8, offset=scales.nbytes)
    return _KINDS[encoding], plain, halves, scales, steps


def _read_only(arrays: Slice) -> Slice:
    """Such that nobody may write to; else every loop would be compiled for those and for others."""
    views = [each.view() for each in arrays[1:]]
    for view in views:
        view.flags.writeable = False
    plain, halves, scales, steps = views
    return arrays[0], plain, halves, scales, steps


def add_slice(
    total: Tensor, body: Bytes, encoding: EncodingName, coefficient: float, room: Tensor, loops: Any | None
) -> None:
    """Add an encoded slice, times the coefficient, to `total`, float32 of shape (count,). `room`: of as many elements,
    to be written over. `loops`: `kernels` for the whole vector. Raises ValueError for another length."""
    if loops is not None:
        loops.accumulate(*read_slice(body, total.numel(), encoding), np.float32(coefficient), total.numpy())
        return
    vector = EncodedVector.of_payload(body, total.numel(), encoding)
    for start, stop in pieces(0, total.numel(), piece_length(total.device)):
        total[start:stop].add_(vector.read(0, start, room[: stop - start]).mul_(coefficient))
