"""How many parameters an architecture has, before any of it takes memory: it is built on torch's meta device, where
tensors have shapes and no numbers (https://pytorch.org/docs/stable/meta.html), and no further than is allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.encoders.base import Architecture, EncoderType
from common.errors import UserError

#: Tensors of a layout that travels; as many as `LayoutEntries` holds.
_MAX_TENSORS = 100_000


class _TooLarge(BaseException):
    """Ends the building of a model; not an Exception, so that nobody on the way takes it for one of their own."""


def check_size(encoder_type: EncoderType, architecture: Architecture, most: int) -> None:
    """Raises UserError for an architecture of more than `most` parameters, or of which one number alone is larger.

    A type whose code cannot work without numbers is not counted so; what it then makes is bounded by `bounded`.
    """
    if (largest := max(_whole_numbers(architecture), default=0)) > most:
        raise UserError(_words(f"its architecture has the number {largest:.3g}", most))
    try:
        with bounded(most), torch.device("meta"):
            tensors = encoder_type.initial(architecture, 0)
    except UserError:
        raise
    except Exception:  # whatever a type's own code does without numbers; it is built in earnest next, and says so there
        return
    if (count := sum(tensor.numel() for tensor in tensors.values())) > most:
        raise UserError(_words(f"it has {count:.3g} parameters", most))


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Inside, this thread's modules take at most so many parameters, and no more tensors than travel. Raises UserError
    at the first one too many."""
    thread, found = threading.get_ident(), [0, 0]

    def count(module: Any, name: str, parameter: Any) -> None:
        if parameter is None or threading.get_ident() != thread:
            return
        found[0], found[1] = found[0] + parameter.numel(), found[1] + 1
        if found[0] > most or found[1] > _MAX_TENSORS:
            raise _TooLarge

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except _TooLarge:
        what = f"more than {_MAX_TENSORS} tensors" if found[0] <= most else f"more than {most} parameters"
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
