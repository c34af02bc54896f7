"""An encoder of any size whose training is a constant, so that what is measured is everything but training.

A step adds the same small number to every shared parameter: one pass over them, no gradient, no optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.encoders.base import Architecture, Assets, Batch, EncoderModel, PrivateSpec, Samples
from common.errors import UserError

#: The shared parameters are cut into so many tensors, as many as a small transformer has.
_TENSORS = 48
_STEP = 1e-4


def samples() -> list[float]:
    """What the entry point of a node's corpus gives; nobody looks at it."""
    return [float(number) for number in range(100)]


def shapes(parameters: int) -> dict[str, int]:
    """The elements of each tensor by name; together `parameters`."""
    tensors = min(_TENSORS, parameters)
    cut, rest = divmod(parameters, tensors)
    return {f"layer.{index}": cut + (index < rest) for index in range(tensors)}


class ConstantModel(EncoderModel):
    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.zeros(count)) for count in shapes(parameters).values())
        self.head = nn.Parameter(torch.zeros(1))

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return {f"layer.{index}": parameter for index, parameter in enumerate(self.layers)}

    def encode(self, samples: Samples) -> Tensor:
        return torch.as_tensor(np.asarray(samples))

    def batch(self, encoded: Tensor, size: int, generator: torch.Generator) -> Batch:
        return {"nothing": torch.zeros(1)}

    def loss(self, batch: Batch) -> Tensor:
        return torch.ones(())

    def backward(self, loss: Tensor) -> None:
        with torch.no_grad():
            for parameter in self.layers:
                parameter.add_(_STEP)

    def features(self, samples: Samples) -> Tensor:
        raise UserError("a constant has no features")

    def export(self, directory: Path) -> None:
        """Nothing: it is not what is measured."""
        directory.mkdir(parents=True, exist_ok=True)


class ConstantType:
    """Registered by the entry point in `plugin/`."""

    name = "constant"

    def architecture(self, overrides: Mapping[str, Any]) -> Architecture:
        return {"parameters": 1000, **overrides}

    def architecture_of(
        self, directory: Path, overrides: Mapping[str, Any] | None = None
    ) -> tuple[Architecture, dict[str, Tensor]]:
        raise UserError("a constant is not continued")

    def assets(self, architecture: Architecture, sources: Mapping[str, str]) -> tuple[Architecture, dict[str, bytes]]:
        return architecture, {}

    def initial(self, architecture: Architecture, seed: int) -> dict[str, Tensor]:
        return {name: torch.zeros(count) for name, count in shapes(architecture["parameters"]).items()}

    def fit_private(
        self, samples: Samples, architecture: Architecture, settings: Mapping[str, Any], assets: Assets
    ) -> PrivateSpec:
        return {}

    def build(self, architecture: Architecture, private: PrivateSpec, seed: int) -> EncoderModel:
        return ConstantModel(architecture["parameters"])

    def export_shared(
        self,
        directory: Path,
        architecture: Architecture,
        tensors: Mapping[str, Tensor],
        card: str,
        assets: Assets,
    ) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
