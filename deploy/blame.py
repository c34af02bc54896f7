"""Whose an exception is that ended a command: the user's, of a path that they gave, or a bug of ours."""

from __future__ import annotations

import errno
import sqlite3
import sysconfig
from pathlib import Path

#: What the system answers of a path that its user can mend: another one, or other permissions.
_MENDABLE = {
    errno.EACCES,
    errno.EBUSY,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
    errno.EXDEV,
}
#: … and what SQLite says then.
_LEDGER = ("unable to open database file", "attempt to write a readonly database", "disk I/O error")
#: What is missing or locked in these is a broken installation or a bug, and no path that somebody gave.
_OWN = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")] + [
    Path(__file__).parents[1] / name for name in ("common", "deploy", "master_service", "node_service")
]


def users_path(error: Exception) -> str | None:
    """The line for an error that is about a path of the user's; None where it names none, or one of the program's own.

    SQLite does not say which file it could not open: there is one that it opens, the ledger in the state directory.
    """
    if isinstance(error, sqlite3.OperationalError) and str(error).startswith(_LEDGER):
        return (
            f"the message log cannot be used: {error}; give another directory with --state, or let this user in there"
        )
    if not isinstance(error, OSError):
        return None
    if error.errno not in _MENDABLE or not isinstance(error.filename, str | bytes):
        return None
    path = Path(error.filename if isinstance(error.filename, str) else error.filename.decode(errors="replace"))
    if any(path.absolute().is_relative_to(folder) for folder in _OWN):
        return None
    return f"{path}: {error.strerror}; give another path, or let this user in there"
