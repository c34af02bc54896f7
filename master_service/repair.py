"""A damaged ledger: what is whole of it is kept, what is lost is said, and the damaged file stays beside it."""

from __future__ import annotations

import sqlite3
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from common.errors import Damaged, UserError
from common.locks import DirectoryLock
from master_service.entries import Repaired
from master_service.message_log import MessageLog, copy_whole_rows
from master_service.snapshot import kept_snapshots, read_snapshot


@dataclass(frozen=True, slots=True)
class Report:
    """`last_whole` is the last row that was kept, `resumed_at` the row whose state a start goes on from."""

    problem: str
    last_whole: int
    resumed_at: int
    damaged: Path


def repair(directory: Path) -> Report | None:
    """Keep the rows up to the first that is damaged; go on from a snapshot that is newer, if there is one.

    None if nothing is wrong. Raises LockHeld while a master runs there, UserError if there is no ledger.
    """
    path = directory / "ledger.sqlite"
    if not path.exists():
        raise UserError(f"no message log in {directory}; give the master's state directory with --state DIR")
    lock = DirectoryLock(directory)
    try:
        problem = _problem(directory)
        if problem is None:
            return None
        beside = directory / "repaired"
        beside.mkdir(exist_ok=True)
        (beside / "ledger.sqlite").unlink(missing_ok=True)
        last_whole = copy_whole_rows(path, beside)
        damaged = directory / f"ledger.sqlite.damaged-{int(time.time())}"
        for suffix in ("-wal", "-shm"):
            side = path.with_name(path.name + suffix)
            if side.exists():
                side.replace(damaged.with_name(damaged.name + suffix))
        path.replace(damaged)
        (beside / "ledger.sqlite").replace(path)
        beside.rmdir()
        log = MessageLog(directory)
        newest = max((each.offset for each in kept_snapshots(directory / "snapshots")), default=-1)
        resumed_at = max(newest, last_whole)
        record = Repaired(last_whole=last_whole, resumed_at=resumed_at, problem=problem)
        log.append(record, message_id=uuid.uuid4().hex, at=time.time(), carried_out=resumed_at, offset=resumed_at + 1)
        log.close()
        return Report(problem, last_whole, resumed_at, damaged)
    finally:
        lock.close()


def _problem(directory: Path) -> str | None:
    """What is wrong with the ledger, in words; None if every row is whole and the snapshots are of its rows."""
    try:
        log = MessageLog(directory)
    except (Damaged, sqlite3.DatabaseError) as error:
        return str(error).split(";")[0]
    try:
        for _ in log.entries():
            pass
        read_snapshot(directory / "snapshots", log)
    except Damaged as error:
        return str(error).split(";")[0]
    finally:
        log.close()
    return None
