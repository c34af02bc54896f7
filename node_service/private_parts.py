"""The private encoder and decoder of a node on disk: they never leave the owner's machine.

`spec.json` holds what they depend on besides tensors (a vocabulary, an image shape), `private.safetensors` the tensors,
`trainer.safetensors` the optimiser and the data position, `pinned.json` the encoder and version that they fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.durable import write_durably
from common.encoders.base import EncoderModel, PrivateSpec
from common.errors import UserError


def save_spec(directory: Path, spec: PrivateSpec) -> None:
    """Keep a freshly fitted spec, before anything is trained with it."""
    directory.mkdir(parents=True, exist_ok=True)
    write_durably(directory / "spec.json", json.dumps(spec).encode())


def load_spec(directory: Path) -> PrivateSpec | None:
    """The spec that was saved here; None if there is none. Raises UserError if it is damaged."""
    path = directory / "spec.json"
    if not path.exists():
        return None
    try:
        spec: PrivateSpec = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); restore it from a backup or remove {directory}") from None
    return spec


def save_private(
    directory: Path, model: EncoderModel, trainer_state: dict[str, torch.Tensor], pinned: dict[str, Any]
) -> None:
    """Write the private tensors and the trainer's state; each file is whole or the one before."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.private_parameters().items()}
    _save(directory / "private.safetensors", tensors)
    _save(directory / "trainer.safetensors", trainer_state)
    write_durably(directory / "pinned.json", json.dumps(pinned, indent=1).encode())


def load_private(directory: Path, model: EncoderModel) -> dict[str, torch.Tensor] | None:
    """Put saved private tensors into `model` and give the trainer's state; None if there are none.

    Raises UserError if they are damaged or of another model.
    """
    path = directory / "private.safetensors"
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        state = load_file(directory / "trainer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error}); restore it from a backup or remove {directory}") from None
    parameters = model.private_parameters()
    if {name: tensor.shape for name, tensor in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
        raise UserError(f"{path} is of another model; remove {directory} to start with new private parts")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return dict(state)


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    beside = path.with_suffix(".part")
    save_file(tensors, beside)
    beside.replace(path)
