"""What is believed of an update: of the steps, samples and seconds that its node claims, and how much of its norm.

Nobody can prove what a node did. What is known is what the rule asked of it, how many samples it has said it has, how
long the training runs, and what the other nodes do. So claims are cut to what those allow, and a norm to a multiple of
the median over nodes: each counts once there, however many updates it sends, and with fewer than half of the nodes
lying the median lies between honest values. Of an even number it is the lower of the two in the middle: of two nodes
one is half, and there a liar can slow the other down to a multiple of its own norms, but cannot make room for itself.

Norms are for a single step (`weights.step_norm`), and are kept as they came: a norm kept after its cut would hold back
honest nodes that a tiny one was compared with once, by as many versions as it was times smaller. Those of
nothing are not kept: where most nodes have no samples to learn from they would choke who has.

Masters before kept norms and steps after the cut, took the mean of the two in the middle, and compared the first
updates with the smallest of them. Their logs say so (`Claims`: checked), and are decided as that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from statistics import median, median_low

from common.wire.to_master import UpdateManifest
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.decisions.rules.weights import STEPS_BOUND, step_norm
from master_service.decisions.settings import Claims
from master_service.decisions.state import Buffered, EncoderState, Member, Weighed
from master_service.decisions.tally import changing

#: Counted updates of a node that say what is usual for it.
KEPT = 8
#: Nodes of which something must be known before their median says anything.
_ENOUGH = 2
#: Fewer updates of a node that is alone say nothing about its next one.
_FEW = 5
#: A loss beyond this, either way, is none.
MAX_LOSS = 1e6
#: What a node returns after where the rule sets no bound; see `node_service/training/update_rule.py`.
_UNBOUNDED_STEPS = 25


@dataclass(frozen=True, slots=True)
class Believed:
    """What is believed of an update: the steps that it was made of, and the factor that its norm is cut by; `norm` is
    for a single step, and what is kept of it."""

    made_of: int
    factor: float
    norm: float


def allowed_steps(rule: UpdateRule) -> int | None:
    """The most steps that one update may be made of by the rule; None where it counts none (a bound of seconds, loss or
    drift alone). A node that the master gives no sign of life to goes on for `away_steps`; where those have no end,
    STEPS_BOUND times the usual is believed."""
    when, batch = rule.when, rule.inner.batch_size
    bounds = [] if when.steps is None else [when.steps]
    bounds += [] if when.samples is None else [math.ceil(when.samples / batch)]
    bounds += [_UNBOUNDED_STEPS] if when == ReturnWhen() else []
    if not bounds:
        return None
    return max(min(bounds), STEPS_BOUND * min(bounds) if rule.away_steps is None else rule.away_steps)


def capped(manifest: UpdateManifest, encoder: EncoderState, rule: UpdateRule, at: float) -> UpdateManifest:
    """The manifest with no more steps than the rule allows, no more samples than so many steps take, and no more
    seconds than the training runs."""
    most = allowed_steps(rule)
    steps = manifest.steps if most is None else min(manifest.steps, most)
    samples = min(manifest.samples, steps * rule.inner.batch_size)
    seconds = min(manifest.seconds, max(0.0, at - encoder.run_started_at))
    return manifest.model_copy(update={"steps": steps, "samples": samples, "seconds": seconds})


def own_samples(item: Buffered, member: Member) -> int:
    """The samples that an update weighs by: no more than the node has, however often it went through them."""
    return min(item.samples, member.samples)


def comparable(encoder: EncoderState) -> bool:
    """Whether the norms of the updates at hand can be compared with those of a second node; if not, they wait for it,
    or for the grace time. Where only one node is active there is nothing to wait for."""
    known = len(encoder.tally.norms)
    if encoder.tally.active < _ENOUGH or known >= _ENOUGH:
        return True
    return known + len({item.node for item in encoder.buffer if not _is_known(encoder, item.node)}) >= _ENOUGH


def believed(
    encoder: EncoderState, items: Sequence[Buffered], multiple: float | None, claims: Claims
) -> list[Believed]:
    """Of each of the updates that are to become a version, what is believed of it."""
    as_before, tally = claims == "checked", encoder.tally
    new = {item.node for item in items if not _is_known(encoder, item.node)}
    bound = partial(_bound_before if as_before else _bound, nodes=[item.node for item in items], new=new)
    steps = bound(tally.steps, [item.steps for item in items], STEPS_BOUND, middle=median_low)
    made_of = [max(1, item.steps if steps is None else min(item.steps, int(steps))) for item in items]
    norms = [step_norm(item.norm, each) for item, each in zip(items, made_of, strict=True)]
    limit = None
    if multiple is not None and items:
        limit = bound(tally.norms, norms, multiple, middle=median if as_before else median_low)
        alone = encoder.members[items[0].node]
        if limit is None and len(alone.norms) >= _FEW and alone.usual_norm is not None:
            limit = multiple * alone.usual_norm  # there is nobody else: it is compared with itself
    found = []
    for each, norm in zip(made_of, norms, strict=True):
        left = norm if limit is None else min(norm, limit)
        found.append(Believed(each, left / norm if left < norm else 1.0, left if as_before else norm))
    return found


def observe(encoder: EncoderState, counted: Sequence[Weighed], claims: Claims) -> None:
    """Note what the updates of a version came to, for the next."""
    for weighed in counted:
        member = encoder.members[weighed.item.node]
        with changing(encoder, member):
            made_of = weighed.made_of if claims == "checked" else weighed.item.steps
            member.made_of = [*member.made_of, made_of][-KEPT:]
            member.usual_steps = median_low(member.made_of)
            if weighed.norm > 0:
                member.norms = [*member.norms, weighed.norm][-KEPT:]
                member.usual_norm = median(member.norms)


def note_loss(encoder: EncoderState, member: Member, loss: float) -> None:
    """What a node claims of its training samples, for the stop rule."""
    if abs(loss) <= MAX_LOSS:  # nor is NaN
        with changing(encoder, member):
            member.claimed_loss = loss


def _is_known(encoder: EncoderState, node: str) -> bool:
    member = encoder.members[node]
    return member.active and member.usual_norm is not None


def _bound(
    usual: Sequence[float],
    at_hand: Sequence[float],
    multiple: float,
    *,
    nodes: Sequence[str],
    new: Set[str],
    middle: Callable[[Sequence[float]], float],
) -> float | None:
    """`multiple` × the middle over nodes: of what is `usual` for those of which that is known, and of what is at hand
    from the `new` ones, as far as it is more than nothing. None if that is of one node alone. `nodes`: whose each of
    those at hand is."""
    fresh: dict[str, list[float]] = {}
    for node, value in zip(nodes, at_hand, strict=True):
        if node in new and value > 0:
            fresh.setdefault(node, []).append(value)
    each = sorted([*usual, *(middle(sorted(values)) for values in fresh.values())])
    return multiple * middle(each) if len(each) >= _ENOUGH else None


def _bound_before(
    usual: Sequence[float],
    at_hand: Sequence[float],
    multiple: float,
    *,
    nodes: Sequence[str],
    new: Set[str],
    middle: Callable[[Sequence[float]], float],
) -> float | None:
    """As `_bound`; where what is usual is known of too few, the smallest of it and of all at hand takes the place of
    the middle."""
    if len(usual) >= _ENOUGH:
        return multiple * middle(usual)
    if len(usual) + len(new) < _ENOUGH:
        return None
    return multiple * min((each for each in (*usual, *at_hand) if each > 0), default=math.inf)
