"""Defaults overridden by what a person wrote, checked: a wrong key suggests the right one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from common.errors import UserError

#: No width, length or depth is larger: what anybody may ask for must not keep a service busy for ever.
_LARGEST = 1 << 20


def merge_settings(what: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with the values of `given`; numbers must be positive and of the default's kind.

    `what` names the settings in errors ("architecture of type text"). Raises UserError for an unknown key, with the
    nearest known one, and for a value that does not fit.
    """
    merged = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            raise UserError(f"{what}: unknown key {key!r}; {suggestion(key, defaults)}")
        merged[key] = _fitting(f"{what}: {key}", defaults[key], value)
    return merged


def _fitting(what: str, default: Any, value: Any) -> Any:
    if isinstance(default, bool) or not isinstance(default, int | float):
        if type(value) is not type(default):
            raise UserError(f"{what} must be {_KINDS[type(default)]}, not {value!r}")
        return value
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
        raise UserError(f"{what} must be a positive {'whole number' if whole else 'number'}, not {value!r}")
    if whole and value > max(_LARGEST, default):
        raise UserError(f"{what} must be at most {_LARGEST:,}, not {value:,}")
    return value if whole else float(value)


_KINDS = {bool: "true or false", str: "a string"}


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError, with the nearest choice, if `value` is none of them."""
    known = list(choices)
    if value not in known:
        raise UserError(f"{what} {value!r} is unknown; {suggestion(value, known)}")


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """What an error offers instead of a wrong word: the nearest known one, or all of them."""
    names = list(known)
    near = get_close_matches(wrong, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
