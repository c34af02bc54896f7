"""The second preset rule: how the encoder to be trained comes to be. Slow (transformers), and done once per encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.encoders import get_encoder_type
from common.errors import UserError
from common.numbers.parameters import ParameterSet
from master_service.decisions.effects import Generate


def generate(effect: Generate) -> tuple[dict[str, Any], ParameterSet]:
    """Architecture and version 0. fresh: from the type's architecture and seed; continue: from an export or a Hugging
    Face directory. Raises UserError for a type, an architecture or a directory that does not work out."""
    try:
        return _generate(effect)
    except (RuntimeError, MemoryError, OverflowError, ValueError, TypeError) as error:
        # whatever somebody asked for that is too large or does not fit together
        words = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"an encoder of this architecture cannot be made: {words}") from None


def _generate(effect: Generate) -> tuple[dict[str, Any], ParameterSet]:
    encoder_type = get_encoder_type(effect.encoder_type)
    if effect.generation == "continue":
        if effect.source is None:
            raise UserError("generation 'continue' needs encoder.source: the directory of an exported encoder")
        architecture, tensors = encoder_type.architecture_of(Path(effect.source))
    else:
        architecture = encoder_type.architecture(effect.architecture)
        tensors = encoder_type.initial(architecture, effect.seed)
    return architecture, ParameterSet.from_tensors({name: tensor.float() for name, tensor in tensors.items()})
