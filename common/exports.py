"""Where results go: a folder is replaced if an earlier export of ours is in it, and is the old or the new one, whole.

Whoever is to write checks first, before the long work, so that a wrong path costs nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.cards import TITLE as TITLE
from common.cards import is_card
from common.durable import sync
from common.errors import Damaged, UserError

_CARD = "README.md"
#: Characters of a README.md in which front matter and title must be.
_BEGINNING = 1 << 16


def check_export_directory(directory: Path) -> None:
    """Whether an export may go there. Raises UserError if something else is in it, or nothing can be written there."""
    try:
        place = directory.resolve()
        if place.is_dir():
            if any(place.iterdir()) and not _is_export(place):
                raise UserError(
                    f"{directory} holds something else than an exported encoder; export into a new directory"
                )
            if place.is_mount():
                # an export is put in place by renaming, which a mount point does not allow
                raise UserError(
                    f"{directory} is a mount point, which cannot be replaced; export into a folder below it"
                )
        elif place.exists():
            raise UserError(f"{directory} is a file; export into a new directory")
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; export into another directory") from None
    check_writable(place.parent, directory)


def check_writable(folder: Path, wanted: Path) -> None:
    """Whether files can be made in a folder, or the folder itself where it is not there yet.

    Raises UserError, which names `wanted`: the path that the user gave.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        # tried and not asked: root may everything by the permission bits, and still not write to /proc
        os.rmdir(tempfile.mkdtemp(prefix=".shared-encoder-", dir=there))
    except OSError as error:
        raise UserError(
            f"{wanted} cannot be written: nothing can be made in {there} ({error.strerror}); give another place"
        ) from None


def check_file(file: Path, what: str, is_one: Callable[[Path], bool]) -> None:
    """Whether a file of this name can be written. Raises UserError, also for one that is there and not of this kind.

    `what` says in words what is to be written, and `is_one` whether a file is one; it may raise Damaged,
    ValueError or OSError.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder; give the name of a file")
    try:
        other = file.is_file() and file.stat().st_size > 0 and not is_one(file)
    except (ValueError, OSError, Damaged):
        other = True
    if other:
        raise UserError(f"{file} is there and is no {what}; give another name")
    check_writable(file.parent, file)


@contextmanager
def replacing(directory: Path, card: str, *, ours: bool = False) -> Iterator[Path]:
    """A new folder to write an export into, which takes the place of `directory` at the end of the block.

    `card` begins its README.md, which tells the next one that this is an export. After an exception the folder is gone
    and what was in `directory` is untouched. `ours`: the directory is within a state directory, where nobody else
    writes. Raises UserError for a directory of somebody else, OSError.
    """
    if not ours:
        check_export_directory(directory)
    directory = directory.resolve()
    # hidden, and of this process: nobody else's folder is in the way
    beside = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    before = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if not _is_export(beside):
            own = beside / _CARD
            own.write_text(f"{card}\n{own.read_text('utf-8')}" if own.exists() else card, "utf-8")
        for path in (*beside.rglob("*"), beside):
            sync(path)
        if directory.exists():
            shutil.rmtree(before, ignore_errors=True)
            directory.rename(before)
        try:
            beside.rename(directory)
        except OSError:
            if before.exists():
                before.rename(directory)
            raise
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync(directory.parent)
    shutil.rmtree(before, ignore_errors=True)


def _is_export(directory: Path) -> bool:
    """By its card; a folder with another README.md, or with none, is somebody else's."""
    card = directory / _CARD
    if not card.is_file():
        return False
    with card.open(encoding="utf-8", errors="replace") as file:
        return is_card(file.read(_BEGINNING))
