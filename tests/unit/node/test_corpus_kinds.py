"""What becomes of every kind of file: read, left out, or refused by name; the same however the file is named."""

from __future__ import annotations

import gzip
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import FilesRefused
from common.sample_files.kinds import KINDS, kind_of
from deploy.commands.run import load_corpora
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus, CorpusConfig, load_corpus

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/corpora.md").read_text()
LEFT_OUT = "left out"


def in_memory(write: Any) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def parquet(*columns: tuple[str, pa.Array]) -> bytes:
    names, arrays = [name for name, _ in columns], [array for _, array in columns]
    return in_memory(lambda file: pq.write_table(pa.Table.from_arrays(arrays, names), file))


PIXELS = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
PNG = in_memory(lambda file: Image.fromarray(PIXELS).save(file, "png"))
ARRAYS = np.stack([PIXELS, 255 - PIXELS])
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32).tobytes()), pa.py_buffer(b"\xff\xfe")]
)
ROWS_OF_JSON = b'{"text": "one", "label": "a"}\n{"text": "two"}\n'

#: A file's name and content, what becomes of it in a corpus of texts, and in one of images: the number of samples,
#: "left out", or words of the refusal.
CASES: list[tuple[str, bytes, int | str, int | str]] = [
    ("note.txt", b"one\n\ntwo", 2, LEFT_OUT),
    ("note.log", b"a suffix that nobody knows", 1, LEFT_OUT),
    ("README", b"no suffix at all", 1, LEFT_OUT),
    ("note.txt.gz", gzip.compress(b"one\n\ntwo"), 2, LEFT_OUT),
    ("nul.txt", b"a NUL \0 in a long enough text stays there", 1, LEFT_OUT),
    ("marked.txt", "Grüße\n\nПривет".encode("utf-16"), 2, LEFT_OUT),
    ("marked.csv", "text,label\nGrüße,x\n".encode("utf-16"), 1, LEFT_OUT),
    ("marked.jsonl", ROWS_OF_JSON.decode().encode("utf-32"), 2, LEFT_OUT),
    ("utf16.txt", "hello there".encode("utf-16-le"), "is UTF-16LE text without a mark; convert it: iconv", LEFT_OUT),
    ("utf16.csv", "text\nhello\n".encode("utf-16-be"), "is UTF-16BE text without a mark", LEFT_OUT),
    ("utf16.jsonl", '{"text": "hello"}'.encode("utf-16-le"), "is UTF-16LE text without a mark", LEFT_OUT),
    ("cyrillic.txt", "Привет как дела".encode("utf-16-le"), "is UTF-16LE text without a mark", LEFT_OUT),
    ("latin.txt", "Grüße".encode("latin-1"), "latin.txt is not UTF-8 text", LEFT_OUT),
    ("zeros.txt", bytes(100), "zeros.txt holds bytes that are no text", LEFT_OUT),
    ("braces.txt", ROWS_OF_JSON, "begins with a JSON object and is no plain text; call it .jsonl", LEFT_OUT),
    ("braces.dump", ROWS_OF_JSON, "begins with a JSON object and is no plain text; call it .jsonl", LEFT_OUT),
    ("rows.jsonl", ROWS_OF_JSON, 2, LEFT_OUT),
    ("rows.ndjson.gz", gzip.compress(ROWS_OF_JSON), 2, LEFT_OUT),
    ("half.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', "half.jsonl line 2: character 0 of the text is", LEFT_OUT),
    ("twice.jsonl", b'{"text": "x", "text": "y"}\n', "twice.jsonl line 1 has 2 columns called 'text'", LEFT_OUT),
    ("other-twice.jsonl", b'{"id": 1, "id": 2, "text": "x"}\n', 1, LEFT_OUT),
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000, "deep.jsonl line 1 is nested too deep", LEFT_OUT),
    ("list.json", b'[{"text": "one"}, {"text": "two"}]', 2, LEFT_OUT),
    ("lines.json", ROWS_OF_JSON, 2, LEFT_OUT),
    ("settings.json", b'{\n "text": "one"\n}', "is one JSON document and holds no rows", LEFT_OUT),
    ("numbers.json", b"[1, 2]", "numbers.json row 1 is not an object", LEFT_OUT),
    ("table.csv", b"text,label\none,a\ntwo,b\n", 2, LEFT_OUT),
    ("twice.csv", b"id,text,text\n1,one,eins\n", "twice.csv line 1 has 2 columns called 'text'", LEFT_OUT),
    ("label-twice.csv", b"text,label,label\none,a,b\n", "line 1 has 2 columns called 'label'", LEFT_OUT),
    ("other-twice.csv", b"text,,\none,,\n", 1, LEFT_OUT),
    ("semicolons.csv", b"text;label\none;a\n", "its columns seem to be divided by semicolons", LEFT_OUT),
    ("zipped.csv", gzip.compress(b"text\none\n"), "is a gzip file by its content and a CSV table by its", LEFT_OUT),
    ("sheet.csv", b"PK\x03\x04 an .xlsx", "is an archive by its content and a CSV table by its name", LEFT_OUT),
    ("table.tsv", b"text\tlabel\none, and more\ta\n", 1, LEFT_OUT),
    ("table.parquet", parquet(("text", pa.array(["one", "two"]))), 2, LEFT_OUT),
    ("twice.parquet", parquet(("text", pa.array(["x"])), ("text", pa.array(["y"]))), "has 2 columns called", LEFT_OUT),
    ("damaged.parquet", parquet(("text", NOT_UTF8)), "not readable as Parquet: it is damaged", LEFT_OUT),
    ("cut.parquet", parquet(("text", pa.array(["one"])))[:-9], "not readable as Parquet: it is damaged", LEFT_OUT),
    ("photo.png", PNG, LEFT_OUT, 1),
    ("photo.jpg", PNG, LEFT_OUT, 1),
    ("photo", PNG, LEFT_OUT, 1),
    ("photo.txt", PNG, "is a picture by its content and a plain text file by its name", "is a picture by its content"),
    ("photo.png.gz", gzip.compress(PNG), "is a compressed file, which is not read", "is a compressed file"),
    ("phone.jpg", b"\0\0\0\x18ftypheic", LEFT_OUT, "is a picture in another format by its content"),
    ("missing.jpg", b"<!DOCTYPE html><p>404", LEFT_OUT, "is an HTML or XML document by its content and a picture by"),
    ("torn.png", PNG[:-30], LEFT_OUT, "torn.png cannot be read"),
    ("empty.png", b"", LEFT_OUT, "empty.png is not a picture"),
    ("a.npy", in_memory(lambda file: np.save(file, ARRAYS)), LEFT_OUT, 2),
    ("a.npz", in_memory(lambda file: np.savez(file, x=ARRAYS)), LEFT_OUT, 2),
    ("cut.npz", in_memory(lambda file: np.savez(file, x=ARRAYS))[:-40], LEFT_OUT, "is not readable as .npz"),
    ("scan.pdf", b"%PDF-1.4", "is a PDF document, which is not read; save its text", "is a PDF document"),
    ("scan.txt", b"%PDF-1.4", "is a PDF document by its content and a plain text file by its name", LEFT_OUT),
    ("letter.docx", b"PK\x03\x04", "is a word processor's document, which is not read; save its text", LEFT_OUT),
    ("table.xlsx", b"PK\x03\x04", "is a spreadsheet, which is not read; save it as .csv", LEFT_OUT),
    ("page.html", b"<p>text", "is an HTML or XML document, which is not read; save its text", LEFT_OUT),
    ("page", b"<!doctype html><p>text", "is an HTML or XML document, which is not read", LEFT_OUT),
    ("work.ipynb", b'{"cells": []}', "is a notebook, which is not read", LEFT_OUT),
    ("table.feather", b"ARROW1\0\0", "is a table in another format, which is not read; write it as .parquet", LEFT_OUT),
    ("phone.heic", b"\0\0\0\x18ftypheic", LEFT_OUT, "is a picture in another format, which is not read; save it"),
    ("film.mp4", b"\0\0\0\x18ftypisom", LEFT_OUT, "is a video, which is not read; save its frames"),
    ("song.mp3", b"ID3", LEFT_OUT, LEFT_OUT),
    ("all.zip", b"PK\x03\x04", "is an archive, which is not read; unpack it", "is an archive, which is not read"),
    ("all.tar.gz", gzip.compress(b"x"), "is an archive, which is not read; unpack it", "is an archive"),
    ("note.txt.xz", b"\xfd7zXZ\0", "is a compressed file, which is not read; unpack it", "is a compressed file"),
    ("packed", gzip.compress(b"text"), "is a gzip file, which is not read; add .gz to its name", "is a gzip file"),
    ("model.pkl", b"\x80\x04.", "is a pickle, which is not read; a pickle can run code", "is a pickle"),
    ("data.h5", b"\x89HDF\r\n\x1a\n", "is a database, which is not read", "is a database, which is not read"),
    ("tool.so", b"\x7fELF\x02\x01", LEFT_OUT, LEFT_OUT),
    ("blob.bin", bytes(range(256)), "is a file that is neither UTF-8 text nor of", "is a file that is neither UTF-8"),
    (".hidden.txt", b"a draft", LEFT_OUT, LEFT_OUT),
    ("._note.txt", b"\0\5\x16\7", LEFT_OUT, LEFT_OUT),
    (".DS_Store", b"\0\0\0\1Bud1", LEFT_OUT, LEFT_OUT),
    ("Thumbs.db", b"\xd0\xcf\x11\xe0", LEFT_OUT, LEFT_OUT),
    ("~$letter.docx", b"\5Anna", LEFT_OUT, LEFT_OUT),
    ("note.txt~", b"yesterday's", LEFT_OUT, LEFT_OUT),
    ("note.txt.part", b"half of", LEFT_OUT, LEFT_OUT),
    ("__MACOSX/note.txt", b"left behind", LEFT_OUT, LEFT_OUT),
    (".ipynb_checkpoints/note-checkpoint.txt", b"a draft", LEFT_OUT, LEFT_OUT),
    ("__pycache__/a.cpython-311.pyc", b"\xa7\r\r\n", LEFT_OUT, LEFT_OUT),
]  # fmt: skip
CONTENT = {name: content for name, content, _, _ in CASES}


