"""What one aggregator keeps: its parts of updates, and the steps that made its part of every version; the one owner of
its state directory.

What is said of it to the master is durable before. A row stands for a payload that is on disk; a step's row names what
it was made of, so that a start computes it again.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.durable import sync
from common.errors import UserError
from common.locks import DirectoryLock
from master_service.log.ledger import opened_to_read, opened_to_write
from master_service.log.payload_files import FilePayloads

SHARD = "shard.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS shard (number INTEGER NOT NULL, shards INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS taken (
    name    TEXT PRIMARY KEY,
    claimed TEXT NOT NULL,
    part    TEXT NOT NULL,
    size    INTEGER NOT NULL,
    fits    INTEGER NOT NULL,
    squares BLOB NOT NULL,
    whole   TEXT
);
CREATE INDEX IF NOT EXISTS wholes ON taken (whole);
CREATE INDEX IF NOT EXISTS parts ON taken (part);
CREATE TABLE IF NOT EXISTS encoders (encoder TEXT PRIMARY KEY, size INTEGER NOT NULL, part TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS versions (
    encoder TEXT NOT NULL,
    version INTEGER NOT NULL,
    step    TEXT NOT NULL,
    digest  TEXT NOT NULL,
    squares BLOB NOT NULL,
    PRIMARY KEY (encoder, version)
);
CREATE TABLE IF NOT EXISTS unneeded (part TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS deaths (what TEXT PRIMARY KEY, count INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """A part of an update that is on disk. `claimed`: the digest of the whole by the update's manifest; `part`: that of
    the part; `squares`: what its norm is made of, as it travels."""

    claimed: str
    part: str
    size: int
    fits: bool
    squares: bytes


@dataclass(frozen=True, slots=True)
class Begun:
    """An encoder of `size` numbers, whose version 0 is this payload here."""

    encoder: str
    size: int
    part: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """A version: the order that made it, the digest of the part, and the squares of the mean."""

    version: int
    step: str
    digest: str
    squares: bytes


class ShardStore:
    """The state directory of aggregator `number` (from 0 on) of so many, locked until it is closed.

    Raises LockHeld, or UserError for the directory of another one.
    """

    def __init__(self, directory: Path, number: int, shards: int) -> None:
        self.directory = directory
        self._lock = DirectoryLock(directory)
        try:
            self.payloads = FilePayloads(directory / "payloads")
            self.payloads.forget_incoming()
            self._db = opened_to_write(directory / SHARD)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._own(number, shards)
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    # --- updates -----------------------------------------------------------------------------------------------------

    def taken(self, update: str) -> Taken | None:
        """What is here of an update."""
        found = self._db.execute("SELECT claimed, part, size, fits, squares FROM taken WHERE name = ?", (update,))
        row = found.fetchone()
        return None if row is None else Taken(row[0], row[1], row[2], bool(row[3]), row[4])

    def take(self, update: str, taken: Taken) -> None:
        """A part has come, and its payload was kept: durable once this returns."""
        self.payloads.settle()
        before = self.taken(update)
        with self._together():
            self._db.execute(
                "INSERT OR REPLACE INTO taken VALUES (?,?,?,?,?,?,NULL)",
                (update, taken.claimed, taken.part, taken.size, taken.fits, taken.squares),
            )
            if before is not None and before.part != taken.part:
                self._let_go([before.part])
        self.sweep()

    def keep(self, update: str, whole: str) -> None:
        """The message log has it under this digest."""
        self._db.execute("UPDATE taken SET whole = ? WHERE name = ?", (whole, update))

    def discard(self, update: str, claimed: str) -> None:
        """With this digest it does not count, and is not in the log."""
        self._delete("name = ? AND claimed = ?", (update, claimed))

    def drop(self, whole: str) -> None:
        """The message log needs it no more. What counted was as its manifest claimed, if nobody could say what it was
        kept as."""
        self._delete("whole = ? OR whole IS NULL AND claimed = ?", (whole, whole))

    def _delete(self, which: str, given: tuple[str, ...]) -> None:
        with self._together():
            found = self._db.execute(f"DELETE FROM taken WHERE {which} RETURNING part", given).fetchall()
            self._let_go(part for (part,) in found)
        self.sweep()

    def _let_go(self, parts: Iterable[str]) -> None:
        """For `sweep`, which may be in a later process."""
        self._db.executemany("INSERT OR IGNORE INTO unneeded VALUES (?)", [(part,) for part in parts])

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """All of it is durable, or none."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def sweep(self) -> None:
        """Remove what nobody needs any more, now that a start begins later; not what another update has too."""
        for (part,) in self._db.execute("SELECT part FROM unneeded").fetchall():
            wanted = "SELECT 1 FROM taken WHERE part = ? UNION SELECT 1 FROM encoders WHERE part = ? LIMIT 1"
            is_another = self._db.execute(wanted, (part, part)).fetchone()
            if not is_another and self._is_of_a_start(part):
                continue
            if not is_another:
                self.payloads.remove(part)
            self._db.execute("DELETE FROM unneeded WHERE part = ?", (part,))

    def _is_of_a_start(self, part: str) -> bool:
        """Whether a start may compute something of it again, or whoever takes back the newest version."""
        for begun in self.encoders():
            newest = self._newest(begun.encoder)
            oldest = min((version for version, _ in self.snapshots(begun.encoder) if version < newest), default=0)
            for step in self.versions(begun.encoder, oldest):
                if part in step.step:
                    return True
        return False

    def _newest(self, encoder: str) -> int:
        found = self._db.execute("SELECT max(version) FROM versions WHERE encoder = ?", (encoder,)).fetchone()
        return found[0] or 0

    # --- updates that kill -------------------------------------------------------------------------------------------

    def count_death(self, what: str) -> None:
        """The aggregator died while it worked on this."""
        self._db.execute("INSERT INTO deaths VALUES (?, 1) ON CONFLICT (what) DO UPDATE SET count = count + 1", (what,))

    def deaths(self, what: str) -> int:
        """How often it has died of this."""
        row = self._db.execute("SELECT count FROM deaths WHERE what = ?", (what,)).fetchone()
        return row[0] if row is not None else 0

    # --- versions ----------------------------------------------------------------------------------------------------

    def encoders(self) -> list[Begun]:
        return [Begun(*row) for row in self._db.execute("SELECT encoder, size, part FROM encoders ORDER BY rowid")]

    def begin(self, begun: Begun) -> None:
        """Version 0 is here, and its payload was kept."""
        self.payloads.settle()
        self._db.execute("INSERT OR IGNORE INTO encoders VALUES (?,?,?)", (begun.encoder, begun.size, begun.part))

    def step(self, encoder: str, stepped: Stepped) -> None:
        """A version was computed."""
        self._db.execute(
            "INSERT INTO versions VALUES (?,?,?,?,?)",
            (encoder, stepped.version, stepped.step, stepped.digest, stepped.squares),
        )

    def unstep(self, encoder: str, version: int) -> None:
        """The newest version is to be computed of something else: its snapshot goes before its row, so that a start in
        between computes it again."""
        for number, path in self.snapshots(encoder):
            if number >= version:
                path.unlink()
                sync(path.parent)
        self._db.execute("DELETE FROM versions WHERE encoder = ? AND version = ?", (encoder, version))

    def version(self, encoder: str, version: int) -> Stepped | None:
        """A version that was computed."""
        found = next(self.versions(encoder, version - 1), None)
        return found if found is not None and found.version == version else None

    def versions(self, encoder: str, after: int) -> Iterator[Stepped]:
        """Those above `after`, in order."""
        rows = self._db.execute(
            "SELECT version, step, digest, squares FROM versions WHERE encoder = ? AND version > ? ORDER BY version",
            (encoder, after),
        )
        for row in rows:
            yield Stepped(*row)

    def snapshots(self, encoder: str) -> list[tuple[int, Path]]:
        """The versions that were written as a whole, oldest first, and where."""
        found = sorted((self.directory / "snapshots" / encoder).glob("*.safetensors"))
        return [(int(path.stem), path) for path in found]

    def _own(self, number: int, shards: int) -> None:
        row = self._db.execute("SELECT number, shards FROM shard").fetchone()
        if row is None:
            self._db.execute("INSERT INTO shard VALUES (?,?)", (number, shards))
        elif row != (number, shards):
            raise UserError(
                f"{self.directory} is the state of aggregator {row[0] + 1}/{row[1]}, not of {number + 1}/{shards}; "
                "give another directory with --state DIR"
            )


def opened_shard_payloads(directory: Path) -> tuple[tuple[int, int], FilePayloads]:
    """The payloads of an aggregator's state directory, to read, and which one it is: (number from 0 on, shards). Raises
    UserError where there is none."""
    try:
        db = opened_to_read(directory / SHARD)
        try:
            number, shards = db.execute("SELECT number, shards FROM shard").fetchone()
        finally:
            db.close()
    except (FileNotFoundError, sqlite3.Error, TypeError) as error:
        raise UserError(f"{directory} is no state directory of an aggregator ({error}); see --shards") from None
    return (int(number), int(shards)), FilePayloads(directory / "payloads")
