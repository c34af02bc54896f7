"""The model that an encoder with shared = "lora" is an update of: where each side has it from, and that it is the same.

A small one travels once, as an asset; of a larger one every node names a copy of its own. Either way the architecture
says by a digest which numbers are meant, and how the model is built: a copy's own config.json decides nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.encoders import hugging_face, masked_lm
from common.encoders.base import BASE_DIRECTORY, Architecture, Assets, PrivateSpec
from common.errors import UserError
from common.wire.fields import MAX_ASSET_BYTES

#: The asset's name.
ASSET = "base.safetensors"
_FILES = ("model.safetensors", "model.safetensors.index.json")


class BaseUnusable(UserError):
    """The owner's copy of a base does not serve. Where it lies is nobody else's business."""

    @property
    def public(self) -> str:
        return "private.base names no directory here that holds a whole masked language model as safetensors"


@dataclass(frozen=True)
class Base:
    """A masked language model of a Hugging Face directory: its configuration, and all its parameters after tying,
    float32."""

    config: Any
    tensors: dict[str, Tensor]

    @property
    def digest(self) -> str:
        return digest_of(self.tensors)

    def asset(self) -> bytes | None:
        """As it travels; None if it is too large for that."""
        if 4 * sum(tensor.numel() for tensor in self.tensors.values()) > MAX_ASSET_BYTES:
            return None
        content: bytes = save(self.tensors)
        return content if len(content) <= MAX_ASSET_BYTES else None


def read(directory: Path) -> Base:
    """The base in a directory, out of safetensors alone; no code in it is run.

    Raises UserError if it is none, lacks a part (a head, most often), or has a decoder of its own.
    """
    hugging_face.read_config(directory, *masked_lm.KINDS)
    if not any((directory / name).is_file() for name in _FILES):
        raise UserError(f"{directory} has no {_FILES[0]}; save it as safetensors, nothing else is read of a base")
    network, missing = hugging_face.load_model(directory, masked=True)
    parameters = dict(network.named_parameters())
    if lost := sorted(missing & parameters.keys()):
        raise UserError(
            f"{directory} lacks {len(lost)} tensors of a masked language model, {lost[0]!r} the first; fit them once "
            f"by shared-encoder attach {directory} --corpus TEXTS --steps 0 --out BASE, and name BASE"
        )
    if masked_lm.decoder(network).weight is not masked_lm.embeddings(network).weight:
        raise UserError(f"{directory}: its decoder is not tied to its embeddings, as a base's has to be; take another")
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    _check_finite(str(directory), tensors)
    return Base(network.config, tensors)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and float32 numbers, hexadecimal; how files order or split them does not matter."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {list(tensors[name].shape)}\n".encode())
        found.update(tensors[name].contiguous().numpy().data)
    return found.hexdigest()


def located(architecture: Architecture, own: str | None, assets: Assets) -> PrivateSpec:
    """What a node's private spec keeps of where its base is: the asset itself, or the directory that its owner named.

    Raises UserError if it did not come, was not named, or is another than the architecture's.
    """
    if architecture.get("lora_base") == "travels":
        content = assets.get(ASSET)
        if content is None:
            raise UserError(f"this encoder is an update of a base that travels, and its {ASSET} did not come")
        spec = {"base_tensors": base64.b64encode(content).decode()}
    elif own is None:
        raise UserError(
            f"this encoder is an update of a base that does not travel, sha256 {architecture.get('base_digest')}; name "
            "the directory of your copy with private.base"
        )
    else:
        spec = {"base_directory": str(Path(own).resolve())}
    of_spec(spec, architecture)  # read here too, so that an instruction which asks for another base is refused
    return spec


def of_spec(spec: PrivateSpec, architecture: Architecture) -> dict[str, Tensor]:
    """The base's tensors. Raises UserError if they are gone, or are not those that the architecture says."""
    if "base_tensors" in spec:
        try:
            return _matching(_parsed(base64.b64decode(spec["base_tensors"])), architecture)
        except binascii.Error:
            raise UserError("the base that a node has kept is damaged; remove the encoder's state there") from None
    try:
        # where it was named at the beginning: a node's later private.base is for the encoders that it begins then
        found = read(Path(str(spec.get("base_directory"))))
    except UserError as error:
        raise BaseUnusable(f"the base of this encoder: {error}") from None
    return _matching(found.tensors, architecture)


def at_hand(architecture: Architecture, assets: Assets) -> dict[str, Tensor]:
    """The base's tensors for an export: the asset, or the directory that this machine's operator named.

    Raises UserError if there is neither, or it is another base.
    """
    if ASSET in assets:
        return _matching(_parsed(assets[ASSET]), architecture)
    if BASE_DIRECTORY not in assets:
        raise UserError(
            f"this encoder is an update of a base that does not travel, sha256 {architecture.get('base_digest')}; name "
            "the directory of your copy with encoder.base"
        )
    return _matching(read(Path(assets[BASE_DIRECTORY].decode())).tensors, architecture)


def check_same(digest: str, architecture: Architecture) -> None:
    """Raises UserError, which names both, if the base of this digest is not the architecture's."""
    wanted = architecture.get("base_digest")
    if digest != wanted:
        raise UserError(
            f"the base here has sha256 {digest}, and this encoder is an update of {wanted}; name a copy of that one"
        )


def put_into(network: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy the base into a network that was built by the architecture. Raises UserError if they do not fit."""
    parameters = dict(network.named_parameters())
    for name in sorted(parameters.keys() | tensors.keys()):
        if name not in parameters or name not in tensors or parameters[name].shape != tensors[name].shape:
            raise UserError(f"the base is of another architecture than the encoder says: {name!r} differs")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _matching(tensors: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    check_same(digest_of(tensors), architecture)
    return tensors


def _parsed(content: bytes) -> dict[str, Tensor]:
    """An asset's tensors; a header and raw numbers, of which no more is made than came."""
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"the base that came does not open ({error})") from None
    odd = next((name for name, tensor in tensors.items() if tensor.dtype != torch.float32), None)
    if odd is not None:
        raise UserError(f"the base that came has a tensor {odd!r} of {tensors[odd].dtype}, not float32")
    _check_finite("the base that came", tensors)
    return tensors


def _check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    odd = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if odd is not None:
        raise UserError(f"{what}: {odd!r} has numbers that are not finite; take another base")
