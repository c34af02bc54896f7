"""What is settled: the final answers to a node's updates, kept so that a duplicate gets the very same receipt again.

Two things are known of every incarnation: which numbers have their answer, and the newest answers themselves. A node
has a few updates unanswered at a time, so few answers are kept, and each as short as it can be: of the digest only the
beginning, because a duplicate brings it whole.
"""

from __future__ import annotations

from common.wire.fields import MAX_COUNT
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt
from master_service.decisions.state import Counted, EncoderState, Member, Settled, TurnedDown

#: Answers that are kept beyond as many as the node may have unanswered (`UpdateRule.max_unanswered`).
KEPT_MARGIN = 8
#: Incarnations of a node whose answers are kept; of older ones only that everything of theirs is settled.
KEPT_INCARNATIONS = 4
#: Incarnations of a node that are known at all; nobody has lost a state directory more often than that.
KNOWN_INCARNATIONS = 1000
#: Numbers that are known one by one, because a lower one has no answer yet; beyond that the lower ones are settled too.
KNOWN_NUMBERS = 64

_DIGEST_PART = 16


def settle(member: Member, receipt: Receipt) -> None:
    """Remember a final answer. The oldest answers are forgotten, but not that those updates have one."""
    settled = remember(member, receipt.incarnation)
    settled.answers.pop(receipt.sequence, None)
    settled.answers[receipt.sequence] = _short(receipt)
    while len(settled.answers) > member.may_owe + KEPT_MARGIN:
        del settled.answers[next(iter(settled.answers))]
    if receipt.sequence >= settled.below and receipt.sequence not in settled.above:
        settled.above.append(receipt.sequence)
    if len(settled.above) > KNOWN_NUMBERS:
        settled.below = min(settled.above)
    while settled.below in settled.above:
        settled.above.remove(settled.below)
        settled.below += 1


def remember(member: Member, incarnation: str) -> Settled:
    """Keep what is settled of an incarnation, which is now the newest. Of the oldest, beyond what is kept, everything
    counts as settled: a node that comes back under one is told `conflict` and takes a new one."""
    if member.settled and next(reversed(member.settled)) == incarnation:
        return member.settled[incarnation]
    settled = member.settled.pop(incarnation, None) or Settled()
    member.settled[incarnation] = settled
    for old in list(member.settled.values())[:-KEPT_INCARNATIONS]:
        old.answers, old.above, old.below = {}, [], MAX_COUNT + 1
    while len(member.settled) > KNOWN_INCARNATIONS:
        del member.settled[next(iter(member.settled))]
    return settled


def is_settled(member: Member, incarnation: str, sequence: int) -> bool:
    """Whether an update has its final answer."""
    settled = member.settled.get(incarnation)
    return settled is not None and (sequence < settled.below or sequence in settled.above)


def stored(encoder: EncoderState, member: Member, manifest: UpdateManifest) -> Receipt | None:
    """The receipt that answered this very update, bit for bit; None if another update was answered under its number,
    or if the answer is forgotten."""
    settled = member.settled.get(manifest.incarnation)
    short = settled.answers.get(manifest.sequence) if settled is not None else None
    if short is None or short.digest != manifest.digest[:_DIGEST_PART]:
        return None
    receipt = Receipt(
        encoder=encoder.encoder,
        node=member.node,
        incarnation=manifest.incarnation,
        sequence=manifest.sequence,
        digest=manifest.digest,
        accepted=isinstance(short, Counted),
        version=short.version,
        previous=short.previous,
    )
    if isinstance(short, Counted):
        facts = {"staleness": short.staleness, "weight": short.weight, "return_count": short.return_count}
        return receipt.model_copy(update=facts)
    return receipt.model_copy(update={"reason": short.reason, "detail": short.detail})


def _short(receipt: Receipt) -> Counted | TurnedDown:
    digest, previous, version = receipt.digest[:_DIGEST_PART], receipt.previous, receipt.version
    if receipt.accepted:
        return Counted(digest, previous, version, receipt.staleness, receipt.weight, receipt.return_count)
    return TurnedDown(digest, previous, version, receipt.reason, receipt.detail)
