"""The payloads of the message log: immutable, and named by the sha256 of what is in them. In files, or in memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

from common.crash_points import reached
from common.durable import sync


class Payloads(Protocol):
    """Bytes by digest. What is here may be damaged, or gone, whatever was written: `damage` says so."""

    def write(self, payload: bytes) -> str:
        """Store durably and give the digest; what is there already, and whole, is not written again."""

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        """The payload, or `length` bytes of it from `start`, unchecked. Raises FileNotFoundError."""

    def damage(self, digest: str) -> str | None:
        """What is wrong with a payload: "missing", or "damaged" if it is not the bytes of its name; None if whole."""

    def size(self, digest: str) -> int:
        """Bytes; 0 if it is not there."""

    def remove(self, digest: str) -> None:
        """Delete a payload; nothing happens if it is not there."""

    def stored(self) -> set[str]:
        """The digests of everything that is here."""


def payload_path(directory: Path, digest: str) -> Path:
    """Where the file of a payload is, or would be, below the folder `payloads`."""
    return directory / digest[:2] / digest


class FilePayloads:
    """A file each, whole or not there: it is synced before it gets its name. `lasting` False: nothing is synced, for a
    log that may be lost with the machine."""

    def __init__(self, directory: Path, *, lasting: bool = True) -> None:
        self._directory = directory
        self._lasting = lasting
        if directory.exists():
            self._sync(directory)  # a folder that was made in it just before a power cut

    def write(self, payload: bytes) -> str:
        digest = hashlib.sha256(payload).hexdigest()
        path = self._path(digest)
        if path.exists() and self.damage(digest) is None:
            return digest
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            for directory in (self._directory, self._directory.parent):
                self._sync(directory)
        beside = path.with_suffix(".part")
        with beside.open("wb") as file:
            file.write(payload)
            if self._lasting:
                file.flush()
                os.fsync(file.fileno())
        reached("payload before rename")
        beside.replace(path)
        self._sync(path.parent)
        return digest

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        with self._path(digest).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def damage(self, digest: str) -> str | None:
        try:
            with self._path(digest).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return "missing"
        return None if found == digest else "damaged"

    def size(self, digest: str) -> int:
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def remove(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)

    def stored(self) -> set[str]:
        return {path.name for path in self._directory.glob("??/*") if path.suffix != ".part"}

    def _path(self, digest: str) -> Path:
        return payload_path(self._directory, digest)

    def _sync(self, path: Path) -> None:
        if self._lasting:
            sync(path)


class MemoryPayloads:
    """In a mapping, which outlives this object if it is somebody else's."""

    def __init__(self, content: dict[str, bytes] | None = None) -> None:
        self.content = {} if content is None else content

    def write(self, payload: bytes) -> str:
        digest = hashlib.sha256(payload).hexdigest()
        self.content[digest] = payload
        return digest

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        if digest not in self.content:
            raise FileNotFoundError(digest)
        payload = self.content[digest]
        return payload[start:] if length < 0 else payload[start : start + length]

    def damage(self, digest: str) -> str | None:
        if digest not in self.content:
            return "missing"
        return None if hashlib.sha256(self.content[digest]).hexdigest() == digest else "damaged"

    def size(self, digest: str) -> int:
        return len(self.content.get(digest, b""))

    def remove(self, digest: str) -> None:
        self.content.pop(digest, None)

    def stored(self) -> set[str]:
        return set(self.content)
