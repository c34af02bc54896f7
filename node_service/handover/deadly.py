"""What this node died of: an instruction or a rule that kills it twice in a row is not tried a third time.

The mirror of `master_service/log/deadly.py`, for what a master's words make a node do at length: build a model, and
take the first step by a rule. A file says what is being done; a start that finds one counts a death.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from pydantic import BaseModel

from common.errors import SharedEncoderError
from node_service.handover.store import Store

log = structlog.get_logger()

_FATAL_DEATHS = 2
_DOING, _DEATHS = "doing.txt", "deaths.json"
#: So many of what it died of are remembered, the newest.
_KEPT = 64


def name_of(what: str, *parts: BaseModel | str) -> str:
    """A short name of what may kill, the same for the same words of a master."""
    words = "\n".join(part if isinstance(part, str) else part.model_dump_json() for part in parts)
    return f"{what} {hashlib.sha256(words.encode()).hexdigest()[:32]}"


class Guard:
    """`at` marks what is being done; what a predecessor died of is counted when this is made."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._deaths = self._read()
        if (doing := (store.read(_DOING) or b"").decode(errors="replace")) != "":
            self._deaths[doing] = self._deaths.pop(doing, 0) + 1
            self._write()
            store.remove(_DOING)

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Mark what could kill this process, or raise what nobody expects. What went well once is innocent; so is what
        was ended by its owner."""
        self._store.write(_DOING, what.encode())
        try:
            yield
        except (SharedEncoderError, OSError, KeyboardInterrupt, SystemExit):
            self._store.remove(_DOING)
            raise
        self._store.remove(_DOING)
        if self._deaths.pop(what, None) is not None:
            self._write()

    def fatal(self, what: str) -> str:
        """Why it is not tried again, in words for its master, if it has killed this node often enough; else empty."""
        if self._deaths.get(what, 0) < _FATAL_DEATHS:
            return ""
        again = f"remove {self._store.place / _DEATHS}"
        log.error("not tried again: this node died of it twice", what=what, to_try_again=again)
        return "this node died of it twice"

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self._store.read(_DEATHS) or b"{}")
            return {str(what): int(count) for what, count in found.items()}
        except (ValueError, AttributeError, TypeError):
            return {}  # damaged: what kills is tried twice more

    def _write(self) -> None:
        self._deaths = dict(list(self._deaths.items())[-_KEPT:])
        self._store.write(_DEATHS, json.dumps(self._deaths).encode())
