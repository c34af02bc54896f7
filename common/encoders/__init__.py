"""The registry of encoder types: by name, built in or from an entry point. Importing it imports no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, cast

from common.config import suggestion
from common.encoders.owners_code import checked_encoder_type, owners_code
from common.errors import UserError

if TYPE_CHECKING:
    from common.encoders.base import EncoderType

#: The entry-point group of types from other packages; each entry is a class without arguments, or an instance.
GROUP = "shared_encoder.encoder_types"

#: name -> (module, class); imported on first use, because torch and transformers take seconds.
_BUILT_IN = {
    "text": ("common.encoders.text", "TextEncoderType"),
    "image": ("common.encoders.image", "ImageEncoderType"),
}


def encoder_type_names() -> list[str]:
    """Every name that `get_encoder_type` knows: the built-in ones first, then those of installed packages."""
    return [*_BUILT_IN, *sorted(set(_entry_points()) - set(_BUILT_IN))]


def get_encoder_type(name: str) -> EncoderType:
    """The encoder type of this name; a built-in name cannot be taken by a package.

    One from another package comes behind a proxy that says what it raises as its own (`OwnersCodeError`).
    Raises UserError for an unknown name, with the nearest known one, and for an entry point that does not load or is no
    encoder type.
    """
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name]
        return cast("EncoderType", getattr(import_module(module), attribute)())
    entry = _entry_points().get(name)
    if entry is None:
        raise UserError(f"unknown encoder type {name!r}; {suggestion(name, encoder_type_names())}")
    whose = f"encoder type {name!r} (package {entry.dist.name if entry.dist else 'unknown'})"
    with owners_code(f"{whose}: its entry point {entry.value!r} does not load, it"):
        found = entry.load()
        return checked_encoder_type(found() if isinstance(found, type) else found, whose)


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
