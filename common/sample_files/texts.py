"""Texts and their labels out of plain files and tables; all but Parquet may be gzipped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.sample_files.decoding import HEAD, encoding, opened, readable
from common.sample_files.kinds import PLAIN, SampleFile
from common.sample_files.refusals import LeftOut, Refusals, shown
from common.sample_files.tables import Row, table_rows

#: A folder of at least so many plain files is taken as one document a file; fewer are large texts of many paragraphs.
_MANY_FILES = 10


@dataclass(frozen=True)
class Texts:
    """Texts that are not blank, their labels if every one has one, and what was left out of the files."""

    texts: list[str]
    labels: list[str] | None
    left_out: tuple[LeftOut, ...]


def read_texts(files: Sequence[SampleFile], field: str, label: str | None, documents: str, refusals: Refusals) -> Texts:
    """All texts of the files that can be read; `refusals` gathers a line for each file that cannot, with its row.

    `field` and `label` name the fields of a row; a `label` that is not given is taken from "label" where that exists.
    `documents` is what one sample of a plain file is (see CorpusConfig).
    """
    if documents == "auto":
        documents = "file" if sum(file.kind is PLAIN for file in files) >= _MANY_FILES else "paragraph"
    texts: list[str] = []
    labels: list[str | None] = []
    left_out: list[LeftOut] = []
    wrong = len(refusals.lines)
    for file in files:
        with refusals.gathering():
            _read(file, (field, label, documents), texts, labels, left_out)
    if files and not texts and len(refusals.lines) == wrong:
        others = f", nor do {len(files) - 1} others" if len(files) > 1 else ""
        refusals.add(f"{shown(files[0].path)} holds no text{others}; correct path")
    known = [given for given in labels if given is not None]
    return Texts(texts, known if len(known) == len(texts) else None, tuple(left_out))


def _read(
    file: SampleFile,
    wanted: tuple[str, str | None, str],
    texts: list[str],
    labels: list[str | None],
    left_out: list[LeftOut],
) -> None:
    """Adds the file's texts and labels, and what is blank in it. Raises UserError."""
    path, label = file.path, wanted[1]
    before, blank = len(texts), 0
    for text, given, where in _rows(file, *wanted):
        if not text.strip():
            blank += 1
            continue
        if given is None and label is not None:
            raise UserError(f"{where}: no field {label!r}; correct label in the configuration, or leave it out")
        texts.append(text)
        labels.append(given)
    if file.kind is PLAIN:
        # an empty __init__.py among a thousand modules is no mistake, an empty table is
        if len(texts) == before:
            left_out.append(LeftOut(shown(path.name), "empty", path))
    elif len(texts) == before:
        raise UserError(f"{shown(path)} holds no text; fill it or take it out of path")
    elif blank:
        left_out.append(LeftOut(f"{blank} in {shown(path.name)}", "rows without text", path))


def _rows(file: SampleFile, field: str, label: str | None, documents: str) -> Iterator[Row]:
    with readable(file.path):
        if file.kind is PLAIN:
            yield from _plain(file.path, documents)
        else:
            yield from table_rows(file.path, file.kind, field, label or "label")


def _plain(path: Path, documents: str) -> Iterator[Row]:
    with opened(path) as file:
        raw = file.read()
    text = raw.decode(encoding(raw[:HEAD], shown(path)))
    match documents:
        case "file":
            parts = [text]
        case "paragraph":
            parts = re.split(r"\n\s*\n", text)
        case _:
            parts = text.splitlines()
    yield from ((part, None, shown(path)) for part in parts)