def written(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT[name])
    return path


def files(folder: Path) -> list[Path]:
    """Every file below, hidden ones and links too, in the order of folders' contents."""
    found = (Path(top) / name for top, _, names in os.walk(folder) for name in names)
    return sorted(found, key=lambda path: path.parts)


def named(folder: Path) -> Iterator[tuple[str, ...]]:
    """The ways to name all that is in a folder."""
    yield (str(folder),)
    yield (str(folder / "*"),)
    yield (str(folder / "**" / "*"),)
    yield tuple(map(str, files(folder)))


def outcome(paths: tuple[str, ...], encoder_type: str) -> Corpus | list[str]:
    """The corpus, or all lines of its refusal without the paths that were named."""
    try:
        return load_corpus(CorpusConfig(type=encoder_type, path=paths, held_out=0, validation=0))
    except FilesRefused as error:
        assert all("\n" not in line for line in error.lines)
        return [re.sub(r".* (?=holds no samples)", "", line) for line in error.lines]


def comparable(found: Corpus | list[str]) -> object:
    if isinstance(found, list):
        return sorted(found)
    samples = [sample if isinstance(sample, str) else sample.tobytes() for sample in found.train]
    return samples, found.train_labels, found.sources.kinds, sorted(found.sources.left_out, key=str)


