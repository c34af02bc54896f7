"""What a service logs and what happens in it as JSON lines in a file, beside what people see; of a bounded size. It is
renamed to FILE.1 when it is full, that one to FILE.2, and the last one goes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import threading
from collections.abc import MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from common.clock import SYSTEM, Clock
from common.errors import UserError
from common.events import MARK

#: Stands for who logs in the name of a file, where several share one configuration.
PARTY = "{party}"

_FORMATTED = structlog.processors.ExceptionRenderer()


class LogFile:
    """Written by this process alone, until closed. A disk that is full ends nobody: the lines that do not fit are
    counted, and the next that does says how many there were.

    `max_bytes` of each file; `keep` older ones. Raises UserError where nothing can be written, or somebody else does.
    """

    def __init__(self, path: Path, max_bytes: int, keep: int, clock: Clock = SYSTEM) -> None:
        self._path = path
        self._max = max_bytes
        self._keep = keep
        self._clock = clock
        self._guard = threading.Lock()
        self._lost = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self._opened()
        except BlockingIOError:
            raise UserError(
                f"{path}: another process logs there; give each a file of its own with --log-file, "
                f'or {PARTY} in log.file: "logs/{PARTY}.jsonl"'
            ) from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give another file with --log-file") from None

    def __call__(self, logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A processor of structlog, which leaves the line as it is."""
        facts = {name: value for name, value in line.items() if name not in ("event", MARK)}
        self.write("error" if method == "exception" else method, str(line.get("event", "")), **facts)
        return line

    def write(self, level: str, event: str, **facts: Any) -> None:
        """One line, and before it how many were lost. From whatever thread."""
        line = {"level": level, "event": event, **_FORMATTED(None, "", facts)}
        at = datetime.fromtimestamp(self._clock.now(), UTC).isoformat(timespec="milliseconds")
        with self._guard:
            if self._handle < 0:
                return
            lost = {"at": at, "level": "warning", "event": "lines are lost", "count": self._lost}
            lines = [*([lost] if self._lost else []), {"at": at, **line}]
            try:
                self._put("".join(f"{json.dumps(each, default=repr, ensure_ascii=False)}\n" for each in lines).encode())
                self._lost = 0
            except OSError as error:
                if not self._lost:
                    print(f"{self._path}: {error.strerror}; lines are lost until there is room", file=sys.stderr)
                self._lost += 1

    def close(self) -> None:
        """Nothing more is written."""
        with self._guard:
            os.close(self._handle)
            self._handle = -1

    def _put(self, body: bytes) -> None:
        """The whole, or nothing that anybody would read as a line. Raises OSError."""
        size = os.fstat(self._handle).st_size
        if size and size + len(body) > self._max:
            self._turn()
            size = os.fstat(self._handle).st_size
        if (written := os.write(self._handle, body)) < len(body):
            os.ftruncate(self._handle, size)
            raise OSError(errno.ENOSPC, f"only {written} of {len(body)} bytes were written")

    def _turn(self) -> None:
        """Begin another file."""
        for number in range(self._keep, 0, -1):
            older = self._numbered(number - 1)
            if older.exists():
                older.replace(self._numbered(number))
        if not self._keep:
            self._path.unlink(missing_ok=True)
        full, self._handle = self._handle, self._opened()
        os.close(full)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _opened(self) -> int:
        """Raises BlockingIOError if another process has it."""
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:
            pass  # a file system without locks: nobody else is expected there
        return handle
