"""A damaged ledger is refused, named, and repaired to what is whole."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from common.errors import Damaged, LockHeld, UserError
from common.locks import DirectoryLock
from master_service.decisions.records import Repaired, Started
from master_service.history.repair import repair
from master_service.history.replay import origin, verify
from master_service.history.snapshot import read_snapshot
from master_service.log.message_log import MessageLog, open_log
from tests.unit.master.test_fold import Federation, checkpoint_wal, snapshot


def test_a_changed_row_is_found_and_the_rows_before_it_are_kept(tmp_path: Path) -> None:
    run = Federation(tmp_path, "fedasync", size=3)
    for sequence in range(4):
        run.update("a", sequence)
    last = run.log.last_offset
    run.log.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        ledger.execute("UPDATE entries SET at = at + 1 WHERE offset = ?", (last - 2,))
    with pytest.raises(Damaged, match=rf"row {last - 2} of the ledger in {tmp_path} is not what was written"):
        list(open_log(tmp_path, read_only=True).entries())
    report = repair(tmp_path)
    assert report is not None and (report.last_whole, report.resumed_at) == (last - 3, last - 3)
    assert f"row {last - 2}" in report.problem and report.damaged.exists()
    log = open_log(tmp_path)
    assert log.last_offset == last - 2 and isinstance(log.entry(last - 2).body, Repaired)
    log = repaired_again(log)
    assert all(check is None or check.identical for _, check in verify(log, origin(log).fold))


def repaired_again(log: MessageLog) -> MessageLog:
    """A repaired ledger needs no repair, and can be written to."""
    log.append(Started(epoch=5, fingerprint={}), message_id="after", at=0.0)
    log.close()
    assert repair(log.directory) is None
    return open_log(log.directory)


def test_a_cut_file_is_refused_and_repaired(tmp_path: Path) -> None:
    run = Federation(tmp_path, "fedasync", size=3)
    for sequence in range(40):
        run.update("a", sequence)
    last = run.log.last_offset
    checkpoint_wal(run.log)
    run.log.close()
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(Damaged, match=r"ledger\.sqlite is malformed .*shared-encoder log repair --state"):
        open_log(tmp_path)
    report = repair(tmp_path)
    assert report is not None and -1 <= report.last_whole < last
    assert [entry.offset for entry in open_log(tmp_path).entries()][-1] == report.last_whole + 1


def test_a_snapshot_that_is_newer_than_the_whole_rows_is_gone_on_from(tmp_path: Path) -> None:
    run = Federation(tmp_path, "fedasync", size=3)
    for sequence in range(4):
        run.update("a", sequence)
    snapshot(run)
    offset, digest = run.fold.offset, run.state.digest
    run.log.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        ledger.execute("DELETE FROM entries WHERE offset > ?", (offset - 3,))
    log = open_log(tmp_path)
    with pytest.raises(Damaged, match="rows are lost"):
        read_snapshot(tmp_path / "snapshots", log)
    log.close()
    report = repair(tmp_path)
    assert report is not None and (report.last_whole, report.resumed_at) == (offset - 3, offset)
    log = open_log(tmp_path)
    begin = origin(log)
    assert "rows after" in begin.left_out
    list(verify(log, begin.fold))
    assert begin.fold.coordinator.state.encoders[run.encoder].digest == digest
    assert read_snapshot(tmp_path / "snapshots", log).offset == offset, "a start goes on from there"


def test_repair_asks_for_a_log_that_nobody_uses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no message log in"):
        repair(tmp_path)
    open_log(tmp_path).close()
    assert repair(tmp_path) is None
    lock = DirectoryLock(tmp_path)
    with pytest.raises(LockHeld, match="is in use by process"):
        repair(tmp_path)
    lock.close()


def test_a_ledger_of_another_schema_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        ledger.execute("CREATE TABLE entries (offset INTEGER)")
    with pytest.raises(UserError, match=r"schema version 0, this program reads 2"):
        open_log(tmp_path)
