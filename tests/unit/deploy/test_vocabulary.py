"""`shared-encoder vocabulary`: what it writes is what `encoder.tokenizer` takes; what is wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.encoders.shared_vocabulary import make
from common.errors import UserError
from deploy.commands.vocabulary import write_vocabulary


def test_what_it_writes_is_the_vocabulary_of_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one text of words\n\nanother text of other words\n\n" * 30)
    out = tmp_path / "tokenizer.json"
    write_vocabulary(tmp_path / "texts", 280, out)
    made = make({"tokenizer": str(out)}, 0)
    trained = make({"reference": str(tmp_path / "texts")}, 280)
    assert made.tokenizer.to_str() == trained.tokenizer.to_str() and made.ids == trained.ids
    line = capsys.readouterr().out
    assert f"{made.entries} entries from 60 texts of" in line and "characters a token" in line and str(out) in line


@pytest.mark.parametrize(
    ("reference", "entries", "out", "said"),
    [
        ("absent", 300, "t.json", "does not exist"),
        (".", 300, "t.json", "holds no texts"),
        (".", 100, "t.json", "the special tokens alone are 259"),
        (".", 300, "tokenizer", "is no name of a tokenizer.json"),
        (".", 300, "absent/deeper/t.json/x.json", "holds no texts"),
    ],
)
def test_what_is_wrong(tmp_path: Path, reference: str, entries: int, out: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        write_vocabulary(tmp_path / reference, entries, tmp_path / out)
    assert "\n" not in str(caught.value) and not (tmp_path / out).exists()
