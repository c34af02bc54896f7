"""The payloads of the message log as files, named by the sha256 of what is in them.

A large one comes piece by piece, is hashed while each piece is in the processor's cache, and takes no memory. What was
kept is durable once `settle` returns; until then its file is on the way to the disk beside whatever goes on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from common.crash_points import reached
from common.durable import sync
from common.numbers.memory import Bytes
from master_service.log.payloads import REMEMBERED, Incoming

#: Where payloads lie that are still coming, below the folder `payloads`.
_INCOMING = "incoming"
#: Bytes below which a payload is synced when that is waited for, and no thread begun for it.
_SMALL = 1 << 20
#: Threads that wait for the disk.
_SYNCING = 4


def payload_path(directory: Path, digest: str) -> Path:
    """Where the file of a payload is, or would be, below the folder `payloads`."""
    return directory / digest[:2] / digest


class FilePayloads:
    """A file each, whole or not there: it gets its name once all of it has come. `lasting` False: nothing is synced,
    for a log that may be lost with the machine. `on_removed` is told the digest of each that is removed."""

    def __init__(
        self, directory: Path, *, lasting: bool = True, on_removed: Callable[[str], None] | None = None
    ) -> None:
        self._directory = directory
        self._on_removed = on_removed
        # as words: several paths are put together for each payload
        self._root, self._incoming = str(directory), str(directory / _INCOMING)
        self._lasting = lasting
        self._numbers = itertools.count()
        #: What was hashed here: the file as it was then.
        self._whole: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._syncing: ThreadPoolExecutor | None = None
        self._unsettled: list[Future[None]] = []
        #: Of those that are small: their files, open, and their folders.
        self._small: list[tuple[int, str]] = []
        if directory.exists():
            self._sync(directory)  # a folder that was made in it just before a power cut

    def write(self, payload: bytes) -> str:
        incoming = self.receive(len(payload))
        incoming.add(payload)
        digest = incoming.keep()
        self.settle()
        return digest

    def receive(self, size: int) -> Incoming:
        path = f"{self._incoming}/{os.getpid()}-{next(self._numbers)}"
        try:
            return _IncomingFile(self, path, size)
        except FileNotFoundError:
            os.makedirs(self._incoming, exist_ok=True)
            return _IncomingFile(self, path, size)

    def settle(self) -> None:
        unsettled, self._unsettled = self._unsettled, []
        small, self._small = self._small, []
        _settled(partial(_to_disk, small))
        if self._syncing is not None:
            self._syncing.shutdown()
            self._syncing = None
        for each in unsettled:
            _settled(each.result)

    def kept(self, incoming: str, handle: int, digest: str) -> None:
        """A file is complete: give it its name, and let it reach the disk. Takes over the handle."""
        folder, path = f"{self._root}/{digest[:2]}", self._path(digest)
        if os.path.exists(path) and self.damage(digest, again=False) is None:
            # whoever gave it its name may have died before it was on disk
            there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.close(handle)
            os.unlink(incoming)
            handle = there
        else:
            self._name(incoming, folder, path)
        self._remember(digest, os.fstat(handle))
        self._let_reach_the_disk(handle, folder)

    def forget_incoming(self) -> None:
        """Delete what a process that died was receiving. Only whoever alone writes here may."""
        for path in (self._directory / _INCOMING).glob("*"):
            path.unlink(missing_ok=True)

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        with open(self._path(digest), "rb") as file:
            file.seek(start)
            return file.read(length)

    def read_into(self, digest: str, start: int, out: bytearray) -> None:
        handle = os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.preadv(handle, [out], start) != len(out):
                raise ValueError(f"payload {digest} ends before {start + len(out)} bytes")
        finally:
            os.close(handle)

    def damage(self, digest: str, *, again: bool = True) -> str | None:
        path = self._path(digest)
        try:
            if not again and self._whole.get(digest) == _as_it_is(os.stat(path)):
                return None
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return "missing"
        return None if found == digest else "damaged"

    def size(self, digest: str) -> int:
        try:
            return os.stat(self._path(digest)).st_size
        except FileNotFoundError:
            return 0

    def remove(self, digest: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(digest))
        if self._on_removed is not None:
            self._on_removed(digest)

    def stored(self) -> set[str]:
        return {path.name for path in self._directory.glob("??/*") if path.suffix != ".part"}

    def _name(self, incoming: str, folder: str, path: str) -> None:
        if not os.path.exists(folder):
            os.makedirs(folder)
            for directory in (self._directory, self._directory.parent):
                self._sync(directory)
        reached("payload before rename")
        os.replace(incoming, path)

    def _let_reach_the_disk(self, handle: int, folder: str) -> None:
        if not self._lasting:
            os.close(handle)
        elif os.fstat(handle).st_size < _SMALL:
            self._small.append((handle, folder))
        else:
            if self._syncing is None:
                self._syncing = ThreadPoolExecutor(_SYNCING, thread_name_prefix="payloads")
            self._unsettled.append(self._syncing.submit(_to_disk, [(handle, folder)]))

    def _remember(self, digest: str, status: os.stat_result) -> None:
        self._whole[digest] = _as_it_is(status)
        while len(self._whole) > REMEMBERED:
            self._whole.popitem(last=False)

    def _path(self, digest: str) -> str:
        """As `payload_path` has it."""
        return f"{self._root}/{digest[:2]}/{digest}"

    def _sync(self, path: Path) -> None:
        if self._lasting:
            sync(path)


def _as_it_is(status: os.stat_result) -> tuple[int, ...]:
    """What changes when somebody touches a file."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _settled(wait: Callable[[], None]) -> None:
    try:
        wait()
    except OSError as error:
        # whether the pages of a failed sync are still to be written, nobody knows
        raise OSError(errno.EIO, f"a payload did not reach the disk ({error})") from error


def _to_disk(files: list[tuple[int, str]]) -> None:
    """Open files and their folders, each of these once; the files are closed."""
    try:
        for handle, _ in files:
            os.fsync(handle)
    finally:
        for handle, _ in files:
            os.close(handle)
    for folder in {folder for _, folder in files}:
        sync(Path(folder))


def _take_room(handle: int, size: int) -> None:
    """Of the disk, for a file of so many bytes. Raises OSError if there is not enough. Where a file system or a C
    library cannot do that, a full disk is met later, while the file is written."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


class _IncomingFile:
    """Writes into a file beside the payloads, whose room is taken at once: what was begun can be ended."""

    def __init__(self, payloads: FilePayloads, path: str, size: int) -> None:
        self._payloads = payloads
        self._path = path
        self._digest = hashlib.sha256()
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _take_room(self._handle, size)
        except OSError:
            self.discard()
            raise
        self._size = size
        self._written = 0

    def add(self, piece: Bytes) -> None:
        self._digest.update(piece)
        left = memoryview(piece)
        while left:
            count = os.write(self._handle, left)
            self._written, left = self._written + count, left[count:]

    def keep(self) -> str:
        digest = self._digest.hexdigest()
        if self._handle >= 0:
            if self._written < self._size:
                os.ftruncate(self._handle, self._written)
            self._payloads.kept(self._path, self._handle, digest)
            self._handle = -1
        return digest

    def discard(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