@pytest.mark.parametrize("encoder_type", ["text", "image"])
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_every_kind_is_read_left_out_or_refused_by_name_however_it_is_named(
    tmp_path: Path, case: tuple[str, bytes, int | str, int | str], encoder_type: str
) -> None:
    name, expected = case[0], case[2] if encoder_type == "text" else case[3]
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    written(alone, name)
    written(beside, name)
    written(beside, good := "zz.md" if encoder_type == "text" else "zz.png")
    for paths in (*named(alone), *named(beside)):
        found = outcome(paths, encoder_type)
        others = 1 if str(beside) in paths[0] else 0
        if isinstance(expected, int):
            assert isinstance(found, Corpus), found
            assert len(found.train) == expected + others and found.sources.left_out == ()
        elif expected != LEFT_OUT:
            assert isinstance(found, list), found
            [line] = found
            assert expected in line and Path(name).name in line and "; " in line, line
        elif others:
            assert isinstance(found, Corpus), found
            assert len(found.train) == 1
            assert [left.path for left in found.sources.left_out] == [beside / Path(name).parts[0]]
        else:
            assert isinstance(found, list), found
            [line] = found
            assert line.startswith(f"holds no samples of type {encoder_type}, but what is left out: "), line
            assert Path(name).parts[0] in line
    assert good in {path.name for path in files(beside)}


CONTENT |= {"zz.md": b"one good text", "zz.png": PNG}


