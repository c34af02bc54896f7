"""What the settings of all encoder types have in common: strict models, bounded numbers, errors of one line.

A type's models say its keys, their order, their defaults and their bounds; outside the type, settings are plain dicts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from transformers.activations import ACT2FN

from common.config import Section, explained, suggestion
from common.errors import UserError

#: No width, length or depth is larger: what anybody may ask for must not keep a service busy for ever.
LARGEST = 1 << 20

#: A width, a length, a depth, a number of heads.
Size = Annotated[int, Field(ge=1, le=LARGEST)]

#: The rank of a low-rank correction; 0 for none.
Rank = Annotated[int, Field(ge=0, le=LARGEST)]

#: A spread or a small constant of the arithmetic.
Positive = Annotated[float, Field(gt=0)]

#: The part of a sample that is hidden for the task, neither nothing nor everything.
Share = Annotated[float, Field(gt=0, lt=1)]


def _known_activation(name: str) -> str:
    if name not in ACT2FN:
        raise ValueError(f"{name!r} is unknown; {suggestion(name, ACT2FN)}")
    return name


#: The name of an activation function of transformers.
Activation = Annotated[str, AfterValidator(_known_activation)]


class EncoderSettings(Section):
    """Settings of an encoder type: no unknown keys, no number as a string, no boolean as a number, all finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=EncoderSettings)


def checked(model: type[S], what: str, given: Mapping[str, Any]) -> S:
    """`given` over the model's defaults; `what` names the settings in errors ("architecture of type text").

    Raises UserError, one line, for an unknown key (with the nearest known one) and for a value that does not fit.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise explained(error, model, what) from None


def overridden(
    directory: Path, found: Mapping[str, Any], overrides: Mapping[str, Any], free: Collection[str]
) -> dict[str, Any]:
    """What was `found` of an encoder in `directory`, with `overrides` of what is `free` to be another. Raises UserError
    for an override of anything else, unless it says the same."""
    for key, value in overrides.items():
        if key not in free and (key not in found or found[key] != value):
            has = f"has {key} {found[key]!r}" if key in found else f"has no {key}"
            raise UserError(
                f"{directory} {has}, and architecture.{key} says {value!r}; leave it out: who continues may set "
                f"{', '.join(free)}"
            )
    return {**found, **{key: value for key, value in overrides.items() if key in free}}
