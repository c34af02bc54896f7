"""Finished encoders on disk: exported for `AutoModel.from_pretrained`, with a card of how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.encoders import get_encoder_type
from common.errors import UserError

# the check is the master's too: it is made when a master is, long before there is anything to export
from common.exports import TITLE, replacing
from common.exports import check_export_directory as check_export_directory
from common.numbers.parameters import ParameterSet
from common.wire.messages import AssetEntry
from master_service.decisions.state import EncoderState
from master_service.log.payloads import Payloads


def export_encoder(
    directory: Path, encoder: EncoderState, parameters: ParameterSet, payloads: Payloads, note: str = ""
) -> Path:
    """Write the encoder into `directory`, replacing the export of another version; `note` goes into its card. Its
    assets are read from `payloads`.

    A failure leaves what was there. Raises UserError for a directory that holds something else or for an asset that is
    not whole, OSError.
    """
    assets = assets_of(encoder.assets, payloads)
    facts = card(encoder, note)
    with replacing(directory, facts) as beside:
        encoder_type = get_encoder_type(encoder.encoder_type)
        encoder_type.export_shared(beside, encoder.architecture, parameters.tensors(), facts, assets)
    return directory.resolve()


def assets_of(entries: Sequence[AssetEntry], payloads: Payloads) -> dict[str, bytes]:
    """The bytes of assets by name, as the log has them. Raises UserError for one that is damaged or missing."""
    for entry in entries:
        if problem := payloads.damage(entry.digest):
            raise UserError(
                f"the asset {entry.name} is {problem}: restore the payload {entry.digest} of the message log from a "
                "backup of the state directory"
            )
    return {entry.name: payloads.read(entry.digest) for entry in entries}


def card(encoder: EncoderState, note: str = "") -> str:
    """The facts of the training, as Markdown."""
    rows = "\n".join(
        f"| {member.node} | {member.samples} | {member.returns} | {member.steps} | {member.weight:.2f} "
        f"| {f'{member.held_out.loss:.3f} ({member.held_out.version})' if member.held_out else '–'} |"
        for member in encoder.members.values()
    )
    return (
        f"{TITLE}{encoder.encoder}\n\n"
        f"Type `{encoder.encoder_type}`, version {encoder.version}, made of {encoder.updates} updates of "
        f"{len(encoder.members)} nodes ({encoder.reason or encoder.status}). No sample left its owner.\n\n"
        f"{note + chr(10) * 2 if note else ''}"
        f"Parameters: {encoder.size:,}, sha256 `{encoder.digest}`.\n\n"
        f"{_held_out(encoder)}"
        "| node | samples | updates counted | steps | sum of weights | held-out loss (version) |\n"
        "|---|---|---|---|---|---|\n" + rows + "\n"
    )


def _held_out(encoder: EncoderState) -> str:
    if encoder.held_out is None or encoder.best_held_out is None:
        return ""
    return (
        "Held-out masked loss, the mean over nodes, each with its private parts and validation samples: "
        f"{encoder.held_out:.3f} about version {encoder.held_out_version}, at its best {encoder.best_held_out:.3f} "
        f"about version {encoder.best_version}.\n\n"
    )
