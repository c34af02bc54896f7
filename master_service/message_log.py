"""The message log: a SQLite ledger of everything that decides, and the payloads beside it as files named by digest.

A row is written before what it says has any effect; a payload's file and directory are on disk before its row. Rows are
chained: each carries a checksum over itself and the row before. Bodies are JSON, so `sqlite3` shows them to a person.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import Damaged, UserError
from common.messages import Message
from master_service.entries import Entry, Loggable, Repaired, Skipped, UpdateFacts, pack, unpack
from master_service.payloads import PayloadStore

#: `PRAGMA user_version` of the ledgers that this program writes and reads.
SCHEMA_VERSION = 2

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
_COLUMNS = "offset, message_id, at, body, facts, payload, checksum"


class MessageLog:
    """The ledger. `at` never goes back, a message id is never there twice.

    Raises Damaged when it is opened for writing and SQLite finds it malformed, or when a row does not match its
    checksum as it is read.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self.directory = directory
        path = directory / "ledger.sqlite"
        if read_only:
            if not path.exists():
                raise FileNotFoundError(f"no message log in {directory}")
            self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._check_schema(path)
            if not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.executescript(_SCHEMA)
                [(verdict,), *_] = self._db.execute("PRAGMA quick_check(1)")
                if verdict != "ok":
                    raise Damaged(f"{path} is malformed ({verdict}); {repair_hint(directory)}")
            last = self._db.execute(
                "SELECT offset, at, carried_out, checksum FROM entries ORDER BY offset DESC LIMIT 1"
            ).fetchone()
        except sqlite3.DatabaseError as error:
            self._db.close()
            if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                raise  # a full disk, a lock, no permission: no damage
            raise Damaged(f"{path} is malformed ({error}); {repair_hint(directory)}") from None
        except (Damaged, UserError):
            self._db.close()
            raise
        self.payloads = PayloadStore(directory / "payloads")
        offset, at, carried_out, checksum = last or (-1, 0.0, -1, "")
        self._offset: int = offset
        self._at: float = at
        self._checksum: str = checksum
        #: The last row's `carried_out`: the effects of the rows after it may not have left.
        self.carried_out: int = carried_out

    @property
    def last_offset(self) -> int:
        """The offset of the newest entry; -1 if there is none."""
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
    ) -> Entry | None:
        """Write an entry durably; None if this message id is in the log already.

        `carried_out`: the effects of all entries up to this offset have left. `offset` is the next one by default.
        """
        next_offset = self._offset + 1 if offset is None else offset
        entry = Entry(next_offset, message_id, float(max(at, self._at)), body, facts, payload)
        text, facts_text = pack(body), facts.model_dump_json() if facts else None
        checksum = _checksum(self._checksum, entry.offset, message_id, entry.at, text, facts_text, payload)
        try:
            self._db.execute(
                "INSERT INTO entries VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                (
                    entry.offset,
                    message_id,
                    entry.at,
                    body.kind,
                    _sender(body),
                    getattr(body, "encoder", None) or "",
                    text,
                    facts_text,
                    payload,
                    carried_out,
                    checksum,
                ),
            )
        except sqlite3.IntegrityError:
            return None
        self._offset, self._at, self._checksum, self.carried_out = entry.offset, entry.at, checksum, carried_out
        return entry

    def entries(self, after: int = -1) -> Iterator[Entry]:
        """Every entry with an offset above `after`, in order. Raises Damaged at a row that is not what was written."""
        rows = self._db.execute("SELECT body FROM entries WHERE kind = 'skipped'")
        skipped = {body.offset for (text,) in rows if isinstance(body := unpack(text), Skipped)}
        checksum = self.checksum(after) or ""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM entries WHERE offset > ? ORDER BY offset", (after,))
        while True:
            try:
                row = rows.fetchone()
            except sqlite3.DatabaseError as error:
                raise Damaged(f"the ledger in {self.directory} is malformed ({error}); {self._hint}") from None
            if row is None:
                return
            offset, message_id, at, body, facts, payload, found = row
            checksum = _checksum(checksum, offset, message_id, at, body, facts, payload)
            if checksum != found:
                raise Damaged(f"row {offset} of the ledger in {self.directory} is not what was written; {self._hint}")
            parsed = UpdateFacts.model_validate_json(facts) if facts else None
            yield Entry(offset, message_id, at, unpack(body), parsed, payload, offset in skipped)

    def entry(self, offset: int) -> Entry:
        """One entry. Raises KeyError if there is none."""
        found = next(self.entries(offset - 1), None)
        if found is None or found.offset != offset:
            raise KeyError(offset)
        return found

    def checksum(self, offset: int) -> str | None:
        """The chain's checksum at the last row up to `offset`; None if there is no such row."""
        row = self._db.execute(
            "SELECT checksum FROM entries WHERE offset <= ? ORDER BY offset DESC LIMIT 1", (offset,)
        ).fetchone()
        return str(row[0]) if row else None

    def repairs(self) -> list[Repaired]:
        """Where the ledger was damaged and repaired."""
        rows = self._db.execute("SELECT body FROM entries WHERE kind = 'repaired' ORDER BY offset")
        return [body for (text,) in rows if isinstance(body := unpack(text), Repaired)]

    # --- payloads that are not needed any more ---------------------------------------------------------------------

    def drop(self, payloads: Iterable[str], reason: str, at: float, *, up_to: int | None = None) -> int:
        """Forget payloads, and note why; gives the bytes freed. One that a row after `up_to` names is kept."""
        freed = 0
        for payload in payloads:
            last = self._db.execute("SELECT max(offset) FROM entries WHERE payload = ?", (payload,)).fetchone()[0]
            if last is not None and last > (self._offset if up_to is None else up_to):
                continue
            # noted first: a file that is gone without a note would count as lost
            self._db.execute("INSERT OR REPLACE INTO dropped VALUES (?,?,?)", (payload, reason, at))
            freed += self.payloads.size(payload)
            self.payloads.remove(payload)
        return freed

    def dropped(self) -> dict[str, str]:
        """Why payloads that rows name are not here (any more): payload → reason."""
        return dict(self._db.execute("SELECT payload, reason FROM dropped").fetchall())

    def write_payload(self, payload: bytes) -> str:
        """Store a payload durably and give its digest; it counts as dropped no more."""
        digest = self.payloads.write(payload)
        self._db.execute("DELETE FROM dropped WHERE payload = ?", (digest,))
        return digest

    def uses(self, payload: str) -> int:
        """How many rows name a payload."""
        return int(self._db.execute("SELECT count(*) FROM entries WHERE payload = ?", (payload,)).fetchone()[0])

    def update_payloads(self, up_to: int) -> list[str]:
        """The payloads of updates in rows up to `up_to` that have not been dropped, oldest first."""
        rows = self._db.execute(
            "SELECT payload FROM entries WHERE kind = 'update' AND payload IS NOT NULL AND offset <= ? "
            "AND payload NOT IN (SELECT payload FROM dropped) GROUP BY payload ORDER BY max(offset)",
            (up_to,),
        )
        return [payload for (payload,) in rows]

    # --- messages that kill ------------------------------------------------------------------------------------------

    def count_death(self, what: str) -> None:
        """The master died while it handled this."""
        self._db.execute("INSERT INTO deaths VALUES (?, 1) ON CONFLICT (what) DO UPDATE SET count = count + 1", (what,))

    def deaths(self, what: str) -> int:
        """How often the master has died of this."""
        row = self._db.execute("SELECT count FROM deaths WHERE what = ?", (what,)).fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        self._db.close()

    @property
    def _hint(self) -> str:
        return repair_hint(self.directory)

    def _check_schema(self, path: Path) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                "take the program that wrote it, or another --state"
            )


