"""The weights of the updates that make the next version: taken together, when the counts of all of them are known."""

from __future__ import annotations

import math

from master_service.decisions.rules.model import AggregationRule
from master_service.decisions.rules.weights import count_factor, norm_factor, sample_factor, staleness_factor
from master_service.decisions.state import EncoderState, Weighed


def weigh(encoder: EncoderState, rule: AggregationRule) -> list[Weighed]:
    """Every update of the buffer with its weight: samples × staleness × return count × norm cut."""
    items = encoder.buffer
    counted = encoder.active() | {item.node: encoder.members[item.node] for item in items}
    returns = {node: member.returns for node, member in counted.items()}
    samples = {node: member.samples for node, member in counted.items()}
    divisor = math.fsum(sample_factor(item.samples, rule.weights) for item in items)
    weighed = []
    for item in items:
        staleness = encoder.version - item.base_version
        weight = (
            sample_factor(item.samples, rule.weights)
            * staleness_factor(staleness, rule.weights)
            * count_factor(item.node, returns, samples, rule.weights)
            * norm_factor(item.norm, encoder.norms, rule.guards.norm_clip)
            / divisor
            * len(items)
        )
        weighed.append(Weighed(item=item, weight=weight, coefficient=weight / len(items), staleness=staleness))
    return weighed
