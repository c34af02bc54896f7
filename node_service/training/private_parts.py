"""The private encoder and decoder of a node: they never leave the owner's machine.

`spec.json` holds what they depend on besides tensors (a vocabulary, an image shape); the tensors are in the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from common.durable import write_durably
from common.encoders.base import EncoderModel, PrivateSpec
from common.errors import UserError
from node_service.training.checkpoint import Checkpoint, read_checkpoint


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


def load_private(directory: Path, model: EncoderModel) -> Checkpoint | None:
    """Put the checkpoint's private tensors into `model`, and give the whole of it; None if there is none.

    Raises UserError if it is damaged or of another model.
    """
    checkpoint = read_checkpoint(directory)
    if checkpoint is None:
        return None
    parameters = model.private_parameters()
    saved = {name: tensor.shape for name, tensor in checkpoint.private.items()}
    if saved != {name: parameter.shape for name, parameter in parameters.items()}:
        raise UserError(
            f"the checkpoint in {directory} is of another model; remove {directory} to start with new private parts"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.private[name])
    return checkpoint
