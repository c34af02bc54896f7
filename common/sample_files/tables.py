"""Rows of JSON lines, JSON, CSV, TSV and Parquet files: a text each, its label if it has one, and where it stands.

The readers of Python's library stay for JSON and CSV: pyarrow's guess the types of columns, and name no line.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from common.errors import UserError
from common.extras import need
from common.sample_files import kinds
from common.sample_files.decoding import HEAD, check_unicode, encoding, first_line, opened
from common.sample_files.kinds import Kind
from common.sample_files.refusals import shown

#: One text, its label if it has one, and where it stands, for errors.
Row = tuple[str, str | None, str]


def table_rows(path: Path, kind: Kind, field: str, label: str) -> Iterator[Row]:
    """The rows of a table, in order. `field` and `label` name its columns; a table need not have the second.

    Raises UserError that names the line or row for whatever is no table of texts, and for two columns of one name.
    """
    yield from _READERS[kind](path, field, label)


def _json_lines(path: Path, field: str, label: str) -> Iterator[Row]:
    with opened(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if line.strip():
                where = f"{shown(path)} line {number}"
                yield _of_object(_parsed(line, where, "mend or remove the line", field, label), field, label, where)


def _json(path: Path, field: str, label: str) -> Iterator[Row]:
    """A list of objects, or lines of them."""
    with opened(path) as file:
        whole = file.read()
    text = whole.decode(encoding(whole[:HEAD], shown(path)))
    if text.lstrip().startswith("["):
        for number, row in enumerate(_parsed(text, shown(path), "mend the file", field, label), 1):
            yield _of_object(row, field, label, f"{shown(path)} row {number}")
        return
    try:
        json.loads(text.lstrip().partition("\n")[0] or "{}")
    except ValueError:
        rows = "write a list of objects, or .jsonl with an object a line"
        raise UserError(f"{shown(path)} is one JSON document and holds no rows; {rows}") from None
    yield from _json_lines(path, field, label)


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes | str]:
    """Lines as bytes of UTF-8, which JSON's reader decodes itself, or as text where a mark says another encoding."""
    name = encoding(file.read(HEAD), shown(path))
    file.seek(0)
    yield from file if name == "utf-8-sig" else io.TextIOWrapper(file, encoding=name)


def _parsed(text: str | bytes, where: str, mend: str, *names: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            _check_once(where, [key for key, _ in pairs], names)
        return row

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise UserError(f"{where} is nested too deep for rows; {mend}") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); {mend}") from error


def _of_object(row: Any, field: str, label: str, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object; write {{"{field}": "…"}}')
    return _text(row, field, where), label_text(row.get(label), where), where


def _csv(path: Path, field: str, label: str, delimiter: str = ",") -> Iterator[Row]:
    # the module's own limit of 128 KiB a field is less than a long document
    csv.field_size_limit(sys.maxsize)
    with opened(path) as raw:
        name = encoding(raw.read(HEAD), shown(path))
        raw.seek(0)
        with io.TextIOWrapper(raw, encoding=name, newline="") as file:
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)
            try:
                names = list(reader.fieldnames or ())
                _check_once(f"{shown(path)} line 1", names, (field, label))
                if field not in names and len(names) == 1 and (other := _other_delimiter(names[0], delimiter)):
                    raise UserError(
                        f"{shown(path)} line 1: its columns seem to be divided by {other}, not by {delimiter!r}; write "
                        "it with commas as .csv, or with tabs as .tsv"
                    )
                for row in reader:
                    where = f"{shown(path)} line {reader.line_num}"
                    if None in row or None in row.values():
                        raise UserError(f"{where} has another number of fields than the header; mend the line")
                    yield _text(row, field, where), label_text(row.get(label), where), where
            except csv.Error as error:
                raise UserError(
                    f"{shown(path)} line {reader.reader.line_num} is not CSV ({error}); mend the line"
                ) from error


def _other_delimiter(header: str, delimiter: str) -> str | None:
    names = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
    return next((name for sign, name in names.items() if sign in header and sign != delimiter), None)


def _tabs(path: Path, field: str, label: str) -> Iterator[Row]:
    return _csv(path, field, label, "\t")


def _parquet(path: Path, field: str, label: str) -> Iterator[Row]:
    need("pyarrow", "Parquet files need")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        names = file.schema_arrow.names
        if field not in names:
            raise UserError(missing(shown(path), field, names))
        _check_once(shown(path), names, (field, label))
        number = 0
        for batch in file.iter_batches(columns=[name for name in (field, label) if name in names]):
            for row in batch.to_pylist():
                number += 1
                where = f"{shown(path)} row {number}"
                yield _text(row, field, where), label_text(row.get(label), where), where
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{shown(path)} is not readable as Parquet: it is damaged, or is none ({first_line(error)}); copy or write "
            "it again"
        ) from error


def _check_once(where: str, names: Sequence[str], used: Sequence[str]) -> None:
    """Raises UserError if one of the columns that are used is there twice: nobody can know which one is meant."""
    for name in used:
        if names.count(name) > 1:
            raise UserError(f"{where} has {names.count(name)} columns called {name!r}; rename or remove all but one")


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(missing(where, field, list(row)))
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is {type(text).__name__}, not text; correct field or the row")
    check_unicode(text, where)
    return text


def missing(where: str, field: str, names: list[str]) -> str:
    """The line for a column that is not there."""
    return f"{where}: no field {field!r}; set field to one of {', '.join(map(repr, names)) or 'none: it is empty'}"


def label_text(value: Any, where: str) -> str | None:
    """A label as text. Raises UserError for one that is no valid text."""
    if value is None:
        return None
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    check_unicode(text, f"{where}: its label")
    return text


_READERS: dict[Kind, Callable[[Path, str, str], Iterator[Row]]] = {
    kinds.JSON_LINES: _json_lines,
    kinds.JSON: _json,
    kinds.CSV: _csv,
    kinds.TABS: _tabs,
    kinds.PARQUET: _parquet,
}
