"""How a flat vector is cut into slices, and how many bytes each encoding makes of them. Plain integers, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

#: How the numbers of a slice become bytes; see `encodings`.
EncodingName = Literal["float32", "bfloat16", "int8", "int4"]

#: Elements of one slice, which is also one chunk: 0.53 MiB of int4, 1 MiB of int8, 2 MiB of bfloat16, 4 MiB of float32.
SLICE = 1 << 20
#: Wherever a part of a slice begins, it is at a multiple of so many elements: a scale begins there in every encoding.
BLOCK = 256
#: Elements that share one float32 scale, in the encodings that have steps and scales. On real updates 128 instead of
#: 256 lowers what int4 loses by more than its bits would as finer steps, and 64 by less (docs/learning.md).
BLOCKS: dict[EncodingName, int] = {"int8": BLOCK, "int4": 128}


def slices(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every slice of a vector of `size` elements; a vector of none still has one, empty, slice."""
    for start in range(0, max(size, 1), SLICE):
        yield start, min(start + SLICE, size)


def slice_count(size: int) -> int:
    """How many slices, and so chunks, a vector of `size` elements has."""
    return max(1, -(-size // SLICE))


def slice_length(size: int, index: int) -> int:
    """How many elements slice `index` of a vector of `size` elements has."""
    return min(SLICE, size - index * SLICE)


def shard_slices(count: int, shards: int) -> list[range]:
    """Which of `count` slices each of so many shards has: as many as any other or one more, in order, so that a shard's
    numbers lie together. Some have none where there are fewer slices than shards."""
    return [range(shard * count // shards, (shard + 1) * count // shards) for shard in range(shards)]


def shard_of(index: int, count: int, shards: int) -> int | None:
    """Which shard has slice `index` of `count`, from 0 on; None where there is but one, which is no shard."""
    return None if shards == 1 else (shards * (index + 1) - 1) // count


def elements(size: int, of: range) -> int:
    """How many elements of a vector of `size` lie in these slices."""
    return max(0, min(size, of.stop * SLICE) - of.start * SLICE) if of else 0


def block_count(count: int, encoding: EncodingName) -> int:
    """How many scales a slice of `count` elements has, of an encoding of BLOCKS."""
    return -(-count // BLOCKS[encoding])


def encoded_size(count: int, encoding: EncodingName) -> int:
    """Bytes of a slice of `count` elements."""
    if encoding == "float32":
        return 4 * count
    if encoding == "bfloat16":
        return 2 * count
    return 4 * block_count(count, encoding) + _steps_size(count, encoding)


def part_ranges(count: int, encoding: EncodingName, start: int, stop: int) -> list[tuple[int, int]]:
    """(offset, length) of the bytes that elements `start` to `stop` of an encoded slice of `count` elements consist of:
    put together they are what these elements alone would be encoded as. `start` is a multiple of BLOCK; `stop` is one
    too, or the slice's end, else others have a share in the last block."""
    assert start % BLOCK == 0, "a part begins with a scale"
    if encoding not in BLOCKS:
        width = encoded_size(1, encoding)
        return [(width * start, width * (stop - start))]
    before, steps = 4 * block_count(start, encoding), 4 * block_count(count, encoding)
    return [
        (before, 4 * block_count(stop - start, encoding)),
        (steps + _steps_size(start, encoding), _steps_size(stop - start, encoding)),
    ]


def payload_size(size: int, encoding: EncodingName) -> int:
    """Bytes of a whole encoded vector of `size` elements."""
    return sum(encoded_size(stop - start, encoding) for start, stop in slices(size))


def slice_bytes(encoding: EncodingName) -> int:
    """Bytes of a whole slice, and so the most that a chunk carries."""
    return encoded_size(SLICE, encoding)


def _steps_size(count: int, encoding: EncodingName) -> int:
    """Bytes of so many steps: one each, or half of one and whole blocks."""
    return count if encoding == "int8" else block_count(count, encoding) * BLOCKS[encoding] // 2
