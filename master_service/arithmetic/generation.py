"""What the master makes besides versions: an encoder to begin with, by the second preset rule, as records for the log.

Making one is slow (transformers), and is done once per encoder.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from pydantic import TypeAdapter, ValidationError

from common.encoders import get_encoder_type, words
from common.errors import UserError, WordsNeeded
from common.numbers.parameters import ParameterSet
from common.wire.assets import asset_entry
from common.wire.fields import MAX_ASSET_BYTES, MAX_ASSETS, AssetName
from common.wire.topology import MIB
from master_service.arithmetic.arithmetic import Outcome
from master_service.arithmetic.counting import check_size, made
from master_service.decisions.effects import Generate
from master_service.decisions.records import Gathering, Generated, GenerationFailed, Provided

log = structlog.get_logger()

_NAME: TypeAdapter[str] = TypeAdapter(AssetName)


@dataclass(frozen=True)
class Made:
    """An encoder to begin with: what it is, version 0, and what nodes need beside it, by name."""

    architecture: dict[str, Any]
    parameters: ParameterSet
    assets: dict[str, bytes]


def generated(effect: Generate) -> list[Outcome]:
    """Make an encoder: a Provided record for each asset, in the order of their names, then the Generated; or alone a
    Gathering, if its type wants words that were not asked for yet, or a GenerationFailed."""
    log.info("making the encoder", encoder=effect.encoder, generation=effect.generation)
    try:
        made = generate(effect)
    except WordsNeeded:
        log.info("the encoder is made of words that nodes contribute; asking for them", encoder=effect.encoder)
        return [Outcome(Gathering(encoder=effect.encoder))]
    except UserError as error:
        log.error("the encoder could not be made", encoder=effect.encoder, problem=str(error))
        return [Outcome(GenerationFailed(encoder=effect.encoder, reason=str(error)))]
    outcomes = []
    for name, content in sorted(made.assets.items()):
        entry = asset_entry(name, content)
        outcomes.append(Outcome(Provided(encoder=effect.encoder, **entry.model_dump()), content))
    layout = made.parameters.layout
    body = Generated(
        encoder=effect.encoder,
        architecture=made.architecture,
        layout=layout.plain(),
        layout_digest=layout.digest,
        digest=made.parameters.digest(),
        assets=sorted(made.assets),
    )
    return [*outcomes, Outcome(body, made.parameters.to_bytes())]


def generate(effect: Generate) -> Made:
    """fresh: from the type's architecture and seed; continue: from an export or a Hugging Face directory. Raises
    UserError for a type, an architecture, a source or a directory that does not work out, WordsNeeded if words of nodes
    are to be gathered first."""
    try:
        return _generate(effect)
    except WordsNeeded as error:
        if effect.gathered is None:
            raise
        raise UserError(f"type {effect.encoder_type} asks for words again that came ({error}); mend it") from None
    except (OSError, RuntimeError, MemoryError, OverflowError, ValueError, TypeError) as error:
        # whatever somebody asked for that is too large, does not fit together or cannot be read
        words = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"an encoder of this architecture cannot be made: {words}") from None


def _generate(effect: Generate) -> Made:
    encoder_type = get_encoder_type(effect.encoder_type)
    named = dict(effect.sources)
    if effect.gathered is not None:
        named[words.SOURCE] = words.written(effect.gathered)
    if effect.generation == "continue":
        if effect.source is None:
            raise UserError("generation 'continue' needs encoder.source: the directory of an exported encoder")
        architecture, tensors = encoder_type.architecture_of(Path(effect.source), effect.architecture)
        architecture, assets = encoder_type.assets(architecture, named)
    else:
        architecture = encoder_type.architecture(effect.architecture)
        architecture, assets = encoder_type.assets(architecture, named)
        check_size(encoder_type, architecture, effect.max_parameters)
        tensors = made(encoder_type, architecture, effect.seed, effect.max_parameters)
    check_assets(effect.encoder_type, assets)
    parameters = ParameterSet.from_tensors({name: tensor.float() for name, tensor in tensors.items()})
    return Made(architecture, parameters, assets)


def check_assets(encoder_type: str, assets: Mapping[str, bytes]) -> None:
    """Whether what a type has made can travel. Raises UserError for too much, or for a name that is no file name."""
    if len(assets) > MAX_ASSETS:
        raise UserError(f"type {encoder_type} gives {len(assets)} assets, at most {MAX_ASSETS} travel; make it fewer")
    for name, content in assets.items():
        try:
            _NAME.validate_python(name)
        except ValidationError:
            shown = re.sub(r"\s+", " ", repr(name))[:80]
            raise UserError(
                f"type {encoder_type} gives an asset {shown}: name it with up to 64 letters, digits, dots, - and _"
            ) from None
        if len(content) > MAX_ASSET_BYTES:
            raise UserError(
                f"type {encoder_type} gives the asset {name} of {len(content) / MIB:.1f} MiB, at most "
                f"{MAX_ASSET_BYTES // MIB} MiB travel; take a smaller one"
            )


def fingerprint() -> dict[str, str]:
    """What the bits of a computation depend on: versions, and the processor's capability. The log carries it, so that a
    replay elsewhere can say why bits differ."""
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
