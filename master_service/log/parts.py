"""Updates whose parts lie with several aggregators: the message log has, for each, the digests of the parts, one after
the other, and this puts the parts together again, to read."""

from __future__ import annotations

from collections.abc import Sequence

from master_service.log.payloads import ReadablePayloads

_DIGEST_BYTES = 32


def digests_of(listed: bytes) -> list[str]:
    """The digests of the parts, as the log has them."""
    return [listed[at : at + _DIGEST_BYTES].hex() for at in range(0, len(listed), _DIGEST_BYTES)]


class PartedPayloads:
    """The payloads of a log's updates. `lists`: the log's own; `parts`: those of each aggregator, in order."""

    def __init__(self, lists: ReadablePayloads, parts: Sequence[ReadablePayloads]) -> None:
        self._lists, self._parts = lists, parts

    def read(self, digest: str, start: int = 0, length: int = -1) -> bytes:
        found, stop = [], None if length < 0 else start + length
        for payloads, part, begin, size in self._where(digest):
            first, last = max(start, begin), begin + size if stop is None else min(stop, begin + size)
            if last > first:
                found.append(payloads.read(part, first - begin, last - first))
        return b"".join(found)

    def read_into(self, digest: str, start: int, out: bytearray) -> None:
        read = self.read(digest, start, len(out))
        if len(read) != len(out):
            raise ValueError(f"payload {digest} ends before {start + len(out)} bytes")
        out[:] = read

    def damage(self, digest: str, *, again: bool = True) -> str | None:
        if (problem := self._lists.damage(digest, again=again)) is not None:
            return problem
        listed = zip(self._parts, digests_of(self._lists.read(digest)), strict=True)
        problems = (payloads.damage(part, again=again) for payloads, part in listed)
        return next((problem for problem in problems if problem is not None), None)

    def size(self, digest: str) -> int:
        return sum(size for *_, size in self._where(digest))

    def _where(self, digest: str) -> list[tuple[ReadablePayloads, str, int, int]]:
        """(payloads, digest, first byte in the whole, bytes) of each part."""
        found, begin = [], 0
        for payloads, part in zip(self._parts, digests_of(self._lists.read(digest)), strict=True):
            found.append((payloads, part, begin, payloads.size(part)))
            begin += found[-1][3]
        return found
