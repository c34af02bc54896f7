"""The assets that a node has read, on its disk: named by their digests, so that a restart, or another encoder with the
same tokenizer, reads nothing again. What a file holds is checked whenever it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.wire.assets import is_asset
from common.wire.fields import AssetEntry
from node_service.handover.store import Store

_FOLDER = "assets"


class AssetCache:
    """Assets in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def keep(self, entry: AssetEntry, content: bytes) -> None:
        """Keep an asset, durably."""
        self._store.write(_name(entry), content)

    def lacking(self, entries: Iterable[AssetEntry]) -> list[AssetEntry]:
        """Those that are not here, or not whole."""
        return [entry for entry in entries if self._read(entry) is None]

    def read(self, entries: Sequence[AssetEntry]) -> dict[str, bytes] | None:
        """All of these by name; None if one is lacking."""
        found = {entry.name: content for entry in entries if (content := self._read(entry)) is not None}
        return found if len(found) == len(entries) else None

    def keep_only(self, entries: Iterable[AssetEntry]) -> None:
        """Drop what is none of these."""
        kept = {_name(entry) for entry in entries}
        for name in self._store.names(_FOLDER):
            if name not in kept:
                self._store.remove(name)

    def _read(self, entry: AssetEntry) -> bytes | None:
        content = self._store.read(_name(entry))
        return content if content is not None and is_asset(entry, content) else None


def _name(entry: AssetEntry) -> str:
    return f"{_FOLDER}/{entry.digest}"


def shown(assets: Iterable[AssetEntry]) -> str:
    """Assets for people: a tokenizer is one, whatever its files are called."""
    return ", ".join(dict.fromkeys("tokenizer" if "tokenizer" in each.name else each.name for each in assets))
