"""What the master makes besides versions: an encoder to begin with, by the second preset rule, as a record for the log.

Making one is slow (transformers), and is done once per encoder.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import structlog
import torch

from common.encoders import get_encoder_type
from common.errors import UserError
from common.numbers.parameters import ParameterSet
from master_service.arithmetic.arithmetic import Outcome
from master_service.decisions.effects import Generate
from master_service.decisions.records import Generated, GenerationFailed

log = structlog.get_logger()


def generated(effect: Generate) -> Outcome:
    """Make a fresh encoder."""
    log.info("making the encoder", encoder=effect.encoder, generation=effect.generation)
    try:
        architecture, parameters = generate(effect)
    except UserError as error:
        log.error("the encoder could not be made", encoder=effect.encoder, problem=str(error))
        return Outcome(GenerationFailed(encoder=effect.encoder, reason=str(error)))
    body = Generated(
        encoder=effect.encoder,
        architecture=architecture,
        layout=parameters.layout.plain(),
        layout_digest=parameters.layout.digest,
        digest=parameters.digest(),
    )
    return Outcome(body, parameters.to_bytes())


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
        architecture, _ = encoder_type.assets(architecture, {})
        tensors = encoder_type.initial(architecture, effect.seed)
    return architecture, ParameterSet.from_tensors({name: tensor.float() for name, tensor in tensors.items()})


def fingerprint() -> dict[str, str]:
    """What the bits of a computation depend on: versions, and the processor's capability. The log carries it, so that a
    replay elsewhere can say why bits differ."""
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
