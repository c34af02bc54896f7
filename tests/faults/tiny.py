"""The smallest encoder that is one: a type from another package, by entry point, that needs torch and nothing else.

Processes that train it start in a moment, so that they can be killed by the hundred.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.encoders.base import Architecture, Assets, Batch, EncoderModel, PrivateSpec, Samples
from common.errors import UserError

#: Numbers of one sample, and of the shared encoder's input and output.
VALUES = 4
WIDTH = 8
#: A width that makes three slices of the shared encoder.
WIDE = 1500
#: What nodes need beside the architecture.
ASSETS = {"curve.json": json.dumps([[value / 100, value * value] for value in range(100)]).encode()}


def sends_whole(node: str) -> bool:
    """Whether a node's updates are one message each: every second node's are, the others' come in chunks."""
    return ord(node[-1]) % 2 == 0


def samples(seed: int, count: int = 200) -> np.ndarray[Any, Any]:
    """Points near a curve, float32 (count, VALUES); each seed has a curve of its own."""
    generator = np.random.default_rng(seed)
    line = generator.normal(size=(1, VALUES)) * np.linspace(-1, 1, count)[:, None]
    return np.tanh(line + 0.05 * generator.normal(size=(count, VALUES))).astype(np.float32)


class TinyModel(EncoderModel):
    """Stem, shared layer, head; the task is to fill in one hidden number of each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(VALUES, width)
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, VALUES)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.shared.weight, "bias": self.shared.bias}

    def encode(self, samples: Samples) -> Tensor:
        return torch.as_tensor(np.asarray(samples))

    def batch(self, encoded: Tensor, size: int, generator: torch.Generator) -> Batch:
        rows = encoded[torch.randint(len(encoded), (size,), generator=generator)]
        hidden = torch.nn.functional.one_hot(torch.randint(VALUES, (size,), generator=generator), VALUES)
        return {"x": rows * (1 - hidden), "y": rows}

    def loss(self, batch: Batch) -> Tensor:
        return torch.nn.functional.mse_loss(self.head(torch.tanh(self.shared(self.stem(batch["x"])))), batch["y"])

    def features(self, samples: Samples) -> Tensor:
        with torch.no_grad():
            return torch.tanh(self.shared(self.stem(self.encode(samples))))

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), directory / "model.safetensors")


class TinyEncoderType:
    """Registered by the entry point in `plugin/`."""

    name = "tiny"

    def architecture(self, overrides: Mapping[str, Any]) -> Architecture:
        return {"width": WIDTH, **overrides}

    def architecture_of(self, directory: Path) -> tuple[Architecture, dict[str, Tensor]]:
        return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")

    def assets(self, architecture: Architecture, sources: Mapping[str, str]) -> tuple[Architecture, dict[str, bytes]]:
        """One that every node must have, bit for bit."""
        return architecture, dict(ASSETS)

    def initial(self, architecture: Architecture, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return {name: p.detach() for name, p in TinyModel(architecture["width"]).shared_parameters().items()}

    def fit_private(
        self, samples: Samples, architecture: Architecture, settings: Mapping[str, Any], assets: Assets
    ) -> PrivateSpec:
        if dict(assets) != ASSETS:
            raise UserError(f"these are not the assets of type tiny: {sorted(assets)}; get them from the master")
        return {"values": VALUES}

    def build(self, architecture: Architecture, private: PrivateSpec, seed: int) -> EncoderModel:
        torch.manual_seed(seed)
        return TinyModel(architecture["width"])

    def export_shared(
        self,
        directory: Path,
        architecture: Architecture,
        tensors: Mapping[str, Tensor],
        card: str,
        assets: Assets,
    ) -> None:
        (directory / "config.json").write_text(json.dumps(architecture))
        (directory / "README.md").write_text(card)
        for name, content in assets.items():
            (directory / name).write_bytes(content)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
