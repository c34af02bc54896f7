"""Finished encoders on disk: exported for `AutoModel.from_pretrained`, with a card of how they came about."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.encoders import get_encoder_type
from common.parameters import ParameterSet
from master_service.state import EncoderState


def export_encoder(directory: Path, encoder: EncoderState, parameters: ParameterSet) -> Path:
    """Write the encoder into `directory`, replacing what another version left there."""
    beside = directory.with_name(directory.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    get_encoder_type(encoder.encoder_type).export_shared(
        beside, encoder.architecture, parameters.tensors(), card(encoder)
    )
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)
    return directory


def card(encoder: EncoderState, note: str = "") -> str:
    """The facts of the training, as Markdown."""
    rows = "\n".join(
        f"| {member.node} | {member.samples} | {member.returns} | {member.steps} | {member.weight:.2f} |"
        for member in encoder.members.values()
    )
    return (
        f"# Shared encoder {encoder.encoder}\n\n"
        f"Type `{encoder.encoder_type}`, version {encoder.version}, made of {encoder.updates} updates of "
        f"{len(encoder.members)} nodes ({encoder.reason or encoder.status}). No sample left its owner.\n\n"
        f"{note + chr(10) * 2 if note else ''}"
        f"Parameters: {encoder.size:,}, sha256 `{encoder.digest}`.\n\n"
        "| node | samples | updates counted | steps | sum of weights |\n|---|---|---|---|---|\n" + rows + "\n"
    )
