"""The verdict on one update: pure functions of its manifest, the facts about its payload, and the encoder's state."""

from __future__ import annotations

from typing import Literal

from common.numbers.layout import Layout
from common.numbers.slicing import payload_size, slice_count
from common.wire.fields import MAX_COUNT
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Reason, Receipt, receipt_hash
from master_service.decisions.messages_out import shortened
from master_service.decisions.records import UpdateFacts
from master_service.decisions.state import Buffered, EncoderState
from master_service.decisions.tally import changing


def stranger(encoder: EncoderState | None, manifest: UpdateManifest) -> bool:
    """Whether an update of an encoder that is being trained comes from a node that has not acked under this
    incarnation."""
    if encoder is None or encoder.status != "running":
        return False
    member = encoder.members.get(manifest.node)
    return member is None or member.incarnation != manifest.incarnation


def refusal(
    encoder: EncoderState | None, manifest: UpdateManifest, facts: UpdateFacts | None
) -> tuple[Reason, str] | None:
    """Why this update cannot be counted: (reason, detail); None if it can. Without facts: as far as one can tell."""
    if encoder is None or not encoder.layout:
        return "unknown-encoder", f"no encoder {manifest.encoder} is being trained here"
    if encoder.status != "running":
        return "finished", f"the training of {encoder.encoder} has ended: {encoder.reason}"
    if manifest.layout_digest != encoder.layout_digest:
        return "layout", _layout_detail(encoder, manifest)
    size, chunks = payload_size(encoder.size, manifest.encoding), slice_count(encoder.size)
    if (manifest.size, manifest.chunks) != (size, chunks):
        return "size", f"{size} bytes in {chunks} chunks were expected, not {manifest.size} in {manifest.chunks}"
    if manifest.shards != encoder.shards:
        return "digest", f"the digest is of {manifest.shards} parts, {encoder.shards} were expected"
    if manifest.base_version > encoder.version:
        return "future", f"version {manifest.base_version} is not made yet, the newest is {encoder.version}"
    if facts is None:
        return None
    if facts.digest != manifest.digest or facts.size != manifest.size:
        return "digest", "the payload is not what the manifest says"
    if not facts.finite:
        return "not-finite", "the update holds NaN or infinite numbers; the node's training has diverged"
    return None


def refused(encoder: EncoderState | None, manifest: UpdateManifest, reason: Reason, detail: str) -> Receipt:
    """The receipt of an update that does not count."""
    return Receipt(
        encoder=manifest.encoder,
        node=manifest.node,
        incarnation=manifest.incarnation,
        sequence=manifest.sequence,
        digest=manifest.digest,
        accepted=False,
        reason=reason,
        detail=shortened(detail),
        version=encoder.version if encoder else 0,
    )


def left_over(encoder: EncoderState, item: Buffered) -> Receipt:
    """The receipt of an update that was accepted, and that no version can be made of any more."""
    return Receipt(
        encoder=encoder.encoder,
        node=item.node,
        incarnation=item.incarnation,
        sequence=item.sequence,
        digest=item.digest,
        accepted=False,
        reason="finished",
        detail="the training ended before enough other nodes had handed in for a robust rule",
        version=encoder.version,
    )


def accepted(encoder: EncoderState, item: Buffered, weight: float, staleness: int, returns: int) -> Receipt:
    """The receipt of an update that counts in the encoder's current version."""
    return Receipt(
        encoder=encoder.encoder,
        node=item.node,
        incarnation=item.incarnation,
        sequence=item.sequence,
        digest=item.digest,
        accepted=True,
        version=encoder.version,
        staleness=staleness,
        weight=weight,
        return_count=returns,
    )


def count(encoder: EncoderState, item: Buffered, sign: Literal[1, -1]) -> None:
    """Count an accepted update, or take that back. Sums stop at what a message can carry."""
    member = encoder.members[item.node]
    encoder.updates += sign
    with changing(encoder, member):
        member.returns += sign
    member.steps = min(MAX_COUNT, member.steps + sign * item.steps)
    member.samples_seen = min(MAX_COUNT, member.samples_seen + sign * item.samples)
    member.payload_bytes = min(MAX_COUNT, member.payload_bytes + sign * item.size)
    member.seconds += sign * item.seconds


def issued(encoder: EncoderState | None, receipt: Receipt) -> Receipt:
    """The receipt with its place in the encoder's chain."""
    if encoder is None:
        return receipt
    receipt = receipt.model_copy(update={"previous": encoder.last_receipt})
    encoder.last_receipt = receipt_hash(receipt)
    return receipt


def _layout_detail(encoder: EncoderState, manifest: UpdateManifest) -> str:
    if manifest.layout is None:
        return f"layout {manifest.layout_digest[:12]} is not the encoder's {encoder.layout_digest[:12]}"
    difference = Layout(encoder.layout).difference(Layout(manifest.layout))
    return f"the layout differs from the encoder's: {difference or 'the digest does not belong to the layout sent'}"
