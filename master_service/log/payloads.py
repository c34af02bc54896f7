"""The payloads of the message log: immutable, and named by the sha256 of what is in them. What every store of them can
do, and the one in memory; the one on disk is in `payload_files`."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Protocol

from common.numbers.memory import Bytes

#: So many of the newest payloads are known to be whole without another look.
REMEMBERED = 4096


class Incoming(Protocol):
    """A payload that comes piece by piece."""

    def add(self, piece: Bytes) -> None:
        """What comes next of it."""

    def keep(self) -> str:
        """All has come: give it its name, the digest, which is returned. Durable with the next `settle`. Raises OSError
        if it cannot be done now; then it may be tried again."""

    def discard(self) -> None:
        """Forget what has come. Nothing happens after `keep`."""


class ReadablePayloads(Protocol):
    """Bytes by digest. What is here may be damaged, or gone, whatever was written: `damage` says so."""

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        """The payload, or `length` bytes of it from `start`, unchecked. Raises FileNotFoundError."""

    def read_into(self, digest: str, start: int, out: bytearray) -> None:
        """Fill `out` with the bytes from `start` on, unchecked. Raises FileNotFoundError, ValueError if it ends
        before."""

    def damage(self, digest: str, *, again: bool = True) -> str | None:
        """What is wrong with a payload: "missing", or "damaged" if it is not the bytes of its name; None if whole.
        `again` False: what this object has hashed, and nobody has touched since, is not read once more."""

    def size(self, digest: str) -> int:
        """Bytes; 0 if it is not there."""


class Payloads(ReadablePayloads, Protocol):
    """Those of whoever writes them too."""

    def write(self, payload: bytes) -> str:
        """Store durably and give the digest; what is there already, and whole, is not written again."""

    def receive(self, size: int) -> Incoming:
        """A payload of so many bytes will come. Raises OSError, at once, if there is no room for all of it."""

    def settle(self) -> None:
        """Wait until all that was kept is durable. Raises OSError if it cannot be made so: then it never will be."""

    def remove(self, digest: str) -> None:
        """Delete a payload; nothing happens if it is not there."""

    def stored(self) -> set[str]:
        """The digests of everything that is here."""


class MemoryPayloads:
    """In a mapping, which outlives this object if it is somebody else's."""

    def __init__(self, content: dict[str, bytes] | None = None) -> None:
        self.content = {} if content is None else content
        #: What was hashed here: the very object.
        self._whole: OrderedDict[str, bytes] = OrderedDict()

    def write(self, payload: bytes) -> str:
        digest = hashlib.sha256(payload).hexdigest()
        self.content[digest] = self._whole[digest] = payload
        while len(self._whole) > REMEMBERED:
            self._whole.popitem(last=False)
        return digest

    def receive(self, size: int) -> Incoming:
        return _IncomingBytes(self)

    def settle(self) -> None:
        """What is in memory lasts as long as that."""

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        if digest not in self.content:
            raise FileNotFoundError(digest)
        payload = self.content[digest]
        return payload[start:] if length < 0 else payload[start : start + length]

    def read_into(self, digest: str, start: int, out: bytearray) -> None:
        read = self.read(digest, start, len(out))
        if len(read) != len(out):
            raise ValueError(f"payload {digest} ends before {start + len(out)} bytes")
        out[:] = read

    def damage(self, digest: str, *, again: bool = True) -> str | None:
        if digest not in self.content:
            return "missing"
        if not again and self._whole.get(digest) is self.content[digest]:
            return None
        return None if hashlib.sha256(self.content[digest]).hexdigest() == digest else "damaged"

    def size(self, digest: str) -> int:
        return len(self.content.get(digest, b""))

    def remove(self, digest: str) -> None:
        self.content.pop(digest, None)

    def stored(self) -> set[str]:
        return set(self.content)


class _IncomingBytes:
    def __init__(self, payloads: MemoryPayloads) -> None:
        self._payloads = payloads
        self._pieces: list[Bytes] = []

    def add(self, piece: Bytes) -> None:
        self._pieces.append(piece)

    def keep(self) -> str:
        return self._payloads.write(b"".join(self._pieces))

    def discard(self) -> None:
        self._pieces = []
