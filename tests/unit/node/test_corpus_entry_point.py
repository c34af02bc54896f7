"""Samples from a function of their owner: what is taken, and the one line for everything that is not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from common.errors import OwnersCodeError, UserError
from deploy.cli import guarded
from deploy.commands.run import load_corpora
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus, CorpusConfig, load_corpus

_numbers = itertools.count()

#: A function's body -> what is said of it, for samples of type text.
WRONG_TEXTS = {
    "raise ValueError('no route to\\nthe database')": "raised ValueError: no route to (",
    "raise SystemExit(3)": "raised SystemExit: 3 (",
    "yield 'a'; yield 1 / 0": "raised ZeroDivisionError: division by zero (",
    "return": "gave None where its samples should be",
    "return 'one text'": "gave something of type str where its samples should be",
    "return b'bytes'": "gave something of type bytes where",
    "return {'a': 1}": "gave something of type dict where",
    "return 7": "gave something of type int where",
    "return ('a', 'b')": "gave something of type str where",
    "return ['a', 'b'], 'xy'": "gave something of type str where its labels should be",
    "return []": "gave no samples",
    "return iter(())": "gave no samples",
    "return ['a', 'b'], [1]": "gave 2 samples and 1 labels",
    "return ['a', None, 'c', 7]": "sample 1 is None, not str",
    "return ['a', {'text': 'b'}]": "sample 1 is of type dict, not str",
    "return [['a', 'b'], 'c']": "sample 0 is of type list, not str",
    "return ['a', b'b']": "sample 1 is of type bytes, not str",
    "return (('a', 1), ('b', 2), ('c', 3))": "sample 0 is of type tuple, not str",
    "return ['a', 'b' + chr(0xD83D) + 'c']": r"sample 1: character 1 of the text is '\ud83d'",
}

WRONG_IMAGES = {
    "return [np.zeros((4, 4), np.uint8), None]": "sample 1 is None, not an image",
    "return [np.zeros((4, 4), np.uint8), {}]": "sample 1 is of type dict, not an image",
    "return [np.zeros((4, 4), np.uint8), 'a.png']": "sample 1 is of type str, not an image",
    "return [[[1, 2], [3]], [[1, 2], [3, 4]]]": "sample 0 is of type list, not an image",
    "return [np.zeros((4, 4)), np.zeros((4, 5))]": "sample 1 has shape (4, 5) and sample 0 (4, 4)",
    "return [np.zeros((4, 4)), np.zeros(4)]": "sample 1 is of type ndarray, not an image",
    "return np.zeros((4, 4))": "holds no images: its array has shape (4, 4)",
    "return np.full((3, 4, 4), 300)": "holds int64 values from 300 to 300",
    "return np.full((3, 4, 4), np.nan)": "holds float64 values from nan to nan",
    "return np.array([['a']])": "holds no images",
    "return np.array(3)": "gave something of type ndarray where its samples should be",
}


@pytest.fixture
def owners(tmp_path: Path) -> Callable[..., str]:
    """Writes a module with a function of this body into a folder, by default that of the configuration."""

    def write(body: str, folder: Path = tmp_path, head: str = "import numpy as np") -> str:
        module = f"owners_module_{next(_numbers)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{module}.py").write_text(f"{head}\n\ndef load():\n    {body}\n")
        return f"{module}:load"

    return write


@pytest.fixture(autouse=True)
def _path_is_as_before() -> Any:
    before = list(sys.path)
    yield
    assert sys.path == before


def taken(name: str, beside: Path | None, **settings: Any) -> Corpus:
    return load_corpus(CorpusConfig(entry_point=name, **{"held_out": 0, **settings}), beside=beside)


def refusal(name: str, beside: Path | None = None, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        taken(name, beside, **settings)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"entry_point {name!r}")
    assert guarded(lambda: taken(name, beside, **settings)) == 2
    return line


@pytest.mark.parametrize(("body", "said"), WRONG_TEXTS.items(), ids=list(WRONG_TEXTS))
def test_f18_wrong_texts_are_refused_at_the_start(
    body: str, said: str, tmp_path: Path, owners: Callable[..., str]
) -> None:
    assert said in refusal(owners(body), tmp_path)


@pytest.mark.parametrize(("body", "said"), WRONG_IMAGES.items(), ids=list(WRONG_IMAGES))
def test_f18_wrong_images_are_refused_at_the_start(
    body: str, said: str, tmp_path: Path, owners: Callable[..., str]
) -> None:
    assert said in refusal(owners(body), tmp_path, type="image")


def test_f18_the_owners_traceback_is_kept_at_level_debug(tmp_path: Path, owners: Callable[..., str]) -> None:
    name = owners("raise ValueError('wrong password')")
    with capture_logs() as logs, pytest.raises(OwnersCodeError, match="raised ValueError: wrong password"):
        taken(name, tmp_path)
    assert [(row["log_level"], type(row["exc_info"])) for row in logs] == [("debug", ValueError)]


@pytest.mark.parametrize(
    "body",
    [
        "return ['a', 'b', 'c']",
        "yield from 'abc'",
        "return ('a', 'b', 'c')",
        "return np.array(['a', 'b', 'c'])",
        "return np.array(['a', 'b', 'c'], dtype=object)",
        "return {'a': 1, 'b': 2, 'c': 3}.keys()",
        "return (s for s in 'abc'), map(int, '122')",
        "return type('Old', (), {'__len__': lambda s: 3, '__getitem__': lambda s, i: 'abc'[i % 3]})()",
    ],
)
def test_f18_any_iterable_of_texts_is_taken(body: str, tmp_path: Path, owners: Callable[..., str]) -> None:
    corpus = taken(owners(body), tmp_path)
    assert corpus.train == ["a", "b", "c"] and {type(text) for text in corpus.train} == {str}
    assert corpus.train_labels == (["1", "2", "2"] if "map" in body else None)


@pytest.mark.parametrize(
    "body",
    [
        "return np.full((3, 4, 4), 51, np.uint8)",
        "return [np.full((4, 4), 51, np.uint8)] * 3",
        "yield from [np.full((4, 4), 0.2)] * 3",
        "return [[[51] * 4] * 4] * 3",
        "from PIL import Image; return [Image.new('L', (4, 4), 51)] * 3",
        "import torch; return torch.full((3, 4, 4), 51, dtype=torch.uint8)",
    ],
)
def test_f18_whatever_makes_a_uint8_array_is_taken(body: str, tmp_path: Path, owners: Callable[..., str]) -> None:
    train = taken(owners(body), tmp_path, type="image").train
    assert isinstance(train, np.ndarray) and train.dtype == np.uint8
    assert np.array_equal(train, np.full((3, 4, 4), 51, np.uint8))


def test_f18_samples_of_other_types_are_that_types_business(tmp_path: Path, owners: Callable[..., str]) -> None:
    bare = taken(owners("return [[1.0, 2.0], [3.0, 4.0]]"), tmp_path, type="timeseries", held_out=0.1)
    assert len(bare.train) == len(bare.test) == 1
    assert taken(owners("yield None; yield {}"), tmp_path, type="timeseries").train == [None, {}]
    array = taken(owners("return np.ones((5, 3))"), tmp_path, type="timeseries").train
    assert isinstance(array, np.ndarray) and array.shape == (5, 3)
    assert "gave no samples" in refusal(owners("return iter([])"), tmp_path, type="timeseries")
    assert "gave None" in refusal(owners("return None"), tmp_path, type="timeseries")


@pytest.mark.parametrize("name", ["no_colon", "mod:", ":load", "src/mod:load", "a.b:", "..mod:load", "mod:a.b"])
def test_a_name_that_names_no_function(name: str) -> None:
    assert "write it as module:function" in refusal(name)


def test_f18_the_module_is_found_beside_the_configuration_and_in_the_current_folder(
    tmp_path: Path, owners: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "conf", tmp_path / "here"
    helped = owners("return WORDS", beside, head="from words_of_the_owner import WORDS")
    (beside / "words_of_the_owner.py").write_text("WORDS = ['a', 'b']\n")
    local = owners("from late_words import WORDS; return WORDS", here)
    (here / "late_words.py").write_text("WORDS = ['c']\n")
    monkeypatch.chdir(here)
    file = beside / "run.toml"
    for name, texts in ((helped, ["a", "b"]), (local, ["c"])):
        node = NodeConfig(corpus=[CorpusConfig(entry_point=name, held_out=0)])
        assert load_corpora("clinic", node, file)["text"].train == texts
    assert taken(owners("return ['d']", here), None).train == ["d"], "without a configuration file too"
    (here / "notes.txt").write_text("one\n\ntwo")
    node = NodeConfig(corpus=[CorpusConfig(path=("notes.txt",), held_out=0)])
    assert load_corpora("clinic", node, file)["text"].train == ["one", "two"], "paths start at the current folder"


def test_f18_a_module_in_a_folder_that_is_not_searched(tmp_path: Path, owners: Callable[..., str]) -> None:
    name = owners("return ['a']", tmp_path / "src")
    line = refusal(name, tmp_path)
    assert f"{tmp_path / 'src' / name.partition(':')[0]}.py is in a folder that is not searched" in line
    assert f"PYTHONPATH={tmp_path / 'src'}" in line
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "helper_of_owner.py").write_text("")
    line = refusal(owners("return ['a']", head="import helper_of_owner"), tmp_path)
    assert f"{tmp_path / 'lib' / 'helper_of_owner.py'} is in a folder that is not searched" in line
    line = refusal("nowhere_at_all:load", tmp_path)
    assert f"there is no module 'nowhere_at_all' in {tmp_path}, {Path.cwd()}, nor an installed one; put it" in line


@pytest.mark.parametrize("top", ["common", "deploy", "master_service", "node_service", "tests"])
def test_f18_a_package_of_ours_in_the_way_of_the_owners(top: str, tmp_path: Path, owners: Callable[..., str]) -> None:
    (tmp_path / f"{top}.py").write_text("def load():\n    return ['a']\n")
    said = f"the name {top!r} is taken by {Path.cwd() / top / '__init__.py'}, so your {tmp_path / top}.py is not found"
    for name in (
        f"{top}:load",
        owners("return ['a']", head=f"from {top} import load as mine"),
        owners("return ['a']", head=f"import {top}\n{top}.load()"),
    ):
        line = refusal(name, tmp_path)
        assert said in line and line.endswith("rename yours")
    folder = tmp_path / "other" / top
    folder.mkdir(parents=True)
    (folder / "data.py").write_text("def load():\n    return ['a']\n")
    line = refusal(f"{top}.data:load", tmp_path / "other")
    assert f"so your {folder} is not found; rename yours" in line


def test_f18_whatever_the_owners_module_raises_at_its_import(tmp_path: Path, owners: Callable[..., str]) -> None:
    for head, said in [
        ("raise RuntimeError('no licence\\nat all')", "its module raised RuntimeError: no licence; mend it"),
        ("import sys; sys.exit('usage: load.py FILE')", "its module raised SystemExit: usage: load.py FILE"),
        ("import no_such_library", "raised ModuleNotFoundError: No module named 'no_such_library'; mend it or install"),
        ("def broken(:", "its module raised SyntaxError: "),
    ]:
        assert said in refusal(owners("return ['a']", head=head), tmp_path)


def test_a_function_that_is_not_there_suggests_one_that_is(tmp_path: Path, owners: Callable[..., str]) -> None:
    module = owners("return ['a']", head="number = 7").partition(":")[0]
    assert f"{module}.py has no function 'lod'; did you mean 'load'?" in refusal(f"{module}:lod", tmp_path)
    assert "has no function 'number'; there are: load" in refusal(f"{module}:number", tmp_path)


def test_one_sample_cannot_be_split(tmp_path: Path, owners: Callable[..., str]) -> None:
    name = owners("return ['a']")
    with pytest.raises(UserError, match="one sample cannot be split for the held-out part; give others, or set held_"):
        taken(name, tmp_path, held_out=0.1)
