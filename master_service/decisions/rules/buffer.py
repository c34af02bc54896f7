"""When the updates at hand become the next version: pure functions of who is active and who has returned."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from master_service.decisions.rules.model import BufferRule


def is_ready(waiting: Sequence[str], active: Collection[str], rule: BufferRule, max_unanswered: int) -> bool:
    """Whether to step now. `waiting` names the node of each buffered update, in order of arrival.

    arrival: at once (FedAsync). count: K updates (FedBuff), or as many as the active nodes may hand in without an
    answer (`max_unanswered` each), so that a few do not wait for those who have gone. half: min(active, max(2,
    ⌈active/2⌉)) updates. cohort: one of every active node (FedAvg, DiLoCo). count and half want two distinct nodes
    where two are active.
    """
    if not waiting:
        return False
    if rule.kind == "arrival":
        return True
    distinct = set(waiting)
    if rule.kind == "cohort":
        return distinct.issuperset(active)
    if len(distinct) < min(2, len(active)):
        return False
    if rule.kind == "count":
        return len(waiting) >= min(rule.size, max(1, len(active)) * max_unanswered)
    return len(waiting) >= min(len(active), max(2, math.ceil(len(active) / 2)))
