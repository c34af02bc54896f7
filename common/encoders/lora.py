"""`shared = "lora"`: a base that stays as it was given, and of W + (alpha / rank)·B·A of its matrices B alone travels.

Why A stands still. An aggregation rule takes means of what travels. If both factors did, it would make mean(B)·mean(A)
of them, which is not the mean of the products B·A that nodes have trained, and no rule could mend that afterwards. With
one A for all, drawn from a seed and never sent, the mean of the B is the B of the mean: merging is linear, so what
holds of an encoder that shares everything holds here too (FFA-LoRA, Sun et al. 2024, arXiv:2403.12313).
The base's embeddings, head and decoder do not move: a head that moved would be most of an update of a small model, and
its gradient says which tokens a text uses, as that of the embeddings does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.encoders import masked_lm
from common.encoders.adapters import LowRank, Switch, correct
from common.encoders.base import Architecture
from common.encoders.settings import LARGEST, EncoderSettings, Positive, checked
from common.encoders.text_settings import TextTask
from common.errors import UserError

#: Beside an export, whose matrices have it merged: the update itself, and the architecture that it is of.
UPDATE = "lora.safetensors"


class LoraSettings(EncoderSettings):
    """Rank and scale; which matrices of the blocks; the seed of every A; and whether the base travels as an asset or
    each node names a copy of its own (None: it travels if it is small enough)."""

    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 8
    lora_alpha: Positive = 16.0
    lora_matrices: Literal["all", "attention", "feed-forward"] = "all"
    lora_seed: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    lora_base: Literal["travels", "named"] | None = None


class LoraTask(LoraSettings, TextTask):
    """The task's settings too; what else an architecture says comes from the base."""


def settings_of(architecture: Architecture) -> LoraSettings:
    """The settings in an architecture. Raises UserError for values that do not fit."""
    own = {key: architecture[key] for key in LoraSettings.model_fields if key in architecture}
    return checked(LoraSettings, "architecture of type text", own)


def plain(architecture: Architecture) -> Architecture:
    """The architecture of the whole model that base and update make together."""
    own = {*LoraSettings.model_fields, "base_digest"}
    return {key: value for key, value in architecture.items() if key not in own} | {"shared": "all"}


def matrices(network: Any, which: str) -> dict[str, nn.Linear]:
    """The linear layers of the blocks that are updated, by their names in the masked language model, in order."""
    names = {id(module): name for name, module in network.named_modules()}
    return {
        names[id(module)]: module
        for block in masked_lm.blocks(network)
        for inside, module in block.named_modules()
        if isinstance(module, nn.Linear) and which in ("all", _part(inside))
    }


def _part(inside: str) -> str:
    """What a layer is for, by its name in the block: every model here calls its attention so, and nothing else."""
    return "attention" if inside.startswith("att") else "feed-forward"


def frozen_factor(seed: int, name: str, rank: int, columns: int) -> Tensor:
    """A of one matrix, float32 (rank, columns): uniform, with variance 1 / columns.

    The bits come from SHAKE-256 and everything after it is exact or rounded as IEEE 754 says, so that everybody has the
    same numbers, whatever the machine and the versions; torch's own differ between processors.
    """
    drawn = hashlib.shake_256(f"{seed} {name}".encode()).digest(4 * rank * columns)
    integers = np.frombuffer(drawn, "<u4").astype(np.float64)
    uniform = (integers + 0.5) / 2**31 - 1.0
    return torch.from_numpy((uniform * math.sqrt(3.0 / columns)).astype(np.float32)).reshape(rank, columns)


