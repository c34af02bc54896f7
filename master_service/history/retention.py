"""Which payloads the message log keeps. Rows are never dropped, and neither is what a start might need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from master_service.history.snapshot import Manifest
from master_service.log.message_log import MessageLog

#: Keep all payloads, only those after the oldest snapshot that is kept, or as many as fit into so many bytes.
Retention = Literal["all", "since-snapshot"] | int


def prune(log: MessageLog, kept: Sequence[Manifest], retention: Retention, at: float) -> int:
    """Drop payloads of updates by the policy, oldest first; gives the bytes freed. `kept`: the snapshots.

    What a master that starts from the oldest kept snapshot would read is always kept, also when it is over the budget.
    """
    floor = min((each.offset for each in kept), default=-1)
    return log.drop(droppable(log, kept, retention), f"retention {retention}", at, up_to=floor)


def droppable(log: MessageLog, kept: Sequence[Manifest], retention: Retention) -> list[str]:
    """The payloads that the policy would drop now, oldest first."""
    if retention == "all" or len(kept) < 2:
        return []  # with one snapshot alone, its damage would leave nothing to start from
    needed = {payload for each in kept for payload in each.buffered}
    found = [payload for payload in log.update_payloads(min(each.offset for each in kept)) if payload not in needed]
    if isinstance(retention, str):
        return found
    over = sum(map(log.payloads.size, log.payloads.stored())) - retention
    chosen = []
    for payload in found:
        if over <= 0:
            break
        over -= log.payloads.size(payload)
        chosen.append(payload)
    return chosen
