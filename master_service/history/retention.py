"""Which payloads the message log keeps. Rows are never dropped, and neither is what a start might need."""

from __future__ import annotations

from collections.abc import Sequence

from master_service.config import DEFAULT_RETENTION, Retention
from master_service.history.snapshot import Manifest
from master_service.log.message_log import RETENTION, MessageLog

#: A budget is looked at whenever so many parts of it have come: it is exceeded by that, and by what a start needs.
_PARTS = 20


def prune(log: MessageLog, kept: Sequence[Manifest], retention: Retention, at: float) -> int:
    """Drop payloads of updates by the policy, oldest first; gives the bytes freed. `kept`: the snapshots.

    What a master that starts from the oldest kept snapshot would read is always kept, also when it is over the budget.
    """
    floor = min((each.offset for each in kept), default=-1)
    return log.drop(droppable(log, kept, retention), f"{RETENTION} {retention}", at, up_to=floor)


def droppable(log: MessageLog, kept: Sequence[Manifest], retention: Retention) -> list[str]:
    """The payloads that the policy would drop now, oldest first."""
    if retention == "all" or len(kept) < 2:
        return []  # with one snapshot alone, its damage would leave nothing to start from
    needed = {payload for each in kept for payload in each.buffered}
    found = [payload for payload in log.update_payloads(min(each.offset for each in kept)) if payload not in needed]
    if isinstance(retention, str):
        return found
    over = stored_bytes(log) - retention
    chosen = []
    for payload in found:
        if over <= 0:
            break
        over -= log.payloads.size(payload)
        chosen.append(payload)
    return chosen


def said_of(retention: Retention, given: str | int | None) -> str:
    """For people, at a start: what is kept, and what says otherwise. `given`: as the configuration has it, None if it
    has nothing."""
    if retention == "all":
        return "every update is kept to replay; master.retention bounds that"
    if retention == "since-snapshot":
        return "updates are kept as long as a start may need them; a replay begins at a snapshot"
    of = given if isinstance(given, str) and given.endswith("%") else DEFAULT_RETENTION if given is None else ""
    share = f" ({of} of the disk)" if of else ""
    return (
        f"updates are kept to replay up to {retention / 1e9:,.1f} GB{share}, the oldest go first; "
        'master.retention = "all" keeps everything'
    )


def first_versions(log: MessageLog, kept: Sequence[Manifest]) -> dict[str, int]:
    """By encoder, the first version that a replay rebuilds: that of the oldest kept snapshot; none where all payloads
    are there, and a replay begins with the first row."""
    floor = min((each.offset for each in kept), default=-1)
    return log.versions_at(floor) if log.was_pruned else {}


def stored_bytes(log: MessageLog) -> int:
    """Of all payloads that are here. Each is looked at."""
    return sum(map(log.payloads.size, log.payloads.stored()))


class Budget:
    """When a budget of bytes is to be looked at, between snapshots too. `bytes`: the budget, None for none; `came`:
    since the start; `over`: what lies there is more, and all of it needed; a snapshot would free some."""

    def __init__(self, retention: Retention) -> None:
        self.bytes = None if isinstance(retention, str) else retention
        self.came = 0
        self._looked_at = 0
        self.over = False

    def comes(self, size: int) -> None:
        """A payload of so many bytes."""
        self.came += size

    @property
    def due(self) -> bool:
        """Whether so much has come since it was looked at that it may be exceeded."""
        return self.bytes is not None and (self.came - self._looked_at) * _PARTS > self.bytes

    def looked(self, log: MessageLog) -> None:
        """What may go is gone; whether that was enough. Each payload is looked at."""
        self._looked_at = self.came
        self.over = self.bytes is not None and stored_bytes(log) > self.bytes