class Corrections(nn.Module):
    """The updates of a network's matrices, acting on it: each begins as nothing. The network's own parameters become
    buffers, which no optimiser, checkpoint or update sees, but for the bias of its decoder, which is each node's own.
    """

    bias: Tensor

    def __init__(self, network: Any, architecture: Architecture) -> None:
        """Raises UserError for a rank that is more than a matrix has."""
        super().__init__()
        self._architecture = architecture
        self._parts = nn.ModuleList()
        self._names = []
        for name, (layer, down) in _factors(network, architecture).items():
            rows, columns = layer.weight.shape
            part = LowRank(rows, columns, len(down), down)
            correct(layer, part, Switch())
            self._parts.append(part)
            self._names.append(name)
        bias = masked_lm.decoder(network).bias
        #: The base's own bias of the decoder, (entries,).
        self.register_buffer("bias", bias.detach().clone(), persistent=False)
        self._frozen = _freeze(network, bias)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Every B, (rows, rank), by the name of its matrix."""
        return {name: part.up for name, part in zip(self._names, self._parts, strict=True)}  # type: ignore[misc]

    def merge_into(self, network: Any) -> None:
        """Make a copy of the network a plain model, whose matrices have the updates in them."""
        made: dict[int, nn.Parameter] = {}
        for place, leaf in self._frozen:
            module = network.get_submodule(place)
            tensor = module._buffers.pop(leaf)
            module.register_parameter(leaf, made.setdefault(id(tensor), nn.Parameter(tensor)))
        network.tie_weights()  # on a GPU, what is tied as a parameter is two buffers
        merge(network, self._architecture, self.shared_parameters())


def initial(network: Any, architecture: Architecture) -> dict[str, Tensor]:
    """Version 0: nothing is added yet. Only the shapes of the network are looked at."""
    rank = settings_of(architecture).lora_rank
    return {
        name: torch.zeros(layer.weight.shape[0], rank) for name, (layer, _) in _factors(network, architecture).items()
    }


@torch.no_grad()
def merge(network: Any, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Add what is updated to the matrices of a plain model. Raises ValueError for tensors of another architecture."""
    factors = _factors(network, architecture)
    if list(factors) != list(tensors):
        raise ValueError(f"tensors {list(factors)} were expected, {list(tensors)} came")
    for name, (layer, down) in factors.items():
        wanted = (layer.weight.shape[0], len(down))
        if tensors[name].shape != wanted:
            raise ValueError(f"{name}: {wanted} was expected, {tuple(tensors[name].shape)} came")
        layer.weight.add_(tensors[name] @ down.to(tensors[name].device))


def save_update(directory: Path, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Keep the update by itself beside its export, for `read_update`."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    order = {"architecture": json.dumps(architecture), "order": json.dumps(list(kept))}
    save_file(kept, directory / UPDATE, metadata=order)


def read_update(directory: Path) -> tuple[Architecture, dict[str, Tensor]] | None:
    """What `save_update` kept in an export; None if there is none. Raises UserError if it is damaged."""
    path = directory / UPDATE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            return json.loads(told["architecture"]), {name: file.get_tensor(name) for name in json.loads(told["order"])}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is not readable as an update of a base ({error}); export the encoder again") from None


def _factors(network: Any, architecture: Architecture) -> dict[str, tuple[nn.Linear, Tensor]]:
    """By the name of each B: the layer, and (alpha / rank)·A."""
    settings = settings_of(architecture)
    found: dict[str, tuple[nn.Linear, Tensor]] = {}
    for name, layer in matrices(network, settings.lora_matrices).items():
        rows, columns = layer.weight.shape
        if settings.lora_rank > min(rows, columns):
            raise UserError(
                f"lora_rank {settings.lora_rank} is more than {name} has, which is {rows} × {columns}; lower it"
            )
        factor = frozen_factor(settings.lora_seed, name, settings.lora_rank, columns)
        found[f"{name}.lora_B"] = layer, factor * (settings.lora_alpha / settings.lora_rank)
    return found


def _freeze(network: Any, but: nn.Parameter) -> list[tuple[str, str]]:
    """Make the network's parameters buffers, tied ones one; gives where they were, by module and name."""
    places: list[tuple[str, str]] = []
    made: dict[int, Tensor] = {}
    for place, module in network.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter is not but:
                del module._parameters[leaf]
                module.register_buffer(leaf, made.setdefault(id(parameter), parameter.detach()))
                places.append((place, leaf))
    return places
