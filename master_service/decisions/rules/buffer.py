"""When the updates at hand become the next version: pure functions of who is active and who has returned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from master_service.decisions.rules.model import BufferRule


@dataclass(frozen=True, slots=True)
class Turnout:
    """What is at hand: `updates` of `nodes` different nodes. `missing` of the `active` nodes have none at hand."""

    updates: int
    nodes: int
    active: int
    missing: int


def is_ready(turnout: Turnout, rule: BufferRule, max_unanswered: int, needs: int = 1) -> bool:
    """Whether to step now.

    arrival: at once (FedAsync). count: K updates (FedBuff), or as many as the active nodes may hand in without an
    answer (`max_unanswered` each), so that a few do not wait for those who have gone. half: min(active, max(2,
    ⌈active/2⌉)) updates. cohort: one of every active node (FedAvg, DiLoCo). count and half want two distinct nodes
    where two are active. None of them steps with fewer than `needs` distinct nodes.
    """
    active = turnout.active
    if not turnout.updates or turnout.nodes < needs:
        return False
    if rule.kind == "arrival":
        return True
    if rule.kind == "cohort":
        return turnout.missing == 0
    if turnout.nodes < min(2, active):
        return False
    if rule.kind == "count":
        return turnout.updates >= min(rule.size, max(1, active) * max_unanswered)
    return turnout.updates >= min(active, max(2, math.ceil(active / 2)))
