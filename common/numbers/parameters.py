"""A parameter set: one flat float32 vector and the layout that says which tensor lies where."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from common.numbers.layout import Layout


@dataclass(frozen=True, eq=False)
class ParameterSet:
    """`vector` is contiguous float32 of shape (layout.size,) on the CPU. All arithmetic is on it or on its slices."""

    layout: Layout
    vector: Tensor

    def __post_init__(self) -> None:
        if self.vector.dtype != torch.float32 or self.vector.shape != (self.layout.size,):
            raise ValueError(
                f"a float32 vector of {self.layout.size} elements was expected, "
                f"{self.vector.dtype} {tuple(self.vector.shape)} came"
            )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ParameterSet:
        """Copy named tensors into one vector, in the mapping's order."""
        layout = Layout((name, tensor.shape) for name, tensor in tensors.items())
        parameter_set = cls(layout, torch.empty(layout.size))
        parameter_set.gather(tensors)
        return parameter_set

    @classmethod
    def from_bytes(cls, layout: Layout, raw: bytes) -> ParameterSet:
        """The set whose `to_bytes` is `raw`. Raises ValueError if the size does not fit the layout."""
        if len(raw) != 4 * layout.size:
            raise ValueError(f"{4 * layout.size} bytes were expected, {len(raw)} came")
        return cls(layout, torch.frombuffer(bytearray(raw), dtype=torch.float32) if raw else torch.empty(0))

    def gather(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the vector from named tensors of the same layout."""
        with torch.no_grad():
            for entry, view in zip(self.layout, self._views, strict=True):
                view.copy_(tensors[entry.name])

    def scatter(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite named tensors of the same layout (a model's parameters) from the vector, in place."""
        with torch.no_grad():
            for entry, view in zip(self.layout, self._views, strict=True):
                tensors[entry.name].copy_(view)

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors, as views into the vector."""
        return {entry.name: view for entry, view in zip(self.layout, self._views, strict=True)}

    def to_bytes(self) -> bytes:
        """The vector, little-endian."""
        return self.vector.numpy().tobytes()

    def digest(self) -> str:
        """sha256 of the vector's bytes, hexadecimal: two sets with this digest are bit for bit the same."""
        return hashlib.sha256(self.vector.numpy().data).hexdigest()

    @cached_property
    def _views(self) -> list[Tensor]:
        return [self.vector[e.offset : e.offset + e.count].view(e.shape) for e in self.layout]
