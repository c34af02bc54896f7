"""The weights of the updates that make the next version: taken together, when the counts of all of them are known."""

from __future__ import annotations

import math
from collections import Counter

from master_service.decisions import guarding
from master_service.decisions.effects import Contribution
from master_service.decisions.rules.model import AggregationRule
from master_service.decisions.rules.weights import (
    believed_steps,
    count_factor,
    norm_factor,
    sample_factor,
    staleness_factor,
    step_norm,
)
from master_service.decisions.settings import Claims, Settings
from master_service.decisions.state import Buffered, EncoderState, Weighed
from master_service.decisions.tally import totals

#: Updates that the guards look back on where claims are taken as facts.
KEPT_NORMS = 64


def weigh(encoder: EncoderState, items: list[Buffered], rule: AggregationRule, claims: Claims) -> list[Weighed]:
    """Each of the updates with its weight: samples × staleness × return count × norm cut."""
    compared = totals(encoder, items)
    checked = claims != "taken"
    if checked:
        found = guarding.believed(encoder, items, rule.guards.norm_clip, claims)
    else:
        found = [_taken(encoder, item, rule) for item in items]
    samples = [guarding.own_samples(item, encoder.members[item.node]) if checked else item.samples for item in items]
    divisor = math.fsum(sample_factor(each, rule.weights) for each in samples)
    weighed = []
    for item, believed, own in zip(items, found, samples, strict=True):
        member = encoder.members[item.node]
        staleness = encoder.version - item.base_version
        weight = (
            sample_factor(own, rule.weights)
            * staleness_factor(staleness, rule.weights)
            * count_factor(member.returns, member.samples, compared, rule.weights)
            * believed.factor
            / divisor
            * len(items)
        )
        weighed.append(
            Weighed(
                item=item,
                weight=weight,
                coefficient=weight / len(items),
                staleness=staleness,
                norm=believed.norm,
                made_of=believed.made_of,
            )
        )
    return weighed


def by_node(weighed: list[Weighed]) -> tuple[Contribution, ...]:
    """What a robust rule is made of: a node is a part, of as many updates as it has at hand, whose mean counts. Parts
    are in the order of the nodes' names, so that it makes no difference who was first."""
    nodes = sorted({each.item.node for each in weighed})
    counts = Counter(each.item.node for each in weighed)
    return tuple(
        Contribution(
            each.item.payload, each.item.encoding, each.weight / counts[each.item.node], nodes.index(each.item.node)
        )
        for each in sorted(weighed, key=lambda each: each.item.node)
    )


def grace_ends(encoder: EncoderState, settings: Settings) -> float | None:
    """When the updates at hand become a version, however few they are; None while they cannot: there are none, or a
    robust rule needs more distinct nodes."""
    if not encoder.buffer or encoder.tally.returned < settings.rule.combine.needs:
        return None
    return encoder.buffer_since + settings.rule.buffer.grace_seconds


def _taken(encoder: EncoderState, item: Buffered, rule: AggregationRule) -> guarding.Believed:
    """The cut as it was while claims were taken as facts."""
    norm = step_norm(item.norm, believed_steps(item.steps, encoder.steps))
    return guarding.Believed(0, norm_factor(norm, encoder.norms, rule.guards.norm_clip), 0.0)


def observe_norms(encoder: EncoderState, items: list[Buffered]) -> None:
    """Note how large the updates of a version were, for the guards of the next; where claims are taken as facts."""
    steps = [believed_steps(item.steps, encoder.steps) for item in items]
    norms = [step_norm(item.norm, made_of) for item, made_of in zip(items, steps, strict=True)]
    encoder.norms = (encoder.norms + norms)[-KEPT_NORMS:]
    encoder.steps = (encoder.steps + steps)[-KEPT_NORMS:]
