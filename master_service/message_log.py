"""The message log: a SQLite ledger of everything that decides, and the payloads beside it as files named by digest.

A row is written before what it says has any effect; a payload's file and directory are on disk before its row.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from common.durable import sync
from common.messages import Message
from master_service.entries import Entry, Loggable, UpdateFacts, pack, unpack

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    offset     INTEGER PRIMARY KEY,
    message_id TEXT NOT NULL UNIQUE,
    at         REAL NOT NULL,
    kind       TEXT NOT NULL,
    sender     TEXT NOT NULL,
    encoder    TEXT NOT NULL,
    body       BLOB NOT NULL,
    facts      TEXT,
    payload    TEXT
);
CREATE INDEX IF NOT EXISTS payloads ON entries (payload)
"""


class PayloadStore:
    """Immutable files named by the sha256 of what is in them."""

    def __init__(self, directory: Path, uses: Callable[[str], int] = lambda digest: 0) -> None:
        """`uses` says how many entries of the log name a payload."""
        self._directory = directory
        self._uses = uses
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self._directory / digest[:2] / digest

    def write(self, payload: bytes) -> str:
        """Store durably and give the digest; what is there already is not written again."""
        digest = hashlib.sha256(payload).hexdigest()
        path = self.path(digest)
        if path.exists():
            return digest
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".part")
        with beside.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
        for directory in (path.parent, self._directory):
            sync(directory)
        return digest

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        """The payload, or `length` bytes of it from `start`. Raises FileNotFoundError."""
        with self.path(digest).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def check(self, digest: str) -> None:
        """Raises FileNotFoundError if the payload is not (any more) here."""
        if not self.path(digest).exists():
            raise FileNotFoundError(f"payload {digest} is not in {self._directory}")

    def drop(self, digest: str) -> None:
        """Forget the payload of an entry that is refused, unless another entry with the same bytes needs it."""
        if self._uses(digest) <= 1:
            self.path(digest).unlink(missing_ok=True)


class MessageLog:
    """The ledger. `at` never goes back, a message id is never there twice."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        path = directory / "ledger.sqlite"
        if read_only:
            if not path.exists():
                raise FileNotFoundError(f"no message log in {directory}")
            self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        self.payloads = PayloadStore(directory / "payloads", self._uses)
        last = self._db.execute("SELECT offset, at FROM entries ORDER BY offset DESC LIMIT 1").fetchone()
        self._offset: int = last[0] if last else -1
        self._at: float = last[1] if last else 0.0

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
    ) -> Entry | None:
        """Write an entry durably; None if this message id is in the log already."""
        entry = Entry(self._offset + 1, message_id, max(at, self._at), body, facts, payload)
        try:
            self._db.execute(
                "INSERT INTO entries VALUES (?,?,?,?,?,?,?,?,?)",
                (
                    entry.offset,
                    message_id,
                    entry.at,
                    body.kind,
                    _sender(body),
                    getattr(body, "encoder", None) or "",
                    pack(body),
                    facts.model_dump_json() if facts else None,
                    payload,
                ),
            )
        except sqlite3.IntegrityError:
            return None
        self._offset, self._at = entry.offset, entry.at
        return entry

    def entries(self, after: int = -1) -> Iterator[Entry]:
        """Every entry with an offset above `after`, in order."""
        rows = self._db.execute(
            "SELECT offset, message_id, at, body, facts, payload FROM entries WHERE offset > ? ORDER BY offset",
            (after,),
        )
        for offset, message_id, at, body, facts, payload in rows:
            parsed = UpdateFacts.model_validate_json(facts) if facts else None
            yield Entry(offset, message_id, at, unpack(body), parsed, payload)

    def close(self) -> None:
        self._db.close()

    def _uses(self, digest: str) -> int:
        return int(self._db.execute("SELECT count(*) FROM entries WHERE payload = ?", (digest,)).fetchone()[0])


def _sender(body: Message) -> str:
    return str(getattr(body, "node", None) or getattr(body, "sender", None) or "master")
