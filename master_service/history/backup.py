"""A copy of a state directory that a master could start from, made while one may be writing to it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from common.durable import sync
from common.errors import SharedEncoderError
from master_service.history.snapshot import kept_snapshots, usable_snapshots
from master_service.log.ledger import LEDGER
from master_service.log.message_log import open_log
from master_service.log.payload_files import FilePayloads

#: While a copy is made a master may drop payloads and replace snapshots: then what is missing is copied again.
_ROUNDS = 5


@dataclass
class BackedUp:
    """What a copy holds: rows, payloads, bytes of these, snapshots; `lost`: payloads that are damaged, or missing
    without a note, where they were copied from."""

    rows: int = 0
    payloads: int = 0
    bytes: int = 0
    snapshots: int = 0
    lost: list[str] = field(default_factory=list)


def back_up(directory: Path, target: Path, on_payload: Callable[[], None] = lambda: None) -> BackedUp:
    """Copy ledger, payloads and snapshots of a state directory into `target`, which is empty or not there.

    The ledger is that of one moment, by SQLite's own backup, and the snapshots are older than it. Raises
    FileNotFoundError if there is no ledger, Damaged if it is malformed, UserError for another schema, OSError, and
    SharedEncoderError if the master's retention was faster than this in every round.
    """
    target.mkdir(parents=True, exist_ok=True)
    for _ in range(_ROUNDS):
        copied = _copy_snapshots(directory, target)
        _copy_ledger(directory, target)
        found = _copy_payloads(directory, target, on_payload)
        still = {each.offset for each in kept_snapshots(directory / "snapshots")}
        # what the newest copied snapshot needs was not dropped as long as the master keeps that snapshot, too
        usable = max(copied) in still if copied else not still
        if usable and (not found.lost or _noted(directory) == _noted(target)):
            found.snapshots = len(copied)
            sync(target)
            return found
    raise SharedEncoderError(
        f"{directory}: its master dropped payloads faster than they were copied, {_ROUNDS} times; try again"
    )


def _copy_snapshots(directory: Path, target: Path) -> set[int]:
    """The newest ones that a start may use; gives their offsets. One that is replaced meanwhile is left out."""
    shutil.rmtree(target / "snapshots", ignore_errors=True)
    for source, _ in usable_snapshots(directory / "snapshots"):
        try:
            shutil.copytree(source, target / "snapshots" / source.name)
        except (FileNotFoundError, shutil.Error):
            shutil.rmtree(target / "snapshots" / source.name, ignore_errors=True)
    return {each.offset for each in kept_snapshots(target / "snapshots")}


def _copy_ledger(directory: Path, target: Path) -> None:
    for path in target.glob(f"{LEDGER}*"):
        path.unlink()
    with closing(open_log(directory, read_only=True)) as log, closing(sqlite3.connect(target / LEDGER)) as copy:
        log.copy_into(copy)


def _copy_payloads(directory: Path, target: Path, on_payload: Callable[[], None]) -> BackedUp:
    """Those that the copied rows name, each checked against its name."""
    source, copies = FilePayloads(directory / "payloads"), FilePayloads(target / "payloads")
    with closing(open_log(target, read_only=True)) as log:
        gone, found = log.dropped(), BackedUp()
        named: set[str] = set()
        for row in log.rows():
            found.rows += 1
            if row.payload is not None:
                named.add(row.payload)
        for digest in sorted(named - gone.keys()):
            try:
                payload = source.read(digest)
            except FileNotFoundError:
                found.lost.append(digest)
                continue
            if copies.write(payload) != digest:
                found.lost.append(digest)
                continue
            found.payloads += 1
            found.bytes += len(payload)
            on_payload()
    return found


def _noted(directory: Path) -> dict[str, str]:
    with closing(open_log(directory, read_only=True)) as log:
        return log.dropped()
