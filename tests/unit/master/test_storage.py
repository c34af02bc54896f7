"""What the master keeps, over both stores: payloads in files and in memory, the ledger in a file and in memory; and
F19: what retention looks at, and in which thread."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.clock import VirtualClock
from common.errors import Damaged
from common.wire.to_master import Get, Join
from master_service.config import MasterConfig
from master_service.decisions.records import Skipped, Started, Tick, UpdateFacts
from master_service.history.snapshot import SnapshotDirectory
from master_service.history.state_directory import Journal
from master_service.log import payload_files
from master_service.log.deadly import MemoryMark
from master_service.log.message_log import MessageLog, Row, open_log
from master_service.log.payload_files import FilePayloads, payload_path
from master_service.log.payloads import Incoming, MemoryPayloads, Payloads
from master_service.log.room import Room
from tests.unit.master.test_replay import trained
from tests.unit.scenario import Scenario

# --- payloads --------------------------------------------------------------------------------------------------------


class PayloadsCases:
    """What every Payloads must do."""

    def payloads(self, directory: Path) -> Payloads:
        raise NotImplementedError

    def spoil(self, payloads: Payloads, directory: Path, digest: str, content: bytes) -> None:
        """Put other bytes under the name."""
        raise NotImplementedError

    def test_a_payload_is_named_by_its_digest_and_read_whole_and_in_parts(self, tmp_path: Path) -> None:
        payloads = self.payloads(tmp_path)
        digest = payloads.write(b"0123456789")
        assert digest == hashlib.sha256(b"0123456789").hexdigest() == payloads.write(b"0123456789")
        assert payloads.read(digest) == b"0123456789"
        assert payloads.read(digest, 3) == b"3456789" and payloads.read(digest, 3, 4) == b"3456"
        assert payloads.read(digest, 8, 4) == b"89" and payloads.read(digest, 10, 4) == b""
        assert payloads.size(digest) == 10 and payloads.damage(digest) is None and payloads.stored() == {digest}
        empty = payloads.write(b"")
        assert payloads.read(empty) == b"" and payloads.damage(empty) is None and payloads.stored() == {digest, empty}

    def test_what_is_not_there_is_missing(self, tmp_path: Path) -> None:
        payloads = self.payloads(tmp_path)
        digest = payloads.write(b"gone")
        payloads.remove(digest)
        payloads.remove(digest)
        assert payloads.damage(digest) == "missing" and payloads.size(digest) == 0 and payloads.stored() == set()
        with pytest.raises(FileNotFoundError):
            payloads.read(digest)

    def test_what_is_damaged_is_said_and_written_again(self, tmp_path: Path) -> None:
        payloads = self.payloads(tmp_path)
        digest = payloads.write(b"whole")
        self.spoil(payloads, tmp_path, digest, b"torn")
        assert payloads.damage(digest) == "damaged" and payloads.size(digest) == 4 and payloads.stored() == {digest}
        assert payloads.write(b"whole") == digest and payloads.damage(digest) is None

    def test_what_comes_piece_by_piece_has_no_name_until_it_is_kept(self, tmp_path: Path) -> None:
        payloads = self.payloads(tmp_path)
        pieces, whole = [b"01", b"", b"23456", b"789"], b"0123456789"
        incoming, given_up = payloads.receive(10), payloads.receive(10)
        for piece in pieces:
            incoming.add(piece)
            given_up.add(piece)
        assert payloads.stored() == set()
        given_up.discard()
        digest = incoming.keep()
        assert digest == incoming.keep() == hashlib.sha256(whole).hexdigest() and payloads.stored() == {digest}
        payloads.settle()
        incoming.discard()
        assert payloads.read(digest) == whole and payloads.damage(digest) is None
        shorter = payloads.receive(10)
        shorter.add(b"short")
        assert payloads.read(shorter.keep()) == b"short"
        again = payloads.receive(10)
        again.add(whole)
        assert again.keep() == digest and payloads.read(digest) == whole
        room = bytearray(4)
        payloads.read_into(digest, 3, room)
        assert room == b"3456"
        with pytest.raises(ValueError, match=digest):
            payloads.read_into(digest, 8, room)
        payloads.settle()

    def test_what_was_hashed_here_is_read_again_only_if_somebody_has_touched_it(self, tmp_path: Path) -> None:
        payloads = self.payloads(tmp_path)
        digest = payloads.write(b"whole")
        assert payloads.damage(digest, again=False) is None
        self.spoil(payloads, tmp_path, digest, b"whale")
        assert payloads.damage(digest, again=False) == payloads.damage(digest) == "damaged"
        payloads.remove(digest)
        assert payloads.damage(digest, again=False) == "missing"


class TestFilePayloads(PayloadsCases):
    def payloads(self, directory: Path) -> Payloads:
        return FilePayloads(directory / "payloads")

    def spoil(self, payloads: Payloads, directory: Path, digest: str, content: bytes) -> None:
        payload_path(directory / "payloads", digest).write_bytes(content)

    def test_a_start_forgets_what_a_process_that_died_was_receiving(self, tmp_path: Path) -> None:
        log = open_log(tmp_path)
        log.payloads.receive(1 << 20).add(b"half")
        assert [path.stat().st_size for path in (tmp_path / "payloads/incoming").iterdir()] == [1 << 20]
        log.close()
        open_log(tmp_path, read_only=True).close()
        assert len(list((tmp_path / "payloads/incoming").iterdir())) == 1, "who only reads deletes nothing"
        open_log(tmp_path).close()
        assert list((tmp_path / "payloads/incoming").iterdir()) == []

    def test_room_that_is_missing_is_said_before_anything_comes(self, tmp_path: Path) -> None:
        payloads = self.payloads(tmp_path)
        with pytest.raises(OSError):
            payloads.receive(1 << 55)
        assert list((tmp_path / "payloads/incoming").iterdir()) == []

    def test_where_room_cannot_be_taken_beforehand_a_payload_comes_all_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unsupported(*_: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "operation not supported")

        monkeypatch.setattr(payload_files.os, "posix_fallocate", unsupported)
        payloads = self.payloads(tmp_path)
        assert payloads.read(payloads.write(b"whole")) == b"whole"

    @pytest.mark.parametrize("size", [10, 2 << 20])
    def test_what_somebody_who_died_has_named_is_synced_before_it_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        before, synced, fsync = self.payloads(tmp_path), list[int](), os.fsync
        unsettled = before.receive(size)
        unsettled.add(bytes(size))
        digest = unsettled.keep()  # and never settled: its writer dies
        monkeypatch.setattr(
            payload_files.os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle))
        )
        assert self.payloads(tmp_path).write(bytes(size)) == digest
        assert payload_path(tmp_path / "payloads", digest).stat().st_ino in synced
        before.settle()

    def test_a_file_that_does_not_reach_the_disk_is_an_error_that_waiting_does_not_mend(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        payloads = self.payloads(tmp_path)
        payloads.remove(payloads.write(b"lost"))

        def broken(handle: int) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr(payload_files.os, "fsync", broken)
        incoming = payloads.receive(4)
        incoming.add(b"lost")
        incoming.keep()
        with pytest.raises(OSError) as failed:
            payloads.settle()
        assert failed.value.errno == errno.EIO


class TestMemoryPayloads(PayloadsCases):
    def payloads(self, directory: Path) -> Payloads:
        return MemoryPayloads()

    def spoil(self, payloads: Payloads, directory: Path, digest: str, content: bytes) -> None:
        assert isinstance(payloads, MemoryPayloads)
        payloads.content[digest] = content


# --- the ledger ------------------------------------------------------------------------------------------------------


class MessageLogCases:
    """What the ledger must do, wherever SQLite keeps it. `again`: as a process that starts later opens it."""

    def log(self, directory: Path) -> MessageLog:
        raise NotImplementedError

    def again(self, log: MessageLog) -> MessageLog:
        raise NotImplementedError

    def test_entries_come_back_in_order_and_each_message_once(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        assert log.last_offset == log.carried_out == -1 and list(log.entries()) == []
        first = log.append(Started(epoch=1, fingerprint={}), message_id="a", at=5.0)
        later = log.append(Get(sender="s", encoder_type="text"), message_id="b", at=3.0, carried_out=0)
        assert first is not None and later is not None and later.at == 5.0, "time never goes back"
        assert log.append(Tick(), message_id="a", at=9.0) is None
        log = self.again(log)
        assert list(log.entries()) == [first, later] and list(log.entries(after=0)) == [later]
        assert (log.last_offset, log.carried_out) == (1, 0)
        assert log.entry(1) == log.find("b") == later and log.find("c") is None
        with pytest.raises(KeyError):
            log.entry(7)
        assert log.append(Tick(), message_id="c", at=1.0) is not None and log.count("tick") == 1

    def test_a_skipped_row_is_marked_also_for_who_begins_behind_it(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        log.append(Join(node="n", incarnation="i", types=["text"]), message_id="a", at=0.0)
        log.append(Skipped(offset=0), message_id="b", at=0.0)
        log = self.again(log)
        assert [entry.skipped for entry in log.entries()] == [True, False] and log.skipped() == {0}

    def test_rows_are_chained_and_taken_over_as_far_as_they_follow(self, tmp_path: Path) -> None:
        log = self.log(tmp_path / "one")
        for number in range(4):
            log.append(Tick(), message_id=str(number), at=float(number))
        rows = list(log.rows())
        other = self.log(tmp_path / "two")
        changed = [*rows[:2], rows[2]._replace(at=7.0), rows[3]]
        assert other.take(changed) == 2 and list(other.rows()) == rows[:2]
        assert other.checksum(1) == log.checksum(1) and other.take(rows[2:]) == 2
        assert list(self.again(other).entries()) == list(log.entries())

    def test_a_row_that_is_not_what_was_written_is_damage(self, tmp_path: Path) -> None:
        log = self.log(tmp_path / "one")
        for number in range(3):
            log.append(Tick(), message_id=str(number), at=float(number))
        missing = self.log(tmp_path / "two")
        missing.take(list(log.rows())[:1])
        gap = missing.append(Tick(), message_id="gap", at=0.0, offset=5)
        assert gap is not None and [entry.offset for entry in self.again(missing).entries()] == [0, 5]
        bad: list[Row] = [row._replace(body=row.body.replace("tick", "tock")) for row in log.rows()]
        assert self.log(tmp_path / "three").take(bad) == 0

    def test_payloads_are_dropped_with_a_reason_that_lasts(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        shared, alone = log.write_payload(b"shared"), log.write_payload(b"alone")
        for number, payload in enumerate((shared, alone, shared)):
            facts = UpdateFacts(digest=payload, size=6, finite=True, norm=1.0)
            update = Scenario().manifest("a", "e", number)
            log.append(update, message_id=str(number), at=0.0, facts=facts, payload=payload)
        assert log.uses(shared) == 2 and log.payload_count() == 2 and log.update_payloads(1) == [shared, alone]
        assert log.drop([shared, alone], "retention 5", 9.0, up_to=1) == 5
        log = self.again(log)
        assert log.dropped() == {alone: "retention 5"} and log.why_dropped(shared) is None
        assert log.payloads.stored() == {shared}
        assert log.write_payload(b"alone") == alone and log.dropped() == {}

    def test_deaths_are_counted(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        log.count_death("row 4")
        log.count_death("row 4")
        log = self.again(log)
        assert log.deaths("row 4") == 2 and log.deaths("row 5") == 0


class TestMessageLogInAFile(MessageLogCases):
    def log(self, directory: Path) -> MessageLog:
        return open_log(directory)

    def again(self, log: MessageLog) -> MessageLog:
        log.close()
        return open_log(log.directory)

    def test_a_changed_row_is_found_when_it_is_read(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        log.append(Tick(), message_id="a", at=0.0)
        with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
            db.execute("UPDATE entries SET at = 1.0")
        with pytest.raises(Damaged, match="row 0 of the ledger"):
            list(self.again(log).entries())


class TestMessageLogInMemory(MessageLogCases):
    def log(self, directory: Path) -> MessageLog:
        self.payloads = MemoryPayloads()
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        return MessageLog(self.db, self.payloads)

    def again(self, log: MessageLog) -> MessageLog:
        return MessageLog(self.db, log.payloads)


# --- retention beside the deciding thread ----------------------------------------------------------------------------


class Filling(sqlite3.Connection):
    """Finds no room for a commit while it is `full`, and ends the transaction, as SQLite does then."""

    full = False

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if self.full and sql == "COMMIT":
            super().execute("ROLLBACK")
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *values)


def test_rows_that_come_together_are_there_together_or_not_at_all() -> None:
    db = sqlite3.connect(":memory:", isolation_level=None, factory=Filling)
    log = MessageLog(db, MemoryPayloads())
    rows = [log.append(Tick(), message_id=name, at=1.0, together=True) for name in "abc"]
    assert log.uncommitted == 3 and log.append(Tick(), message_id="b", at=1.0, together=True) is None
    db.full = True
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            log.commit()
    assert log.uncommitted == 3 and db.execute("SELECT count(*) FROM entries").fetchone() == (0,)
    db.full = False
    more = log.append(Tick(), message_id="d", at=1.0)
    assert log.uncommitted == 0 and list(log.entries()) == [*rows, more], "what an error took out is there again"
    log.append(Tick(), message_id="e", at=1.0, together=True)
    assert list(MessageLog(db, MemoryPayloads()).entries()) == [*rows, more], "whoever dies before a commit leaves none"


class Watched:
    """Payloads that note every look at them."""

    def __init__(self, inner: Payloads) -> None:
        self.looks: list[str] = []
        self._inner = inner

    def write(self, payload: bytes) -> str:
        self.looks.append("write")
        return self._inner.write(payload)

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        self.looks.append("read")
        return self._inner.read(digest, start, length)

    def receive(self, size: int) -> Incoming:
        self.looks.append("receive")
        return self._inner.receive(size)

    def settle(self) -> None:
        self._inner.settle()

    def read_into(self, digest: str, start: int, out: bytearray) -> None:
        self.looks.append("read")
        self._inner.read_into(digest, start, out)

    def damage(self, digest: str, *, again: bool = True) -> str | None:
        self.looks.append("damage")
        return self._inner.damage(digest, again=again)

    def size(self, digest: str) -> int:
        self.looks.append("size")
        return self._inner.size(digest)

    def remove(self, digest: str) -> None:
        self.looks.append("remove")
        self._inner.remove(digest)

    def stored(self) -> set[str]:
        self.looks.append("stored")
        return self._inner.stored()


@pytest.mark.parametrize("retention", [1000, "since-snapshot"])
def test_f19_the_deciding_thread_looks_at_no_payload_at_a_snapshot(tmp_path: Path, retention: int | str) -> None:
    run = trained(tmp_path, "fedasync", "ab")
    log, clock = run.log, VirtualClock()
    watched = Watched(log.payloads)
    log.payloads = watched
    beside: list[tuple[str, Callable[[], None]]] = []
    config = MasterConfig(state_dir=tmp_path, retention=retention)
    room = Room(tmp_path, lambda: 1 << 60, 0)
    journal = Journal(
        log,
        SnapshotDirectory(log),
        MemoryMark(),
        room,
        config,
        clock=clock,
        background=lambda name, work: beside.append((name, work)),
    )
    dropped = 0
    for _ in range(3):
        for _ in range(2):  # the second is due while the first one's retention has not been carried out
            journal.append(Tick())
            for entry in log.entries(journal.fold.offset):
                journal.fold.apply(entry)
            watched.looks.clear()
            clock.wait(60.0)
            journal.snapshot()
            assert watched.looks == [], "in the thread that decides"
        [(name, work)] = beside
        assert name == "snapshot"
        beside.clear()
        work()
        dropped += watched.looks.count("remove")
    assert dropped > 0, "beside it, what the policy drops is dropped"
