"""Corpora: every format, every bad input with its one clear line, and a split that never moves."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from node_service.corpus.corpus import (
    FEWEST_FOR_VALIDATION,
    MOST_VALIDATION,
    Corpus,
    CorpusConfig,
    load_corpus,
    select_corpus,
)

ROWS = [
    {"text": f'sentence number {i}, quoted "so"\nand broken', "label": "odd" if i % 2 else "even"} for i in range(60)
]


def load(path: Path | str, **settings: Any) -> Corpus:
    return load_corpus(CorpusConfig(path=str(path), **{"validation": 0.0, **settings}))


def refusal(path: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows in the format of the path's name."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    quoted = "".join(",".join('"' + str(v).replace('"', '""') + '"' for v in row.values()) + "\n" for row in rows)
    table = "text,label\n" + quoted
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress((lines if ".jsonl" in path.name else table).encode()))
    else:
        path.write_text(lines if path.suffix == ".jsonl" else table, newline="")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet", "A.JSONL.GZ"])
def test_tables_give_the_same_texts_and_labels(tmp_path: Path, name: str) -> None:
    if name.isupper():
        path = write_rows(tmp_path / name.lower()).rename(tmp_path / name)
    else:
        path = write_rows(tmp_path / name)
    corpus = load(path)
    assert corpus.train_labels is not None and corpus.test_labels is not None
    everything = dict(zip([*corpus.train, *corpus.test], [*corpus.train_labels, *corpus.test_labels], strict=True))
    assert everything == {row["text"]: row["label"] for row in ROWS}


def test_split_follows_from_content_alone(tmp_path: Path) -> None:
    first = load(write_rows(tmp_path / "a.jsonl"), held_out=0.3)
    more = [{"text": f"another {i}", "label": "x"} for i in range(40)]
    mixed = load(write_rows(tmp_path / "b.csv", [*more, *reversed(ROWS), ROWS[0]]), held_out=0.3)
    assert 5 <= len(first.test) <= 30
    assert not set(first.train) & set(first.test)
    assert set(first.test) <= set(mixed.test) and set(first.train) <= set(mixed.train)


def test_small_corpora_still_hold_something_out(tmp_path: Path) -> None:
    for count in (2, 3, 5):
        corpus = load(write_rows(tmp_path / f"{count}.jsonl", ROWS[:count]), held_out=0.01)
        assert len(corpus.test) >= 1 and len(corpus.train) >= 1
    assert "one sample cannot be split" in refusal(write_rows(tmp_path / "1.jsonl", ROWS[:1]))
    alone = load(tmp_path / "1.jsonl", held_out=0)
    assert (list(alone.train), list(alone.test)) == ([ROWS[0]["text"]], [])


def test_test_path_is_taken_whole(tmp_path: Path) -> None:
    train, test = write_rows(tmp_path / "train.jsonl", ROWS[:50]), write_rows(tmp_path / "test.csv", ROWS[50:])
    corpus = load(train, test_path=str(test))
    assert len(corpus.train) == 50
    assert list(corpus.test) == [row["text"] for row in ROWS[50:]]
    assert corpus.test_labels == [row["label"] for row in ROWS[50:]]


def test_limit_keeps_a_spread_and_is_repeatable(tmp_path: Path) -> None:
    rows = sorted(ROWS, key=lambda row: row["label"])
    path = write_rows(tmp_path / "a.jsonl", rows)
    corpus = load(path, limit=20, held_out=0)
    assert len(corpus.train) == 20 and set(corpus.train_labels or []) == {"odd", "even"}
    assert load(path, limit=20, held_out=0) == corpus


def test_fields_are_configurable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one", "kind": 3}\n\n{"body": "  ", "kind": 4}\n{"body": "two", "kind": 4}\n')
    corpus = load(path, field="body", label="kind", held_out=0)
    assert (corpus.train, corpus.train_labels) == (["one", "two"], ["3", "4"])
    assert load(path, field="body", held_out=0).train_labels is None


def test_plain_text_documents(tmp_path: Path) -> None:
    one = tmp_path / "book.txt"
    one.write_text("first\nparagraph\n\n \nsecond\n")
    assert [text.strip() for text in load(one, held_out=0).train] == ["first\nparagraph", "second"]
    assert load(one, held_out=0, documents="file").train == ["first\nparagraph\n\n \nsecond\n"]
    assert load(one, held_out=0, documents="line").train == ["first", "paragraph", "second"]
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    for i in range(12):
        (folder / "deep" / f"{i}.py").write_text(f"x = {i}\n\n\ny = 1\n")
    (folder / "__init__.py").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    assert len(load(folder, held_out=0).train) == 12
    assert len(load(folder / "**" / "*.py", held_out=0).train) == 12
    (folder / "server.log").write_text("up\n\ndown\n")
    assert load(folder / "*.log", held_out=0).train == ["up", "down\n"]


def test_paths_start_at_base(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    assert len(load_corpus(CorpusConfig(path="a.jsonl", held_out=0, validation=0), tmp_path).train) == 60
    (tmp_path / "[1].jsonl").write_text('{"text": "brackets"}\n')
    assert load_corpus(CorpusConfig(path="[1].jsonl", held_out=0), tmp_path).train == ["brackets"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": broken}\n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'"text"\n', "a.jsonl line 1 is not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "line 2: no field 'text'; set field to one of 'txt'"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: field 'text' is int, not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "ab\\ud83d"}\n', r"a.jsonl line 2: character 2 of the text is '\ud83d'"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.jsonl.gz", b'{"text": "x"}\n', "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "is not a whole gzip file"),
        ("a.csv", b"text,label\nx\n", "a.csv line 2 has another number of fields"),
        ("a.csv", b"text,label\nx,y,z\n", "a.csv line 2 has another number of fields"),
        ("a.csv", b'text\n"open', "a.csv line 2 is not CSV"),
        ("a.csv", b"words\nx\n", "no field 'text'; set field to one of 'words'"),
        ("a.csv", b"text\n", "a.csv holds no text"),
        ("a.csv", b"text\n\xff\xfe\n", "is not UTF-8"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.parquet", b"PAR1 no", "is not readable as Parquet"),
        ("a.npz", b"PK", "holds no samples of type text"),
        ("a.png", b"\x89PNG", "holds no samples of type text"),
    ],
)
def test_bad_text_input_names_file_line_and_mend(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    assert said in message and name in message
    assert ";" in message, "every refusal ends with the mend"


def test_parquet_of_wrong_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"text": 1, "body": "x"}])
    assert "row 1: field 'text' is int" in refusal(path)
    assert "no field 'words'; set field to one of 'text', 'body'" in refusal(path, field="words")
    assert "no field 'sentiment'" in refusal(path, field="body", label="sentiment")


def test_missing_files_and_types(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.txt")
    assert "no match" in refusal(tmp_path / "*.jsonl")
    assert "holds no samples of type text" in refusal(tmp_path)
    assert "set entry_point instead" in refusal(tmp_path, type="timeseries")
    with pytest.raises(ValueError, match="either path or entry_point"):
        CorpusConfig()
    text = CorpusConfig(path="x")
    assert select_corpus([text], "text") is text
    with pytest.raises(UserError, match="no samples of type image: this node's configuration names text"):
        select_corpus([text], "image")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl")

    def forbidden(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "a.jsonl cannot be read (Permission denied)" in refusal(path)


def test_arrays(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    y = np.arange(40) % 4
    np.savez(tmp_path / "a.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:], classes=np.array(["a"]))
    own = load(tmp_path / "a.npz", type="image")
    assert np.array_equal(own.train, x[:30]) and np.array_equal(own.test, x[30:])
    assert own.train_labels == [str(v) for v in y[:30]] and own.test_labels == [str(v) for v in y[30:]]
    np.save(tmp_path / "b.npy", x[:10] / 255.0)
    scaled = load(tmp_path / "b.npy", type="image", test_path=str(tmp_path / "a.npz"))
    assert np.array_equal(scaled.train, x[:10]) and scaled.train_labels is None
    assert np.array_equal(scaled.test, x[30:])
    np.savez(tmp_path / "c.npz", pixels=x, kinds=y)
    named = load(tmp_path / "c.npz", type="image", field="pixels", label="kinds", held_out=0.25)
    assert isinstance(named.test, np.ndarray) and len(named.train) + len(named.test) == 40
    assert len(named.test_labels or []) == len(named.test) > 0


def test_bad_arrays(tmp_path: Path) -> None:
    def saved(name: str, **arrays: Any) -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    x = np.zeros((4, 5, 5), dtype=np.uint8)
    assert "no array 'x_train'; set field to one of 'pixels'" in refusal(saved("a.npz", pixels=x), type="image")
    assert "holds no images: its array has shape (4, 5)" in refusal(saved("b.npz", x=x[0][:4]), type="image")
    assert "values from -1 to -1" in refusal(saved("c.npz", x=x.astype(int) - 1), type="image")
    assert "one label for each" in refusal(saved("d.npz", x=x, y=np.zeros(3)), type="image")
    assert "is not readable as .npz" in refusal(saved("e.npz", x=np.array([None])), type="image")
    two = (str(saved("f.npz", x=x)), str(saved("g.npz", x=x[:, :4, :4])))
    with pytest.raises(UserError, match=r"g\.npz holds images of shape \(4, 4\)"):
        load_corpus(CorpusConfig(type="image", path=two))
    (tmp_path / "h.npy").write_bytes(b"no array")
    assert "is not readable as .npy" in refusal(tmp_path / "h.npy", type="image")
    assert "holds no samples of type image" in refusal(write_rows(tmp_path / "i.jsonl"), type="image")


def test_picture_folders(tmp_path: Path) -> None:
    for i in range(12):
        path = tmp_path / ("cat" if i % 3 else "dog") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), i * 20).save(path)
    corpus = load(tmp_path, type="image", held_out=0)
    assert corpus.train.shape == (12, 8, 8)  # type: ignore[attr-defined]
    assert corpus.train_labels == ["cat"] * 8 + ["dog"] * 4
    assert load(tmp_path / "cat", type="image", held_out=0).train_labels is None

    Image.new("RGB", (10, 8), (255, 0, 0)).save(tmp_path / "dog" / "wide.jpg")
    assert "wide.jpg is 10x8" in refusal(tmp_path, type="image")
    scaled = load(tmp_path, type="image", image_size=4, held_out=0)
    assert scaled.train.shape == (13, 4, 4, 3)  # type: ignore[attr-defined]
    (tmp_path / "dog" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "torn.png" in refusal(tmp_path, type="image", image_size=4)


def test_a_corpus_is_read_without_torch() -> None:
    code = (
        "import sys, node_service.corpus.corpus, common.encoders; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the validation part ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.sampled_from([f"text {i}" for i in range(60)]), min_size=2, max_size=120),
    share=st.sampled_from([0.0, 0.05, 0.3, 0.9]),
)
def test_the_validation_part_is_whole_documents_taken_out_of_training(texts: list[str], share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": text, "label": text[-1]}) for text in texts))
        whole = load(path, held_out=0)
        corpus = load(path, held_out=0, validation=share)
    assert sorted([*corpus.train, *corpus.validation]) == sorted(whole.train), "nothing is lost, nothing is there twice"
    assert not set(corpus.train) & set(corpus.validation), "not even as an equal text"
    assert corpus.train_labels == [text[-1] for text in corpus.train], "labels go with their samples"
    most = round(share * len(texts))
    assert len(corpus.validation) <= max(1, most)
    if len(texts) < FEWEST_FOR_VALIDATION or share == 0:
        assert not corpus.validation
    elif share == 0.3:
        assert len(corpus.validation) >= most - max(texts.count(text) for text in texts), "as near as documents allow"


def test_the_validation_part_is_the_same_every_time_bounded_and_no_part_of_the_test(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(3 * MOST_VALIDATION)))
    corpus, again = (load(path, validation=0.5) for _ in range(2))
    assert corpus.validation == again.validation and len(corpus.validation) == MOST_VALIDATION
    assert corpus.test == load(path).test and not {*corpus.test} & {*corpus.train, *corpus.validation}
    plain = CorpusConfig(path=(str(path),), held_out=0.1)
    assert len(load_corpus(plain).validation) == round(0.05 * len(load(path).train))


def test_pictures_have_a_validation_part_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.random.default_rng(0).integers(0, 255, (100, 4, 4), dtype=np.uint8))
    corpus = load(tmp_path / "a.npz", type="image", held_out=0.2, validation=0.1)
    rows = len(corpus.train) + len(corpus.validation)
    assert isinstance(corpus.validation, np.ndarray) and corpus.validation.shape == (round(0.1 * rows), 4, 4)