def test_no_kind_is_missing_here_or_in_the_table_of_the_documents(tmp_path: Path) -> None:
    met = set()
    for name in CONTENT:
        met.add(kind_of(written(tmp_path, name), "no type"))
    assert met == set(KINDS)
    rows = [row.split("|")[1:-1] for row in PAGE.splitlines() if row.startswith("| ")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    for kind in KINDS:
        suffixes, text, image = table[kind.many][:3]
        assert set(re.findall(r"`(\.\w+)`", suffixes)) == kind.suffixes, kind.many
        for encoder_type, said in (("text", text), ("image", image)):
            refused = "refused" if encoder_type in kind.refused_for else LEFT_OUT
            assert said == ("read" if kind.read_as == encoder_type else refused), (kind.many, encoder_type)


PLACES = ["", "sub", "sub/deeper", "sub.d", "__MACOSX", "a/.ipynb_checkpoints"]


@settings(max_examples=40, deadline=None)
@given(
    placed=st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(sorted(CONTENT))), min_size=1, max_size=6),
    linked=st.booleans(),
    encoder_type=st.sampled_from(["text", "image"]),
)
def test_a_glob_a_folder_and_its_paths_have_one_answer(
    placed: list[tuple[str, str]], linked: bool, encoder_type: str
) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "corpus"
        for place, name in placed:
            written(folder / place, name)
        if linked:
            first = files(folder)[0]
            (folder / f"zz{first.suffix}").symlink_to(first)  # the same file by another name
            for circle in ("back", "again"):
                (folder / circle).symlink_to(folder)
        answers = [comparable(outcome(paths, encoder_type)) for paths in named(folder)]
    assert all(answer == answers[0] for answer in answers)


def test_what_is_written_out_is_meant_although_it_is_hidden(tmp_path: Path) -> None:
    hidden = tmp_path / ".cache" / "notes"
    written(hidden, "note.txt")
    for path in (hidden, hidden / "note.txt", hidden / "*.txt", tmp_path / ".cache"):
        assert len(load_corpus(CorpusConfig(path=str(path), held_out=0)).train) == 2
    (tmp_path / "b.txt").write_text("b")
    for path in (tmp_path, tmp_path / "**" / "*.txt"):
        corpus = load_corpus(CorpusConfig(path=str(path), held_out=0))
        assert corpus.train == ["b"] and [left.name for left in corpus.sources.left_out] == [".cache"]


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for name, said in [("pipe", "is a pipe or a device"), ("nowhere", "is a link to nothing"), ("self", "nothing")]:
        place = tmp_path / name
        if name == "pipe":
            os.mkfifo(place)
        else:
            place.symlink_to(tmp_path / ("absent" if name == "nowhere" else name))
        for paths in ((str(tmp_path),), (str(place),), (str(tmp_path / "*"),)):
            [line] = outcome(paths, "text")
            assert name in line and said in line
        place.unlink()


def test_names_of_files_stay_in_one_line(tmp_path: Path) -> None:
    broken = Path(os.fsdecode(os.fsencode(tmp_path) + b"/new\nline \xff.txt"))
    broken.write_bytes(b"\xff")
    [line] = outcome((str(tmp_path),), "text")
    line.encode()
    assert r"new\nline \xff.txt is not UTF-8" in line


def test_all_broken_files_of_a_start_are_listed_ten_by_name(tmp_path: Path) -> None:
    for i in range(13):
        (tmp_path / f"{i:02}.txt").write_bytes(b"\xff")
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / "held").mkdir()
    written(tmp_path / "held", "scan.pdf")
    pictures = tmp_path / "pictures"
    written(pictures, "torn.png")
    node = NodeConfig(
        corpus=[
            CorpusConfig(path=(str(tmp_path / "*.txt"),), test_path=(str(tmp_path / "held"),)),
            CorpusConfig(type="image", path=(str(pictures),)),
        ]
    )
    with pytest.raises(FilesRefused) as caught:
        load_corpora("clinic", node)
    assert len(caught.value.lines) == 15
    assert "scan.pdf" in caught.value.lines[13] and "torn.png" in caught.value.lines[14], "of all corpora"
    header, *lines, last = str(caught.value).splitlines()
    assert header == "15 things are wrong with the samples:" and last == "  and 5 more"
    assert [line.partition(" is ")[0] for line in lines] == [f"  {tmp_path / f'{i:02}.txt'}" for i in range(10)]
    with pytest.raises(FilesRefused) as single:
        load_corpora("clinic", NodeConfig(corpus=[CorpusConfig(type="image", path=(str(pictures),))]))
    assert str(single.value) == single.value.lines[0], "one is one line, as every error"


def test_blank_rows_and_empty_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": " "}\n{"text": ""}\n')
    (tmp_path / "b.txt").write_text(" \n")
    corpus = load_corpus(CorpusConfig(path=str(tmp_path), held_out=0))
    assert corpus.train == ["x"]
    assert [(left.name, left.why) for left in corpus.sources.left_out] == [
        ("2 in a.jsonl", "rows without text"),
        ("b.txt", "empty"),
    ]
