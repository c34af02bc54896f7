"""How many parameters an architecture has, before any of it takes memory: it is built on torch's meta device, where
tensors have shapes and no numbers (https://pytorch.org/docs/stable/meta.html), and no further than is allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.encoders.base import Architecture, EncoderType
from common.errors import UserError

#: Parameters that may be built beside those that are shared: a stem, a head.
_BESIDE = 1 << 20
#: Tensors of an encoder: a few hundred are usual, and to build so many takes seconds.
_MAX_TENSORS = 10_000


class _TooLarge(BaseException):
    """Ends the building of a model; not an Exception, so that nobody on the way takes it for one of their own."""


def check_size(encoder_type: EncoderType, architecture: Architecture, most: int) -> None:
    """Raises UserError for an architecture of more than `most` parameters, or of which one number alone is larger.

    A type whose code cannot work without numbers is not counted so: `made` bounds what it makes.
    """
    if (largest := max(_whole_numbers(architecture), default=0)) > most:
        raise UserError(_words(f"its architecture has the number {largest}", most))
    try:
        with torch.device("meta"):
            made(encoder_type, architecture, 0, most)
    except UserError:
        raise
    except Exception:  # whatever a type's own code does without numbers; it is built in earnest next, and says so there
        return


def made(encoder_type: EncoderType, architecture: Architecture, seed: int, most: int) -> dict[str, Tensor]:
    """Version 0. Raises UserError for one of more than `most` parameters, and for a model that gets far beyond that
    while it is built."""
    with _bounded(most):
        tensors = encoder_type.initial(architecture, seed)
    if (count := sum(tensor.numel() for tensor in tensors.values())) > most:
        raise UserError(_words(f"it has {count} parameters", most))
    return tensors


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Inside, the modules of this thread take at most twice so many parameters (what is not shared is built too), and
    no more tensors than any encoder has. Raises UserError at the first one too many."""
    thread, found = threading.get_ident(), [0, 0]

    def count(module: Any, name: str, parameter: Any) -> None:
        if parameter is None or threading.get_ident() != thread:
            return
        found[0], found[1] = found[0] + parameter.numel(), found[1] + 1
        if found[0] > 2 * most + _BESIDE or found[1] > _MAX_TENSORS:
            raise _TooLarge

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except _TooLarge:
        what = f"more than {_MAX_TENSORS} tensors" if found[1] > _MAX_TENSORS else f"far more than {most} parameters"
        raise UserError(_words(f"it has {what}", most)) from None
    finally:
        hook.remove()


def _words(what: str, most: int) -> str:
    return f"the encoder would be too large: {what}; encoder.max_parameters allows {most}"


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        for each in value.values():
            yield from _whole_numbers(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _whole_numbers(each)
    elif isinstance(value, int):
        yield value
