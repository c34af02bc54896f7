"""For an organisation's auditor: a file with a line for each message that leaves this node, and all that is in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack

from common.clock import Clock
from common.errors import UserError
from common.wire.broker import Publication

#: What is longer stands in the file by its size and digest, characters of JSON or bytes.
_LONGEST = 200


class SentFile:
    """A line of JSON for each message, before it leaves: one that is not in the file has not been sent. A message that
    the broker did not confirm is sent, and noted, again. What is in the file stays; whoever cuts it, does so while the
    node is not running, or renames it: the next line begins a new one."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Raises UserError if it cannot be written."""
        self._path = path
        self._clock = clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append("")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; no message leaves that is not noted there") from None

    def note(self, *publications: Publication) -> None:
        """They are about to leave. Raises OSError; then they must not."""
        at = datetime.fromtimestamp(self._clock.now(), UTC).isoformat(timespec="milliseconds")
        self._append("".join(json.dumps(line_of(each, at)) + "\n" for each in publications))

    def _append(self, lines: str) -> None:
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            data = lines.encode()
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)


def noting(path: Path | None, clock: Clock) -> Callable[..., None] | None:
    """What an Outbox is to tell of what leaves; None where nobody wants to know. Raises UserError."""
    return SentFile(path, clock).note if path is not None else None


def line_of(publication: Publication, at: str) -> dict[str, Any]:
    """What the file has of a message: where it goes, its size in bytes on the wire, and each field of it. Pure."""
    body: dict[str, Any] = msgpack.unpackb(publication.body)
    kind = body.pop("kind")
    body.pop("schema_version", None)
    return {
        "at": at,
        "kind": kind,
        "bytes": len(publication.body),
        "exchange": publication.exchange,
        "routing_key": publication.routing_key,
        "message_id": publication.message_id,
        "fields": {name: shown(value) for name, value in body.items() if value is not None},
    }


def shown(value: Any) -> Any:
    """A field as it is, or, where that is long, its size and the sha256 of its bytes (of its JSON, if it has none)."""
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    text = json.dumps(value)
    if len(text) <= _LONGEST:
        return value
    found: dict[str, Any] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return {"items": len(value), **found} if isinstance(value, list | dict) else found
