"""What a master's own work led to, as a record for the log: an encoder that was made, or could not be."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from common.errors import UserError
from common.numbers.parameters import ParameterSet
from master_service.arithmetic.generation import generate
from master_service.decisions.effects import Generate
from master_service.decisions.records import Generated, GenerationFailed, StepFailed, Versioned

log = structlog.get_logger()


@dataclass(frozen=True)
class Outcome:
    """What a step or a generation led to; version 0 comes with its parameters."""

    body: Versioned | StepFailed | Generated | GenerationFailed
    parameters: ParameterSet | None = None


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
    return Outcome(body, parameters)
