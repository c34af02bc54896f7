"""Finished encoders on disk: exported for `AutoModel.from_pretrained`, with a card of how they came about."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.durable import sync
from common.encoders import get_encoder_type
from common.errors import UserError
from common.numbers.parameters import ParameterSet
from master_service.decisions.state import EncoderState

_TITLE = "# Shared encoder "


def check_export_directory(directory: Path) -> None:
    """An export replaces what is there. Raises UserError if that is anything but an export."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    card = directory / "README.md"
    if not card.is_file() or not card.read_text(errors="replace").startswith(_TITLE):
        raise UserError(f"{directory} holds something else than an exported encoder; export into a new directory")


def export_encoder(directory: Path, encoder: EncoderState, parameters: ParameterSet) -> Path:
    """Write the encoder into `directory`, replacing the export of another version. Raises UserError, OSError."""
    check_export_directory(directory)
    directory = directory.resolve()
    beside = directory.with_name(directory.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    get_encoder_type(encoder.encoder_type).export_shared(
        beside, encoder.architecture, parameters.tensors(), card(encoder)
    )
    for path in (*beside.iterdir(), beside):
        sync(path)
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)
    sync(directory.parent)
    return directory


def card(encoder: EncoderState, note: str = "") -> str:
    """The facts of the training, as Markdown."""
    rows = "\n".join(
        f"| {member.node} | {member.samples} | {member.returns} | {member.steps} | {member.weight:.2f} |"
        for member in encoder.members.values()
    )
    return (
        f"{_TITLE}{encoder.encoder}\n\n"
        f"Type `{encoder.encoder_type}`, version {encoder.version}, made of {encoder.updates} updates of "
        f"{len(encoder.members)} nodes ({encoder.reason or encoder.status}). No sample left its owner.\n\n"
        f"{note + chr(10) * 2 if note else ''}"
        f"Parameters: {encoder.size:,}, sha256 `{encoder.digest}`.\n\n"
        "| node | samples | updates counted | steps | sum of weights |\n|---|---|---|---|---|\n" + rows + "\n"
    )
