"""A damaged ledger: what is whole of it is kept, what is lost is said, and the damaged file stays beside it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from common.clock import SYSTEM
from common.errors import Damaged, UserError
from common.locks import DirectoryLock
from master_service.decisions.records import Repaired
from master_service.history.snapshot import Manifest, read_snapshot, whole_snapshots
from master_service.log.ledger import LEDGER
from master_service.log.message_log import Row, open_log
from master_service.log.payload_files import FilePayloads


@dataclass(frozen=True, slots=True)
class Report:
    """Rows up to `last_whole` were kept, and those after `resumed_at` up to `newest`. In between a snapshot of the row
    `resumed_at` stands for what is lost; without one, `resumed_at` is `last_whole`."""

    problem: str
    last_whole: int
    resumed_at: int
    newest: int
    damaged: Path


def repair(directory: Path) -> Report | None:
    """Keep the rows up to the first that is damaged; if there is a newer snapshot, go on from it and from the rows that
    follow it in the chain.

    None if nothing is wrong. Raises LockHeld while a master runs there, UserError if there is no ledger.
    """
    path = directory / LEDGER
    if not path.exists():
        raise UserError(f"no message log in {directory}; give the master's state directory with --state DIR")
    lock = DirectoryLock(directory)
    try:
        problem = _problem(directory)
        if problem is None:
            return None
        beside = directory / "repaired"
        shutil.rmtree(beside, ignore_errors=True)
        last_whole, resumed_at, newest = _copy(path, beside, directory, problem)
        damaged = directory / f"{LEDGER}.damaged-{int(SYSTEM.now() * 1e9)}"
        os.link(path, damaged)  # at no moment is there no ledger: a start would begin a new one
        for suffix in ("-wal", "-shm"):
            side = path.with_name(path.name + suffix)
            if side.exists():
                side.replace(damaged.with_name(damaged.name + suffix))
        (beside / LEDGER).replace(path)
        shutil.rmtree(beside)
        return Report(problem, last_whole, resumed_at, newest, damaged)
    finally:
        lock.close()


def _copy(path: Path, beside: Path, directory: Path, problem: str) -> tuple[int, int, int]:
    """Make a ledger of what is whole in another directory; gives the offsets of the report."""
    log = open_log(beside)
    log.note_dropped(_readable_notes(path))
    log.take(_readable_rows(path))
    last_whole = log.last_offset
    resumed_at, newest, checksum = last_whole, last_whole, ""
    for _, snapshot in whole_snapshots(directory / "snapshots", FilePayloads(directory / "payloads")):
        if isinstance(snapshot, Manifest) and snapshot.offset > last_whole:
            reached = _reached(path, snapshot)
            if reached > newest:  # of two snapshots that lead as far, the older one leaves out less
                resumed_at, newest, checksum = snapshot.offset, reached, snapshot.checksum
    place, at = (last_whole + 1, SYSTEM.now()) if resumed_at == last_whole else (resumed_at, 0.0)
    record = Repaired(last_whole=last_whole, resumed_at=resumed_at, problem=problem, checksum=checksum)
    log.append(record, message_id=uuid.uuid4().hex, at=at, carried_out=resumed_at, offset=place)
    if resumed_at > last_whole:
        log.take(_readable_rows(path, resumed_at))
    log.close_as_one_file()
    return last_whole, resumed_at, newest


def _reached(path: Path, snapshot: Manifest) -> int:
    """The last row of the damaged ledger that follows from a snapshot without a gap."""
    offset, checksum = snapshot.offset, snapshot.checksum
    for row in _readable_rows(path, offset):
        if row.offset != offset + 1 or not row.follows(checksum):
            break
        offset, checksum = row.offset, row.chain
    return offset


def _problem(directory: Path) -> str | None:
    """What is wrong with the ledger, in words; None if every row is whole and the snapshots are of its rows."""
    try:
        log = open_log(directory)
    except Damaged as error:
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


def _readable_rows(damaged: Path, after: int = -1) -> Iterator[Row]:
    """The rows of a ledger that is damaged, unchecked, as far as SQLite can read on."""
    source = sqlite3.connect(f"file:{quote(str(damaged))}?mode=ro", uri=True, isolation_level=None)
    try:
        # lets SQLite read what there is of a file that was cut
        source.execute("PRAGMA writable_schema=ON")
        for row in source.execute("SELECT * FROM entries WHERE offset > ? ORDER BY offset", (after,)):
            yield Row(*row)
    except sqlite3.DatabaseError:
        return
    finally:
        source.close()


def _readable_notes(damaged: Path) -> list[tuple[str, str, float]]:
    """What such a ledger says of dropped payloads: (payload, reason, at)."""
    source = sqlite3.connect(f"file:{quote(str(damaged))}?mode=ro", uri=True, isolation_level=None)
    try:
        source.execute("PRAGMA writable_schema=ON")
        return source.execute("SELECT payload, reason, at FROM dropped").fetchall()
    except sqlite3.DatabaseError:
        return []
    finally:
        source.close()
