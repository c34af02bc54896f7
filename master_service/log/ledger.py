"""How the ledger is opened: to write, to read beside whoever writes, and from a copy that nobody may write beside."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.errors import LedgerHeld

#: The name of its file.
LEDGER = "ledger.sqlite"

#: How long SQLite tries while another process holds the ledger, seconds: the thread that decides waits in it.
_HELD_SECONDS = 2.0
#: What it gives up with then: the low bytes of its extended codes.
_HELD = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
#: What it says where it cannot put its files beside the ledger.
_NO_PLACE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


class Ledger(sqlite3.Connection):
    """A connection that tells a lock of another process from what is wrong with the file: its methods raise LedgerHeld
    for the first. `copied` is the folder that holds the copy which it reads, if it reads one; it goes with it."""

    copied: tempfile.TemporaryDirectory[str] | None = None

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*arguments)
        except sqlite3.OperationalError as error:
            _tell_of_locks(error)
            raise

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().executemany(*arguments)
        except sqlite3.OperationalError as error:
            _tell_of_locks(error)
            raise

    def executescript(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().executescript(*arguments)
        except sqlite3.OperationalError as error:
            _tell_of_locks(error)
            raise

    def close(self) -> None:
        super().close()
        if self.copied is not None:
            self.copied.cleanup()


def opened_to_write(path: Path) -> Ledger:
    """Made if it is not there."""
    return _connected(str(path))


def opened_to_read(path: Path) -> Ledger:
    """As it is at each moment, whoever writes to it. Raises FileNotFoundError if there is none.

    SQLite wants to put a file of its own beside a ledger that has a write-ahead log. Where it may not, a copy of both
    is read: nobody writes there.
    """
    if not path.exists():
        raise FileNotFoundError(f"no message log in {path.parent}")
    log = path.with_name(path.name + "-wal")
    may_write = os.access(path.parent, os.W_OK)
    if not may_write and not (log.exists() and log.stat().st_size):
        return _connected(f"file:{quote(str(path))}?mode=ro&immutable=1")
    ledger = _connected(f"file:{quote(str(path))}?mode=ro")
    if may_write or not _lacks_place(ledger):
        return ledger
    ledger.close()
    copied = tempfile.TemporaryDirectory(prefix="ledger-")
    for file in (path, log):
        shutil.copyfile(file, Path(copied.name) / file.name)
    ledger = _connected(str(Path(copied.name) / path.name))
    ledger.copied = copied
    return ledger


def _lacks_place(ledger: Ledger) -> bool:
    """Whether it cannot be read where it is. What else is wrong with it, whoever reads it first is told."""
    try:
        ledger.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        return error.sqlite_errorcode & 0xFF in _NO_PLACE
    except (sqlite3.DatabaseError, LedgerHeld):
        pass
    return False


def _connected(name: str) -> Ledger:
    return sqlite3.connect(
        name,
        timeout=_HELD_SECONDS,
        uri=name.startswith("file:"),
        isolation_level=None,
        check_same_thread=False,
        factory=Ledger,
    )


def _tell_of_locks(error: sqlite3.OperationalError) -> None:
    """Raises LedgerHeld if it is for a lock of another process."""
    if error.sqlite_errorcode & 0xFF in _HELD:
        raise LedgerHeld(
            f"another process holds a lock on the message log ({error}); end that one, `fuser {LEDGER}` names it"
        ) from None