def copy_whole_rows(damaged: Path, directory: Path) -> int:
    """Copy rows of a ledger into a new one in `directory`, up to the first that cannot be read or does not match its
    checksum; gives the offset of the last that was copied, -1 if none was."""
    log = MessageLog(directory)
    source = sqlite3.connect(f"file:{damaged}?mode=ro", uri=True, isolation_level=None)
    checksum, last = "", -1
    try:
        log._db.execute("BEGIN")
        for row in source.execute("SELECT * FROM entries ORDER BY offset"):
            offset, message_id, at, _, _, _, body, facts, payload, _, found = row
            checksum = _checksum(checksum, offset, message_id, at, body, facts, payload)
            if checksum != found:
                break
            log._db.execute("INSERT INTO entries VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
            last = offset
        dropped = source.execute("SELECT payload, reason, at FROM dropped").fetchall()
        log._db.executemany("INSERT OR REPLACE INTO dropped VALUES (?,?,?)", dropped)
    except sqlite3.DatabaseError:
        pass  # as far as it can be read
    finally:
        log._db.execute("COMMIT")
        source.close()
        # so that the file can be renamed alone
        log._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        log.close()
    return last


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


def _sender(body: Message) -> str:
    return str(getattr(body, "node", None) or getattr(body, "sender", None) or "master")
