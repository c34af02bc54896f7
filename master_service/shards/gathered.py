"""A message log of several aggregators together with what these keep, for whoever replays it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from master_service.log.message_log import MessageLog, logged_shards
from master_service.log.parts import PartedPayloads
from master_service.shards.store import opened_shard_payloads


def gather(log: MessageLog, directories: Sequence[Path]) -> None:
    """Let the log read updates out of the state directories of its aggregators, in whatever order they are named.
    Raises UserError unless these are all that there are, and no others."""
    count = logged_shards(log) or 1
    if count == 1:
        if directories:
            raise UserError("this log is of no aggregators but its master; leave --aggregator out")
        return
    found = dict(opened_shard_payloads(directory) for directory in directories)
    wanted = [(number, count) for number in range(count)]
    if sorted(found) != wanted or len(directories) != count:
        missing = ", ".join(f"{number + 1}/{count}" for number, _ in wanted if (number, count) not in found)
        raise UserError(
            f"this log is of {count} aggregators, which keep what nodes sent: name the state directory of each with "
            f"--aggregator DIR{f'; missing: {missing}' if missing else '; one is too many'}"
        )
    log.updates = PartedPayloads(log.payloads, [found[each] for each in wanted])
