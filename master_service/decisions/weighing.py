"""The weights of the updates that make the next version: taken together, when the counts of all of them are known."""

from __future__ import annotations

import math

from master_service.decisions.rules.model import AggregationRule
from master_service.decisions.rules.weights import (
    believed_steps,
    count_factor,
    norm_factor,
    sample_factor,
    staleness_factor,
    step_norm,
)
from master_service.decisions.state import Buffered, EncoderState, Weighed
from master_service.decisions.tally import totals

#: Updates that the guards look back on.
KEPT_NORMS = 64


def weigh(encoder: EncoderState, items: list[Buffered], rule: AggregationRule) -> list[Weighed]:
    """Each of the updates with its weight: samples × staleness × return count × norm cut."""
    compared = totals(encoder, items)
    divisor = math.fsum(sample_factor(item.samples, rule.weights) for item in items)
    weighed = []
    for item in items:
        member = encoder.members[item.node]
        staleness = encoder.version - item.base_version
        norm = step_norm(item.norm, believed_steps(item.steps, encoder.steps))
        weight = (
            sample_factor(item.samples, rule.weights)
            * staleness_factor(staleness, rule.weights)
            * count_factor(member.returns, member.samples, compared, rule.weights)
            * norm_factor(norm, encoder.norms, rule.guards.norm_clip)
            / divisor
            * len(items)
        )
        weighed.append(Weighed(item=item, weight=weight, coefficient=weight / len(items), staleness=staleness))
    return weighed


def observe_norms(encoder: EncoderState, items: list[Buffered]) -> None:
    """Note how large the updates of a version were, for the guards of the next."""
    steps = [believed_steps(item.steps, encoder.steps) for item in items]
    norms = [step_norm(item.norm, made_of) for item, made_of in zip(items, steps, strict=True)]
    encoder.norms = (encoder.norms + norms)[-KEPT_NORMS:]
    encoder.steps = (encoder.steps + steps)[-KEPT_NORMS:]
