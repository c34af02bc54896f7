"""Where a node keeps its small files: a directory, or memory for simulations and tests. A write is whole or nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from common.durable import sync, write_durably


class Store(Protocol):
    """Files by name; a name may be `folder/file`. `place` says in errors where they are."""

    place: Path

    def read(self, name: str, start: int = 0, length: int = -1) -> bytes | None:
        """The content, or `length` bytes of it from `start`; None if there is no such file."""

    def write(self, name: str, *content: bytes) -> None:
        """Replace a file durably: after a crash it is the old one or the new one, whole. It may come in parts."""

    def append(self, name: str, line: bytes) -> None:
        """Add to the end of a file durably; a crash may leave a part of the line."""

    def cut(self, name: str, size: int) -> None:
        """Keep the first `size` bytes of a file."""

    def remove(self, name: str) -> None:
        """Delete a file; nothing happens if there is none."""

    def names(self, folder: str) -> list[str]:
        """The files of a folder as `folder/file`, in order."""


class DirectoryStore:
    """Files below a directory, which is made if it is not there."""

    def __init__(self, directory: Path) -> None:
        self.place = directory
        directory.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, start: int = 0, length: int = -1) -> bytes | None:
        try:
            with (self.place / name).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except FileNotFoundError:
            return None

    def write(self, name: str, *content: bytes) -> None:
        path = self.place / name
        path.parent.mkdir(exist_ok=True)
        write_durably(path, *content)

    def append(self, name: str, line: bytes) -> None:
        path = self.place / name
        path.parent.mkdir(exist_ok=True)
        new = not path.exists()
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(path.parent)

    def cut(self, name: str, size: int) -> None:
        os.truncate(self.place / name, size)
        sync(self.place / name)

    def remove(self, name: str) -> None:
        (self.place / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        directory = self.place / folder
        return sorted(f"{folder}/{path.name}" for path in directory.iterdir()) if directory.is_dir() else []


class MemoryStore:
    """Files that live as long as this object, or as the mapping that it is made of."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.place = Path("memory")
        self.files = {} if files is None else files

    def read(self, name: str, start: int = 0, length: int = -1) -> bytes | None:
        content = self.files.get(name)
        if content is None or (start == 0 and length < 0):
            return content
        return content[start:] if length < 0 else content[start : start + length]

    def write(self, name: str, *content: bytes) -> None:
        self.files[name] = b"".join(content)

    def append(self, name: str, line: bytes) -> None:
        self.files[name] = self.files.get(name, b"") + line

    def cut(self, name: str, size: int) -> None:
        self.files[name] = self.files[name][:size]

    def remove(self, name: str) -> None:
        self.files.pop(name, None)

    def names(self, folder: str) -> list[str]:
        return sorted(name for name in self.files if name.startswith(f"{folder}/"))
