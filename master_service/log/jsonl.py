"""A message log as one file of JSON lines, to hand to an auditor or to keep: every row as it stands in the ledger, each
payload once before the first row that names it. The checksum chain of the rows verifies in it as it does in the ledger.
"""

from __future__ import annotations

import base64
import gzip
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from common.errors import Damaged, UserError
from common.exports import check_file
from master_service.log.message_log import SCHEMA_VERSION, MessageLog, Row, open_log

#: The key of the header line, whose value is the version of this format.
_MARK = "shared-encoder-log"
_FORMAT = 1
_NOT_EXPORTED = "left out of the export"


@dataclass
class Exported:
    """`lost` names payloads that are damaged or gone: the file says so of them."""

    rows: int = 0
    payloads: int = 0
    dropped: int = 0
    lost: list[str] = field(default_factory=list)


def export_log(
    log: MessageLog,
    path: Path,
    *,
    after: int = -1,
    up_to: int | None = None,
    payloads: bool = True,
    on_row: Callable[[], None] = lambda: None,
) -> Exported:
    """Write the rows above `after` and not above `up_to` into `path`, gzipped if its name ends with .gz.

    What was dropped is in it as dropped, with the reason. Raises Damaged at a row that is not what was written.
    """
    done, seen = Exported(), set[str]()
    checksum = log.checksum(after) or log.before
    header = {_MARK: _FORMAT, "schema": SCHEMA_VERSION, "after": after, "checksum": checksum, "payloads": payloads}
    with _writing(path) as file:
        _write(file, header)
        for row in log.rows(after, up_to):
            if not row.follows(checksum):
                raise Damaged(f"row {row.offset} of the ledger in {log.directory} is not what was written")
            if row.payload is not None and row.payload not in seen:
                seen.add(row.payload)
                _write(file, _payload_line(log, row.payload, done, wanted=payloads))
            _write(file, {"row": row._asdict()})
            done.rows, checksum = done.rows + 1, row.chain
            on_row()
        _write(file, {"end": {"rows": done.rows, "checksum": checksum}})
    return done


def _payload_line(log: MessageLog, payload: str, done: Exported, *, wanted: bool) -> object:
    if (reason := log.why_dropped(payload)) is not None:
        done.dropped += 1
        return {"payload": payload, "dropped": reason}
    if not wanted:
        return {"payload": payload, "dropped": _NOT_EXPORTED}
    if problem := log.payloads.damage(payload):
        done.lost.append(payload)
        return {"payload": payload, "lost": problem}
    done.payloads += 1
    return {"payload": payload, "base64": base64.b64encode(log.payloads.read(payload)).decode()}


@contextmanager
def opened(path: Path) -> Iterator[MessageLog]:
    """A master's state directory, or a file that `export_log` wrote, to be read. A master may be writing to it.

    Raises UserError if there is no log, Damaged if the file is not what was written.
    """
    if path.is_file():
        with tempfile.TemporaryDirectory(prefix="shared-encoder-log-") as folder:
            log = import_log(path, Path(folder))
            try:
                yield log
            finally:
                log.close()
        return
    try:
        log = open_log(path, read_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{error}; give the master's state directory, or an exported log, with --state PATH") from None
    try:
        yield log
    finally:
        log.close()


def is_export(path: Path) -> bool:
    """Whether a file begins as `export_log` begins one. Raises Damaged for what is no table of JSON."""
    return _MARK in next(_lines(path), {})


def check_export_file(path: Path) -> None:
    """Whether an export can be written there. Raises UserError, also for a file that is there and is none."""
    check_file(path, "exported message log", is_export)


def import_log(path: Path, directory: Path) -> MessageLog:
    """Make a ledger and payloads of an exported file in an empty directory. Raises UserError, Damaged."""
    lines = _lines(path)
    header = next(lines, {})
    if header.get(_MARK) != _FORMAT or header.get("schema") != SCHEMA_VERSION or "checksum" not in header:
        raise UserError(f"{path} is no message log that this program reads: it has no line that says so first")
    log = open_log(directory, before=str(header["checksum"]), lasting=False)
    end: dict[str, Any] = {}

    def rows() -> Iterator[Row]:
        for line in lines:
            if "row" in line:
                yield Row(**line["row"])
            elif "end" in line:
                end.update(line["end"])
            elif "base64" in line:
                _keep(log, path, line["payload"], base64.b64decode(line["base64"]))
            elif "dropped" in line:
                log.note_dropped([(line["payload"], line["dropped"], 0.0)])

    try:
        taken = log.take(rows())
        if end != {"rows": taken, "checksum": log.checksum(log.last_offset) or log.before}:
            raise Damaged(f"{path} ends, or is not what was exported, after row {log.last_offset}")
    except (KeyError, TypeError, ValueError) as error:
        log.close()
        raise Damaged(f"{path} is damaged: {error}") from None
    except Damaged:
        log.close()
        raise
    return log


def _keep(log: MessageLog, source: Path, payload: str, content: bytes) -> None:
    if log.payloads.write(content) != payload:
        raise Damaged(f"{source}: payload {payload} is damaged")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Raises Damaged where a line is none of ours."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for number, text in enumerate(file, start=1):
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError(f"line {number} is no table")
                yield line
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise Damaged(f"{path} is damaged, or no exported message log: {error}") from None


@contextmanager
def _writing(path: Path) -> Iterator[IO[str]]:
    """Written beside and renamed: a file of this name is a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with gzip.open(beside, "wt") if path.suffix == ".gz" else beside.open("w") as file:
        yield file
    beside.replace(path)


def _write(file: IO[str], line: object) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
