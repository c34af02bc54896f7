"""Sums over an encoder's members and its buffer, kept true at every change, so that nothing looks through all of them
for each update.

Whole numbers only, and lists in order: what is kept is the same, to the bit, as what is taken anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from common.wire.to_master import UpdateChunk, UpdateManifest
from master_service.decisions.rules.buffer import Turnout
from master_service.decisions.rules.weights import Totals
from master_service.decisions.state import Buffered, EncoderState, Member, Tally


@contextmanager
def changing(encoder: EncoderState, member: Member) -> Iterator[None]:
    """Around whatever changes a member's activity, samples, returns, updates in the buffer, or what is usual for it."""
    before = _share(member)
    yield
    _move(encoder.tally, before, _share(member))


def enrolled(encoder: EncoderState, member: Member) -> Member:
    """A new member of the encoder."""
    encoder.members[member.node] = member
    _move(encoder.tally, _NOTHING, _share(member))
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


class _Share(NamedTuple):
    """What a member adds to the sums; those that are of active members alone are nothing of one that is not."""

    returned: int
    active: int = 0
    returns: int = 0
    samples: int = 0
    active_returned: int = 0
    norm: float | None = None
    steps: int | None = None
    loss: float | None = None


_NOTHING = _Share(0)


def _share(member: Member) -> _Share:
    returned = int(member.buffered > 0)
    if not member.active:
        return _Share(returned)
    return _Share(
        returned,
        1,
        member.returns,
        max(member.samples, 1),
        returned,
        member.usual_norm,
        member.usual_steps,
        member.claimed_loss,
    )


def _move(tally: Tally, before: _Share, after: _Share) -> None:
    """A member adds something else than before. Only what changed is touched: this is done several times an update."""
    for name in ("returned", "active", "returns", "samples", "active_returned"):
        if more := getattr(after, name) - getattr(before, name):
            setattr(tally, name, getattr(tally, name) + more)
    for values, old, new in (
        (tally.norms, before.norm, after.norm),
        (tally.steps, before.steps, after.steps),
        (tally.losses, before.loss, after.loss),
    ):
        if old != new:
            _keep(values, old, new)


def _keep(values: list[Any], old: float | None, new: float | None) -> None:
    """In a list in order, a member's value takes the place of the one before."""
    if old is not None:
        del values[bisect_left(values, old)]
    if new is not None:
        insort(values, new)
