"""The message log: a SQLite ledger of everything that decides, and the payloads beside it as files named by digest.

A row is durable before what it says has any effect outside of this process; a payload's file and directory are on disk
before its row. Rows are chained: each carries a checksum over itself and the row before. Bodies are JSON, so `sqlite3`
shows them to a person.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from common.errors import Damaged, UserError
from master_service.decisions.records import Configured, Entry, Loggable, Repaired, Skipped, UpdateFacts, pack, unpack
from master_service.log.ledger import LEDGER, opened_to_read, opened_to_write
from master_service.log.payload_files import FilePayloads
from master_service.log.payloads import Incoming, Payloads, ReadablePayloads

#: `PRAGMA user_version` of the ledgers that this program writes and reads.
SCHEMA_VERSION = 2

#: What the notes of payloads that retention has dropped begin with.
RETENTION = "retention"

_NO_LIMIT = (1 << 63) - 1
_NOT_WRITTEN = "not what was written, or a row before it is missing"
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS entries (
    offset      INTEGER PRIMARY KEY,
    message_id  TEXT NOT NULL UNIQUE,
    at          REAL NOT NULL,
    kind        TEXT NOT NULL,
    sender      TEXT NOT NULL,
    encoder     TEXT NOT NULL,
    body        TEXT NOT NULL,
    facts       TEXT,
    payload     TEXT,
    carried_out INTEGER NOT NULL,
    checksum    TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS payloads ON entries (payload) WHERE payload IS NOT NULL;
CREATE INDEX IF NOT EXISTS kinds ON entries (kind, offset);
CREATE TABLE IF NOT EXISTS dropped (payload TEXT PRIMARY KEY, reason TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS deaths (what TEXT PRIMARY KEY, count INTEGER NOT NULL);
PRAGMA user_version = {SCHEMA_VERSION};
"""
_INSERT = "INSERT INTO entries VALUES (?,?,?,?,?,?,?,?,?,?,?)"


class Row(NamedTuple):
    """A row as it stands in the ledger, column by column."""

    offset: int
    message_id: str
    at: float
    kind: str
    sender: str
    encoder: str
    body: str
    facts: str | None
    payload: str | None
    carried_out: int
    checksum: str

    def follows(self, checksum: str) -> bool:
        """Whether it is what was written after the row of that checksum."""
        try:
            expected = _checksum(checksum, self.offset, self.message_id, self.at, self.body, self.facts, self.payload)
        except TypeError:
            return False  # damage can make another type of a column
        return self.checksum == expected

    @property
    def chain(self) -> str:
        """The checksum that the next row follows: its own, or that of the lost rows that a repair stands for."""
        if self.kind != Repaired.model_fields["kind"].default:
            return self.checksum
        with contextlib.suppress(ValidationError):
            body = unpack(self.body)
            return (body.checksum if isinstance(body, Repaired) else "") or self.checksum
        return self.checksum


def open_log(
    directory: Path,
    *,
    read_only: bool = False,
    before: str = "",
    lasting: bool = True,
    on_removed: Callable[[str], None] | None = None,
) -> MessageLog:
    """The ledger `ledger.sqlite` of a state directory and the payloads beside it. `on_removed` as of FilePayloads.

    `lasting` False: nothing is synced, for a log that may be lost with the machine. Raises FileNotFoundError if there
    is nothing to read, LedgerHeld, Damaged or UserError as MessageLog does.
    """
    if not read_only:
        directory.mkdir(parents=True, exist_ok=True)
    db = (opened_to_read if read_only else opened_to_write)(directory / LEDGER)
    try:
        payloads = FilePayloads(directory / "payloads", lasting=lasting, on_removed=on_removed)
        if not read_only:
            payloads.forget_incoming()
        return MessageLog(db, payloads, directory, read_only=read_only, before=before, lasting=lasting)
    except BaseException:
        db.close()
        raise


def logged_shards(log: MessageLog) -> int | None:
    """How many aggregators a log is of; None as long as no row says so."""
    configured = [body for body in log.bodies("configured") if isinstance(body, Configured)]
    return configured[-1].settings.shards if configured else None


