"""Finished encoders on disk: exported for `AutoModel.from_pretrained`, with a card of how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import cards
from common.encoders import get_encoder_type
from common.encoders.base import BASE_DIRECTORY
from common.errors import UserError

# the check is the master's too: it is made when a master is, long before there is anything to export
from common.exports import check_export_directory as check_export_directory
from common.exports import replacing
from common.numbers.parameters import ParameterSet
from common.wire.fields import AssetEntry
from master_service.arithmetic.generation import fingerprint
from master_service.decisions.rules.model import OuterOptimizer
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState, Member
from master_service.log.payloads import Payloads


def export_encoder(
    directory: Path,
    encoder: EncoderState,
    settings: Settings,
    parameters: ParameterSet,
    payloads: Payloads,
    note: str = "",
) -> Path:
    """Write the encoder into `directory`, replacing the export of another version; `note` goes into its card. Its
    assets are read from `payloads`, and a base that is none from the directory that the settings name.

    A failure leaves what was there. Raises UserError for a directory that holds something else or for an asset that is
    not whole, OSError.
    """
    assets = assets_of(encoder.assets, payloads)
    if settings.base is not None:
        assets[BASE_DIRECTORY] = settings.base.encode()
    facts = card(encoder, settings, note)
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


def card(encoder: EncoderState, settings: Settings, note: str = "") -> str:
    """The model card as Markdown with front matter: how to load the encoder, what it is, how it was made, what it is
    not, and how that is proved. Nodes are named where their owners agreed, and numbered otherwise."""
    whole = cards.is_whole(encoder.architecture)
    front = cards.front_matter(encoder.encoder_type, whole=whole, license=settings.license, language=settings.language)
    return (
        f"{front}{cards.TITLE}{encoder.encoder}\n\n"
        f"Type `{encoder.encoder_type}`, version {encoder.version}, made of {encoder.updates} updates of "
        f"{len(encoder.members)} nodes ({_ending(encoder)}). No sample left its owner."
        f"{_vocabulary(encoder)}\n\n"
        f"{note + chr(10) * 2 if note else ''}"
        f"{cards.loading(encoder.encoder_type, whole=whole)}"
        f"{cards.architecture(encoder.architecture)}"
        f"{_training(encoder, settings)}"
        f"{_limits(encoder.architecture)}"
        f"{_lineage(encoder)}"
    )


def _ending(encoder: EncoderState) -> str:
    """Why the training ended. Who stopped it is a name that nobody agreed to publish."""
    return "stopped on request" if encoder.reason.startswith("stopped by ") else encoder.reason or encoder.status


def _vocabulary(encoder: EncoderState) -> str:
    """What an agreed vocabulary was made of; nothing of any other."""
    if encoder.architecture.get("vocabulary") != "agreed":
        return ""
    answered = encoder.answered
    who = f"{sum(answered.values())} of the {len(answered)} nodes that answered" if answered else "nodes"
    return (
        f" Its vocabulary is an agreed one: {who} contributed words of their training documents, each with the number "
        "of documents that it is in, and it was made of the sums."
    )


def _training(encoder: EncoderState, settings: Settings) -> str:
    rule, update = settings.rule, settings.update_rule
    when = ", ".join(f"{name} {value:g}" for name, value in update.when.model_dump(exclude_none=True).items())
    facts = (
        ("versions", encoder.version),
        ("updates counted", encoder.updates),
        ("aggregation rule", f"`{rule.preset}`"),
        ("weights", f"count {rule.weights.count}, staleness {rule.weights.staleness}"),
        ("buffer", f"{rule.buffer.kind}, size {rule.buffer.size}" if rule.buffer.kind == "count" else rule.buffer.kind),
        ("outer optimiser", f"{rule.outer.optimizer}, {_rate(rule.outer)}, momentum {rule.outer.momentum:g}"),
        ("a node returns after", when or "25 steps"),
        ("encoding of updates", update.encoding),
        ("inner optimiser", f"AdamW, rate {update.inner.lr:g}, decay {update.inner.weight_decay:g}"),
        ("batch", update.inner.batch_size),
        ("generation", settings.generation),
    )
    names = encoder.public_names()
    nodes = [
        (names[node], member.samples, member.returns, member.steps, f"{member.weight:.2f}", _measured(member))
        for node, member in encoder.members.items()
    ]
    headings = ("node", "samples", "updates counted", "steps", "sum of weights", "held-out loss (version)")
    return (
        f"## Training\n\n{cards.table(('setting', 'value'), facts)}\n"
        f"{_held_out(encoder)}{cards.table(headings, nodes)}\n"
    )


def _rate(outer: OuterOptimizer) -> str:
    if outer.rho is None:
        return f"rate {outer.lr:g}"
    return f"rate at least {outer.lr:g}, by the updates' agreement with rho {outer.rho:g}"


def _measured(member: Member) -> str:
    return f"{member.held_out.loss:.3f} ({member.held_out.version})" if member.held_out else "–"


def _held_out(encoder: EncoderState) -> str:
    if encoder.held_out is None or encoder.best_held_out is None:
        return ""
    return (
        "Held-out masked loss, the mean over nodes, each with its private parts and validation samples: "
        f"{encoder.held_out:.3f} about version {encoder.held_out_version}, at its best {encoder.best_held_out:.3f} "
        f"about version {encoder.best_version}.\n\n"
    )


def _limits(architecture: Mapping[str, Any]) -> str:
    shared = architecture.get("shared")
    bias = "the base's" if shared == "lora" else "zero"
    bring = (
        "It speaks the vocabulary that it was trained with. What is private to each owner, corrections of its matrices "
        f"and the bias of its decoder, is not in it: the bias is {bias}."
        if cards.is_whole(architecture)
        else "It has no input stem and no head: those are private to each owner, and its reader brings their own."
    )
    # a row moves where its token was in a text that was trained on
    rows = ", and which rows of the embeddings moved tells which tokens the texts use" if shared == "all" else ""
    return (
        "## Limits\n\n"
        f"{bring} It has seen what its nodes hold, and nothing else; samples, steps and losses of nodes are what they "
        "said of themselves. That no sample left its owner does not mean that nothing of one can be read from the "
        f"parameters: updates were not made differentially private{rows}.\n\n"
    )


def _lineage(encoder: EncoderState) -> str:
    facts = (
        ("encoder", f"`{encoder.encoder}`"),
        ("version", encoder.version),
        ("shared parameters", f"{encoder.size:,}"),
        ("sha256 of them", f"`{encoder.digest}`"),
        ("exported with torch", f"`{fingerprint()['torch']}`"),
    )
    return (
        f"## Lineage\n\n{cards.table(('', ''), facts)}\n"
        "Whoever has the message log proves it: every version is computed again from the updates, and its bits are "
        f"compared.\n\n```sh\nshared-encoder replay --encoder {encoder.encoder} --version {encoder.version}\n```\n"
    )
