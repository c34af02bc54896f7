"""The payloads of the message log: immutable files named by the sha256 of what is in them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from common.crash_points import reached
from common.durable import sync


class PayloadStore:
    """Whole or not there: a file is synced before it gets its name. Reading by name is checked by `damage`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        if directory.exists():
            sync(directory)  # a folder that was made in it just before a power cut

    def path(self, digest: str) -> Path:
        return self._directory / digest[:2] / digest

    def write(self, payload: bytes) -> str:
        """Store durably and give the digest; what is there already, and whole, is not written again."""
        digest = hashlib.sha256(payload).hexdigest()
        path = self.path(digest)
        if path.exists() and self.damage(digest) is None:
            return digest
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            for directory in (self._directory, self._directory.parent):
                sync(directory)
        beside = path.with_suffix(".part")
        with beside.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        reached("payload before rename")
        beside.replace(path)
        sync(path.parent)
        return digest

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        """The payload, or `length` bytes of it from `start`. Raises FileNotFoundError."""
        with self.path(digest).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def damage(self, digest: str) -> str | None:
        """What is wrong with a payload: not there, or not the bytes of its name; None if it is whole."""
        try:
            with self.path(digest).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return "missing"
        return None if found == digest else "damaged"

    def size(self, digest: str) -> int:
        """Bytes; 0 if it is not there."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def remove(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)

    def stored(self) -> set[str]:
        """The digests of everything that is here."""
        return {path.name for path in self._directory.glob("??/*") if path.suffix != ".part"}