class MessageLog:
    """The ledger over a SQLite connection, and its payloads. `at` never goes back, a message id is never there twice.

    `directory` is where it is, for what stands beside it and for errors. `before` is the checksum that the first row
    follows: empty, unless this is a part of another ledger. Raises Damaged when it is opened for writing and SQLite
    finds it malformed, or when a row does not match its checksum as it is read; UserError for another schema version.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        payloads: Payloads,
        directory: Path = Path("memory"),
        *,
        read_only: bool = False,
        before: str = "",
        lasting: bool = True,
    ) -> None:
        self.directory = directory
        self.before = before
        self.payloads = payloads
        #: The payloads of updates, to read: of a log of several aggregators, `payloads` has the digests of their parts.
        self.updates: ReadablePayloads = payloads
        self._read_only = read_only
        self._db = db
        if db.in_transaction:
            db.rollback()  # of one who died before a commit
        #: Held from the first row of a group until its commit: another thread's writes would be part of it.
        self._writing = threading.RLock()
        #: Whether a payload may be noted as dropped.
        self._notes = True
        #: How often the master has died of what, once somebody asked; nobody else counts.
        self._deaths: dict[str, int] | None = None
        #: Rows that are written and not committed yet.
        self._group: list[tuple[Any, ...]] = []
        path = directory / LEDGER
        try:
            self._check_schema(path)
            if not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute(f"PRAGMA synchronous={'FULL' if lasting else 'OFF'}")
                self._db.executescript(_SCHEMA)
                [(verdict,), *_] = self._db.execute("PRAGMA quick_check(1)")
                if verdict != "ok":
                    raise Damaged(f"{path} is malformed ({verdict}); {repair_hint(directory)}")
            elif not self._has_rows():
                raise Damaged(f"{path} is empty; {repair_hint(directory)}")
            last = self._last_row()
            if not read_only:
                self._notes = bool(self._db.execute("SELECT EXISTS (SELECT 1 FROM dropped)").fetchone()[0])
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                raise  # a full disk, a lock, no permission: no damage
            raise Damaged(f"{path} is malformed ({error}); {repair_hint(directory)}") from None
        self._offset = last.offset if last else -1
        self._at = last.at if last else 0.0
        self._checksum = last.chain if last else before
        #: The last row's `carried_out`: the effects of the rows after it may not have left.
        self.carried_out = last.carried_out if last else -1

    @property
    def last_offset(self) -> int:
        """The offset of the newest entry; -1 if there is none."""
        if self._read_only:  # a master may be writing
            [(offset,)] = self._db.execute("SELECT max(offset) FROM entries")
            return -1 if offset is None else int(offset)
        return self._offset

    def append(
        self,
        body: Loggable,
        *,
        message_id: str,
        at: float,
        facts: UpdateFacts | None = None,
        payload: str | None = None,
        carried_out: int = -1,
        offset: int | None = None,
        together: bool = False,
    ) -> Entry | None:
        """Write an entry durably; None if this message id is in the log already.

        `carried_out`: the effects of all entries up to this offset have left. `offset` is the next one by default.
        `together`: it is durable with the next `commit` only, at a fraction of the cost.
        """
        next_offset = self._offset + 1 if offset is None else offset
        entry = Entry(next_offset, message_id, float(max(at, self._at)), body, facts, payload)
        text, facts_text = pack(body), facts.model_dump_json() if facts else None
        checksum = _checksum(self._checksum, entry.offset, message_id, entry.at, text, facts_text, payload)
        row = (
            entry.offset,
            message_id,
            entry.at,
            body.kind,
            sender_of(body),
            getattr(body, "encoder", None) or "",
            text,
            facts_text,
            payload,
            carried_out,
            checksum,
        )
        self._begin()
        try:
            self._db.execute(_INSERT, row)
        except sqlite3.IntegrityError:
            if not self._group:
                self.commit()
            return None
        except BaseException:
            self._undo()
            raise
        self._group.append(row)
        lost = body.checksum if isinstance(body, Repaired) else ""
        self._offset, self._at, self._checksum, self.carried_out = entry.offset, entry.at, lost or checksum, carried_out
        if not together:
            self.commit()
        return entry

    @property
    def uncommitted(self) -> int:
        """How many rows are not durable yet."""
        return len(self._group)

    def commit(self) -> None:
        """Make durable what was appended together. After an error nothing of it is, and it may be tried again."""
        if not self._group and not self._db.in_transaction:
            return
        self.payloads.settle()
        self._begin()
        try:
            self._db.execute("COMMIT")
        except BaseException:
            self._undo()
            raise
        self._group = []
        self._writing.release()

    def _begin(self) -> None:
        """A transaction, with the rows that an error took out of one."""
        if self._db.in_transaction:
            return
        self._writing.acquire()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(_INSERT, self._group)
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        """Let go of the transaction; what of it counts is in `_group`. SQLite ends some itself, as for a full disk."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._writing.release()

    def rows(self, after: int = -1, up_to: int | None = None) -> Iterator[Row]:
        """Every row with an offset above `after` (and not above `up_to`), in order, as it stands there: unchecked.

        Raises Damaged where SQLite cannot read on.
        """
        rows = self._db.execute(
            "SELECT * FROM entries WHERE offset > ? AND offset <= ? ORDER BY offset",
            (after, _NO_LIMIT if up_to is None else up_to),
        )
        while True:
            try:
                row = rows.fetchone()
            except sqlite3.DatabaseError as error:
                raise Damaged(f"the ledger in {self.directory} is malformed ({error}); {self._hint}") from None
            if row is None:
                return
            yield Row(*row)

    def entries(self, after: int = -1) -> Iterator[Entry]:
        """Every entry with an offset above `after`, in order. Raises Damaged at a row that is not what was written."""
        skipped = self.skipped()
        checksum = self.checksum(after) or self.before
        for row in self.rows(after):
            if not row.follows(checksum):
                raise Damaged(f"row {row.offset} of the ledger in {self.directory} is {_NOT_WRITTEN}; {self._hint}")
            checksum = row.chain
            facts = UpdateFacts.model_validate_json(row.facts) if row.facts else None
            yield Entry(row.offset, row.message_id, row.at, unpack(row.body), facts, row.payload, row.offset in skipped)

    def skipped(self) -> set[int]:
        """The offsets of the rows that have no effect, because they killed the master."""
        return {body.offset for body in self.bodies("skipped") if isinstance(body, Skipped)}

    def entry(self, offset: int) -> Entry:
        """One entry. Raises KeyError if there is none."""
        found = next(self.entries(offset - 1), None)
        if found is None or found.offset != offset:
            raise KeyError(offset)
        return found

    def find(self, message_id: str) -> Entry | None:
        """The entry of this message; None if it is not in the log."""
        row = self._db.execute("SELECT offset FROM entries WHERE message_id = ?", (message_id,)).fetchone()
        return self.entry(row[0]) if row else None

    def checksum(self, offset: int) -> str | None:
        """The chain's checksum at the last row up to `offset`; None if there is no such row."""
        row = self._last_row(offset)
        return row.chain if row else None

    def bodies(self, kind: str) -> list[Loggable]:
        """The bodies of a kind, in order. Damaged ones are left out: reading `entries` reports those."""
        found = []
        for (text,) in self._db.execute("SELECT body FROM entries WHERE kind = ? ORDER BY offset", (kind,)):
            with contextlib.suppress(ValidationError):
                found.append(unpack(text))
        return found

    def repairs(self) -> list[Repaired]:
        """Where the ledger was damaged and repaired."""
        return [body for body in self.bodies("repaired") if isinstance(body, Repaired)]

    def take(self, rows: Iterable[Row]) -> int:
        """Copy rows of another ledger as they are, up to the first that does not follow the one before; gives how many.

        What was read before `rows` raises is kept.
        """
        taken = 0
        self._db.execute("BEGIN")
        try:
            for row in rows:
                if not row.follows(self._checksum):
                    break
                self._db.execute(_INSERT, row)
                self._offset, self._at, self._checksum = row.offset, row.at, row.chain
                self.carried_out = row.carried_out
                taken += 1
        finally:
            self._db.execute("COMMIT")
        return taken

    # --- payloads that are not needed any more ---------------------------------------------------------------------

    def drop(self, payloads: Iterable[str], reason: str, at: float, *, up_to: int | None = None) -> int:
        """Forget payloads, and note why; gives the bytes freed. One that a row after `up_to` names is kept."""
        freed = 0
        for payload in payloads:
            last = self._db.execute("SELECT max(offset) FROM entries WHERE payload = ?", (payload,)).fetchone()[0]
            if last is not None and last > (self._offset if up_to is None else up_to):
                continue
            # noted first: a file that is gone without a note would count as lost
            with self._writing:
                self._notes = True
                self._db.execute("INSERT OR REPLACE INTO dropped VALUES (?,?,?)", (payload, reason, at))
            freed += self.payloads.size(payload)
            self.payloads.remove(payload)
        return freed

    def dropped(self) -> dict[str, str]:
        """Why payloads that rows name are not here (any more): payload → reason."""
        return dict(self._db.execute("SELECT payload, reason FROM dropped").fetchall())

    @property
    def was_pruned(self) -> bool:
        """Whether retention has dropped anything."""
        return (
            self._db.execute(f"SELECT 1 FROM dropped WHERE reason LIKE '{RETENTION}%' LIMIT 1").fetchone() is not None
        )

    def note_dropped(self, notes: Iterable[tuple[str, str, float]]) -> None:
        """Take over notes of another ledger: (payload, reason, at)."""
        self._notes = True
        self._db.executemany("INSERT OR REPLACE INTO dropped VALUES (?,?,?)", notes)

    def why_dropped(self, payload: str) -> str | None:
        """Why one payload is not here (any more); None if nobody dropped it."""
        row = self._db.execute("SELECT reason FROM dropped WHERE payload = ?", (payload,)).fetchone()
        return str(row[0]) if row else None

    def write_payload(self, payload: bytes) -> str:
        """Store a payload durably and give its digest; it counts as dropped no more."""
        return self._stored(self.payloads.write(payload))

    def keep_payload(self, incoming: Incoming) -> str:
        """The same with one that has come piece by piece; it is durable with the next `commit`."""
        return self._stored(incoming.keep())

    def _stored(self, digest: str) -> str:
        if self._notes:
            self._db.execute("DELETE FROM dropped WHERE payload = ?", (digest,))
        return digest

    def uses(self, payload: str) -> int:
        """How many rows name a payload."""
        return int(self._db.execute("SELECT count(*) FROM entries WHERE payload = ?", (payload,)).fetchone()[0])

    def count(self, kind: str) -> int:
        """How many rows of a kind there are."""
        return int(self._db.execute("SELECT count(*) FROM entries WHERE kind = ?", (kind,)).fetchone()[0])

    def payload_count(self) -> int:
        """How many different payloads the rows name."""
        return int(self._db.execute("SELECT count(DISTINCT payload) FROM entries").fetchone()[0])

    def update_payloads(self, up_to: int) -> list[str]:
        """The payloads of updates in rows up to `up_to` that have not been dropped, oldest first. Not one that is also
        a version 0 or an asset: a start, a node and an export need those for good."""
        rows = self._db.execute(
            "SELECT payload FROM entries WHERE kind = 'update' AND payload IS NOT NULL AND offset <= ? "
            "AND payload NOT IN (SELECT payload FROM dropped) "
            "AND payload NOT IN (SELECT payload FROM entries WHERE kind IN ('generated', 'provided') "
            "AND payload IS NOT NULL) GROUP BY payload ORDER BY max(offset)",
            (up_to,),
        )
        return [payload for (payload,) in rows]

    def versions_at(self, offset: int) -> dict[str, int]:
        """Of each encoder, the newest version that a row up to this one names."""
        rows = self._db.execute(
            "SELECT encoder, json_extract(body, '$.version'), max(offset) FROM entries "
            "WHERE kind = 'versioned' AND offset <= ? GROUP BY encoder",
            (offset,),
        )
        return {encoder: version for encoder, version, _ in rows}

    def ledger_bytes(self) -> int:
        """Of the ledger's file, without what is still in its write-ahead log."""
        (pages,), (each,) = (self._db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
        return int(pages) * int(each)

    # --- messages that kill ------------------------------------------------------------------------------------------

    def count_death(self, what: str) -> None:
        """The master died while it handled this."""
        self._deaths = None
        self._db.execute("INSERT INTO deaths VALUES (?, 1) ON CONFLICT (what) DO UPDATE SET count = count + 1", (what,))

    def deaths(self, what: str) -> int:
        """How often the master has died of this."""
        if self._deaths is None:
            self._deaths = dict(self._db.execute("SELECT what, count FROM deaths").fetchall())
        return self._deaths.get(what, 0)

    def copy_into(self, empty: sqlite3.Connection) -> None:
        """Copy the ledger as it is at one moment; whoever writes meanwhile does not wait."""
        self._db.backup(empty)

    def close(self) -> None:
        self._db.close()

    def close_as_one_file(self) -> None:
        """So that the ledger can be renamed without what SQLite keeps beside it."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.close()

    @property
    def _hint(self) -> str:
        return repair_hint(self.directory)

    def _last_row(self, up_to: int = _NO_LIMIT) -> Row | None:
        row = self._db.execute(
            "SELECT * FROM entries WHERE offset <= ? ORDER BY offset DESC LIMIT 1", (up_to,)
        ).fetchone()
        return Row(*row) if row else None

    def _has_rows(self) -> bool:
        return bool(self._db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'entries'").fetchone()[0])

    def _check_schema(self, path: Path) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                "take the program that wrote it, or another --state"
            )


def repair_hint(directory: Path) -> str:
    """What the operator can do about a damaged ledger."""
    return (
        f"restore it from a backup, or keep what is whole with `shared-encoder log repair --state {directory}`, "
        "which says what is lost"
    )


def _checksum(
    before: str, offset: int, message_id: str, at: float, body: str, facts: str | None, payload: str | None
) -> str:
    """sha256 over a row and the checksum of the row before, hexadecimal."""
    row = "\0".join((before, str(offset), message_id, repr(at), body, facts or "", payload or ""))
    return hashlib.sha256(row.encode()).hexdigest()


def sender_of(body: object) -> str:
    """Who said it, as the ledger's `sender` column has it."""
    return str(getattr(body, "node", None) or getattr(body, "sender", None) or "master")
