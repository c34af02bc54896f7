"""Texts and their labels out of .txt, .jsonl, .csv and .parquet files; everything but .parquet may be gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from common.errors import UserError

_PLAIN = frozenset({".txt", ".md", ".rst", ".py"})
SUFFIXES = _PLAIN | {".jsonl", ".csv", ".parquet"}

#: A folder of at least so many plain files is taken as one document a file; fewer are large texts of many paragraphs.
_MANY_FILES = 10

#: One text, its label if it has one, and where it stands, for errors.
_Row = tuple[str, str | None, str]


def read_texts(
    files: Sequence[Path], field: str, label: str | None, documents: str
) -> tuple[list[str], list[str] | None]:
    """All texts that are not blank, and their labels if every one has one.

    `field` and `label` name the fields of a row; a `label` that is not given is taken from "label" where that exists.
    `documents` is what one sample of a plain file is (see CorpusConfig). Raises UserError naming file and line.
    """
    plain = [path for path in files if _kind(path) not in (".jsonl", ".csv", ".parquet")]
    if documents == "auto":
        documents = "file" if len(plain) >= _MANY_FILES else "paragraph"
    texts: list[str] = []
    labels: list[str | None] = []
    for path in files:
        before = len(texts)
        for text, given, where in _rows(path, field, label, documents):
            if text.strip():
                if given is None and label is not None:
                    raise UserError(f"{where}: no field {label!r}; correct label in the configuration, or leave it out")
                texts.append(text)
                labels.append(given)
        # an empty __init__.py among a thousand modules is no mistake, an empty table is
        if len(texts) == before and path not in plain:
            raise UserError(f"{path} holds no text; fill it or take it out of path")
    if not texts:
        raise UserError(f"{files[0]} holds no text, nor do the {len(files) - 1} other files; correct path")
    known = [given for given in labels if given is not None]
    return texts, known if len(known) == len(texts) else None


def _rows(path: Path, field: str, label: str | None, documents: str) -> Iterator[_Row]:
    with _readable(path):
        match _kind(path):
            case ".jsonl":
                yield from _json_lines(path, field, label or "label")
            case ".csv":
                yield from _csv(path, field, label or "label")
            case ".parquet":
                yield from _parquet(path, field, label or "label")
            case _:
                yield from _plain(path, documents)


def _plain(path: Path, documents: str) -> Iterator[_Row]:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    match documents:
        case "file":
            parts = [text]
        case "paragraph":
            parts = re.split(r"\n\s*\n", text)
        case _:
            parts = text.splitlines()
    yield from ((part, None, str(path)) for part in parts)


def _json_lines(path: Path, field: str, label: str) -> Iterator[_Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise UserError(f'{where} is not an object; write {{"{field}": "…"}}')
            yield _text(row, field, where), _label(row.get(label)), where


def _csv(path: Path, field: str, label: str) -> Iterator[_Row]:
    # the module's own limit of 128 KiB a field is less than a long document
    csv.field_size_limit(sys.maxsize)
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where} has another number of fields than the header; mend the line")
                yield _text(row, field, where), _label(row.get(label)), where
        except csv.Error as error:
            raise UserError(f"{path} line {reader.reader.line_num} is not CSV ({error}); mend the line") from error


def _parquet(path: Path, field: str, label: str) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise UserError(_missing(str(path), field, names))
        number = 0
        for batch in file.iter_batches(columns=[name for name in (field, label) if name in names]):
            for row in batch.to_pylist():
                number += 1
                where = f"{path} row {number}"
                yield _text(row, field, where), _label(row.get(label)), where
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not readable as Parquet ({_first_line(error)}); write it again") from error


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(_missing(where, field, list(row)))
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is {type(text).__name__}, not text; correct field or the row")
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str) -> None:
    """Raise UserError for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UserError(
            f"{where}: character {error.start} of the text is {half!r}, half of a surrogate pair, which is no valid "
            "text; mend or remove it"
        ) from None


def _missing(where: str, field: str, names: list[str]) -> str:
    return f"{where}: no field {field!r}; set field to one of {', '.join(map(repr, names)) or 'none: it is empty'}"


def _label(value: Any) -> str | None:
    return None if value is None else str(value)


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({_first_line(error)}); convert it or leave it out") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({_first_line(error)}); copy it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); correct its permissions") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
