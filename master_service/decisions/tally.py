"""Sums over an encoder's members and its buffer, kept true at every change, so that nothing looks through all of them
for each update.

Whole numbers only, and lists in order: what is kept is the same, to the bit, as what is taken anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.wire.to_master import UpdateChunk, UpdateManifest
from master_service.decisions.rules.buffer import Turnout
from master_service.decisions.rules.weights import Totals
from master_service.decisions.state import Buffered, EncoderState, Member


@contextmanager
def changing(encoder: EncoderState, member: Member) -> Iterator[None]:
    """Around whatever changes a member's activity, samples, returns, updates in the buffer, or what is usual for it."""
    _add(encoder, member, -1)
    yield
    _add(encoder, member, 1)


def enrolled(encoder: EncoderState, member: Member) -> Member:
    """A new member of the encoder."""
    encoder.members[member.node] = member
    _add(encoder, member, 1)
    return member


def totals(encoder: EncoderState, items: list[Buffered]) -> Totals:
    """What the return counts are compared with: the active nodes, and those of `items` that have gone since."""
    tally = encoder.tally
    nodes, returns, samples = tally.active, tally.returns, tally.samples
    for node in {item.node for item in items}:
        member = encoder.members[node]
        if not member.active:
            nodes, returns, samples = nodes + 1, returns + member.returns, samples + max(member.samples, 1)
    return Totals(nodes, returns, samples)


def turnout(encoder: EncoderState) -> Turnout:
    """Who has an update in the buffer."""
    tally = encoder.tally
    return Turnout(len(encoder.buffer), tally.returned, tally.active, tally.active - tally.active_returned)


# --- the buffer -------------------------------------------------------------------------------------------------------


def buffer(encoder: EncoderState, item: Buffered) -> None:
    """An accepted update waits for the next version."""
    encoder.buffer.append(item)
    member = encoder.members[item.node]
    member.pending[_key(item)] = item.digest
    with changing(encoder, member):
        member.buffered += 1


def emptied(encoder: EncoderState) -> list[Buffered]:
    """The buffer's updates, which are taken out to become a version; they stay pending until they are settled."""
    items, encoder.buffer = encoder.buffer, []
    for item in items:
        member = encoder.members[item.node]
        with changing(encoder, member):
            member.buffered = 0
    return items


def put_back(encoder: EncoderState, items: list[Buffered]) -> None:
    """Updates whose version could not be made are first in the buffer again."""
    behind = emptied(encoder)
    for item in [*items, *behind]:
        buffer(encoder, item)


def no_longer_pending(encoder: EncoderState, item: Buffered) -> None:
    """An update is settled, or it is lost."""
    encoder.members[item.node].pending.pop(_key(item), None)


def pending(encoder: EncoderState, update: UpdateManifest | UpdateChunk) -> str | None:
    """The digest of the update of this number that waits for a version, or is being made one; None if there is none."""
    member = encoder.members.get(update.node)
    return member.pending.get(_key(update)) if member is not None else None


def _key(update: UpdateManifest | UpdateChunk | Buffered) -> str:
    return f"{update.incarnation}/{update.sequence}"


def _add(encoder: EncoderState, member: Member, sign: int) -> None:
    tally = encoder.tally
    tally.returned += sign * (member.buffered > 0)
    if member.active:
        tally.active += sign
        tally.returns += sign * member.returns
        tally.samples += sign * max(member.samples, 1)
        tally.active_returned += sign * (member.buffered > 0)
        _keep(tally.norms, member.usual_norm, sign)
        _keep(tally.steps, member.usual_steps, sign)
        _keep(tally.losses, member.claimed_loss, sign)


def _keep(values: list[Any], value: float | None, sign: int) -> None:
    """Put a member's value into a list in order, or take it out."""
    if value is None:
        return
    if sign > 0:
        insort(values, value)
    else:
        del values[bisect_left(values, value)]
