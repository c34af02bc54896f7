"""Which tensor lies where in the flat vector of a parameter set. No torch: the coordinator compares layouts too."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest


@dataclass(frozen=True)
class Entry:
    """One tensor: its name, its shape, and the index of its first element in the vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class Layout:
    """The tensors of a parameter set in order, without gaps; `size` is the number of elements."""

    def __init__(self, tensors: Iterable[tuple[str, Sequence[int]]]) -> None:
        entries, offset = [], 0
        for name, shape in tensors:
            entry = Entry(name, tuple(int(n) for n in shape), offset)
            entries.append(entry)
            offset += entry.count
        self.entries = tuple(entries)
        self.size = offset

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Layout({len(self.entries)} tensors, {self.size} elements, {self.digest[:12]})"

    @cached_property
    def digest(self) -> str:
        """sha256 over names and shapes, hexadecimal."""
        return hashlib.sha256(json.dumps(self.plain(), separators=(",", ":")).encode()).hexdigest()

    def plain(self) -> list[tuple[str, list[int]]]:
        """As it travels in an instruction."""
        return [(entry.name, list(entry.shape)) for entry in self.entries]

    def difference(self, other: Layout) -> str | None:
        """The first tensor in which `other` differs, in words; None if the layouts are equal."""
        for mine, theirs in zip_longest(self.entries, other.entries):
            if mine == theirs:
                continue
            if theirs is None:
                return f"tensor {mine.name!r} {list(mine.shape)} is missing"
            if mine is None:
                return f"tensor {theirs.name!r} {list(theirs.shape)} is too many"
            if mine.name != theirs.name:
                return f"tensor {theirs.name!r} stands where {mine.name!r} belongs"
            return f"tensor {theirs.name!r} has shape {list(theirs.shape)} instead of {list(mine.shape)}"
        return None
