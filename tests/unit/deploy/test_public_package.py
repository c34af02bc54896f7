"""The package `shared_encoder`: its names, its examples, and that a call leaves the caller's process as it was."""

from __future__ import annotations

import doctest
import functools
import inspect
import os
import re
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch

import shared_encoder
from deploy.undisturbed import undisturbed
from master_service.log.message_log import open_log
from shared_encoder import (
    Encoder,
    Federated,
    Log,
    Replayed,
    SharedEncoderError,
    UserError,
    VersionCheck,
    federation,
    load_encoder,
)
from tests.unit.master.test_fold import Federation
from tests.unit.master.test_replay import rewritten

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/python-api.md").read_text()
CORPORA = {
    "north": [f"patient {number} was seen on day {number % 7}" for number in range(60)],
    "south": [f"the dose of day {number % 5} was {number} mg" for number in range(60)],
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
NAMES = [
    *("Encoder", "Federated", "Log", "Refolded", "Replayed", "Row", "SharedEncoderError", "UserError", "VersionCheck"),
    *("attach", "federation", "load_encoder"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Federated:
    return federation(CORPORA, versions=6, out=tmp_path_factory.mktemp("federation") / "run")


@pytest.fixture
def folder(found: Federated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the examples name: an encoder, and a log."""
    monkeypatch.chdir(tmp_path)
    Path("encoder").symlink_to(found.directory / "encoder")
    found.log().export("run.jsonl.gz")
    return tmp_path


# --- names, examples, page -------------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert NAMES == shared_encoder.__all__ == dir(shared_encoder)
    code = "import sys, shared_encoder; print(sorted(name for name in vars(shared_encoder) if name[0] != '_'), "
    code += "[each for each in ('torch', 'numpy', 'pydantic', 'structlog', 'common') if each in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    [names, loaded] = re.findall(r"\[.*?\]", ran.stdout)
    assert loaded == "[]", "importing it costs nothing"
    assert names == "['Any', 'TYPE_CHECKING', 'annotations', 'import_module']", ran.stderr
    files = (ROOT / "deploy/shared_encoder").glob("*.py")
    assert all(file.name.startswith("_") for file in files), "and no module of it is public"
    with pytest.raises(AttributeError, match="it has: Encoder, Federated, Log"):
        shared_encoder.train  # noqa: B018


def test_it_has_one_name_in_a_checkout_too() -> None:
    with pytest.raises(ImportError, match="called shared_encoder"):
        __import__("deploy.shared_encoder")


def public_objects() -> Iterator[tuple[str, Any]]:
    """Every public class, function and method, but those of errors, which have other users."""
    for name in NAMES:
        thing = getattr(shared_encoder, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            assert thing.__doc__, name
            continue
        yield name, thing
        for below, method in vars(thing).items() if inspect.isclass(thing) else ():
            if not below.startswith("_") and (callable(method) or isinstance(method, property | classmethod)):
                yield f"{name}.{below}", method


#: What needs no example of its own: they stand in one of another.
_TOLD = {"Log.close", "Log.encoders", "Row.time", "VersionCheck.identical", "Replayed.identical"}
_TOLD |= {"Replayed.first_different"}


@pytest.mark.parametrize(("name", "thing"), list(public_objects()), ids=[name for name, _ in public_objects()])
def test_every_public_name_has_a_docstring_with_an_example_that_runs(
    name: str, thing: Any, folder: Path, found: Federated
) -> None:
    if isinstance(thing, property | classmethod):
        thing = thing.fget if isinstance(thing, property) else thing.__func__
    assert (thing.__doc__ and "\n" in thing.__doc__) or name in _TOLD, name
    text = inspect.getdoc(thing) or ""
    # the same federation twice is the same: it is trained once
    names = {each: getattr(shared_encoder, each) for each in NAMES} | {"federation": trained_once, "CORPORA": CORPORA}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert test.examples or name in _TOLD, name
    said: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=said.append)
    assert result.failed == 0, "".join(said)


_trained: dict[str, Federated] = {}


@functools.wraps(federation)
def trained_once(corpora: Mapping[str, Any], **options: Any) -> Federated:
    key = repr((corpora, options))
    if key not in _trained:
        _trained[key] = federation(corpora, **options)
    return _trained[key]


@pytest.mark.slow
def test_the_pages_lines_run_as_they_stand(tmp_path: Path) -> None:
    """In a process of their own, as one that copies them would: nothing is printed but what they print."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3 and all(f"`{name}" in PAGE for name in NAMES)
    ran = subprocess.run(
        [sys.executable, "-c", f"{blocks[0]}{blocks[1]}\nprint(encoder, features.shape, early.type, len(losses))"],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    losses, counted, last = ran.stdout.splitlines()
    assert "'north'" in losses and "'south': 0} " in counted
    assert re.fullmatch(r"Encoder\(text: ModernBertForMaskedLM, .*\) \(2, 64\) text 12", last), last
    assert list(tmp_path.iterdir()) == [], "what was not to be kept is gone"


# --- a federation ----------------------------------------------------------------------------------------------------


def test_a_federation_is_the_same_again_and_another_with_another_seed(found: Federated) -> None:
    first, again, other = (federation(CORPORA, versions=2, architecture=SMALL, seed=seed) for seed in (0, 0, 1))
    digests = [each.log().replay().checks[-1].logged for each in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]
    assert (again.before, again.after, again.finished) == (first.before, first.after, first.finished)
    assert all(found.after[node] < found.before[node] for node in CORPORA)


def test_speeds_progress_files_and_settings_are_heeded(tmp_path: Path) -> None:
    file = tmp_path / "south.txt"
    file.write_text("\n\n".join(CORPORA["south"]))
    seen: list[tuple[int, int]] = []
    run = federation(
        {"north": CORPORA["north"], "south": file, "east": CORPORA["north"][:30]},
        versions=8,
        rule="fedasync",
        architecture=SMALL,
        speeds={"north": 40.0},
        settings={"update": {"when": {"steps": 2}}, "encoder": {"tokenizer": "bytes"}},
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(number, 8) for number in range(9)]
    assert run.updates["north"] > run.updates["south"] + run.updates["east"]
    assert {row.body["steps"] for row in run.log().rows(kind="update")} == {2}
    assert run.encoder().model.config.hidden_size == 16
    assert re.search(r"Encoder\(text: ModernBertForMaskedLM, [\d,]+ parameters, \d+ entries\)", repr(run.encoder()))


def test_images_have_no_vocabulary_and_a_trunk_says_what_to_do(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8)
    encoder = federation({"a": images, "b": 255 - images}, versions=2, type="image", architecture=SMALL).encoder()
    assert (encoder.type, encoder.tokenizer) == ("image", None)
    with pytest.raises(UserError, match=r"README\.md says"):
        encoder.features(["a text"])
    run = federation(CORPORA, versions=2, architecture={**SMALL, "shared": "trunk"})
    trunk = run.encoder()
    assert (trunk.type, trunk.tokenizer) == ("text", None)
    with pytest.raises(UserError, match="attach"):
        trunk.features(["a text"])
    node = run.directory / "nodes/north"
    inside = load_encoder(run.directory / "encoder", private=node)
    assert inside.features(["a text"]).shape == (1, 16) and inside.tokenizer is not None
    fitted = shared_encoder.attach(run.directory / "encoder", CORPORA["north"], steps=1, frozen_steps=1, entries=300)
    assert fitted.features(["a text"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("corpora", "options", "words"),
    [
        ({}, {}, "a federation needs a node"),
        ({"a b": CORPORA["north"]}, {}, "node id 'a b'"),
        ({"a": []}, {}, "the corpus of 'a' is empty"),
        ({"a": ["one", "one"]}, {}, "the corpus of 'a' has no two samples that differ"),
        ({"a": ["one", 2]}, {}, "the corpus of 'a': sample 1 is of type int, not str"),
        ({"a": "none/*.txt"}, {}, "none/*.txt"),
        (CORPORA, {"type": "txt"}, "did you mean 'text'?"),
        (CORPORA, {"versions": 0}, "stop.versions"),
        (CORPORA, {"rule": "fedprox"}, "no aggregation rule 'fedprox'"),
        (CORPORA, {"architecture": {"hidden": 1}}, "did you mean 'hidden_size'?"),
        (CORPORA, {"settings": {"updates": {"wait": True}}}, "did you mean 'update'?"),
        (CORPORA, {"settings": {"nodes": {"west": {"seed": 1}}}}, "settings.nodes names 'west'"),
        (CORPORA, {"speeds": {"west": 1.0}}, "speeds: 'west'"),
        (CORPORA, {"speeds": {"north": 0.0}}, "steps a second above 0"),
        (CORPORA, {"out": "."}, ". is not empty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_serve_is_a_user_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpora: Any, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "mine").touch()
    with pytest.raises(UserError) as raised:
        federation(corpora, **options)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- a log -----------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_ledger_and_filters_add_up(found: Federated, monkeypatch: pytest.MonkeyPatch) -> None:
    # private: a log of so few rows has one page alone
    monkeypatch.setattr("shared_encoder._log._PAGE", 7)
    with found.log() as log:
        rows = list(log.rows())
        ledger = open_log(found.directory / "master", read_only=True)
        assert [(row.offset, row.kind, row.payload) for row in rows] == [
            (row.offset, row.kind, row.payload) for row in ledger.rows()
        ]
        ledger.close()
        updates = [row for row in rows if row.kind == "update" and row.sender == "north" and 9 < row.offset < 30]
        assert list(log.rows(kind="update", sender="north", after=9, before=30)) == updates and len(updates) > 1
        assert all(row.facts is not None and row.facts["finite"] and row.time.year == 1970 for row in updates)
        assert not list(log.rows(encoder="text-none"))
        for kind in ("updates", "Update"):  # at the call, and not when the first row is asked for
            with pytest.raises(UserError, match="did you mean 'update'"):
                log.rows(kind=kind)


def test_a_master_that_runs_there_is_not_held_up(run: Federation) -> None:
    """Its ledger is open for writing. Somebody stands in the middle of the rows, and what a reader may hold up goes on:
    the write-ahead log is emptied."""
    with Log.open(run.directory) as log:
        rows = log.rows()
        first = next(rows)
        before = log.replay()
        db = sqlite3.connect(run.directory / "ledger.sqlite", timeout=0.5)
        busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        db.close()
        assert first.offset == 0 and before.identical and busy == 0
        assert [row.offset for row in rows] == list(range(1, run.log.last_offset + 1))


def test_a_version_that_is_not_what_was_published_is_found(run: Federation, tmp_path: Path) -> None:
    def forged(body: Any) -> Any:
        return body.model_copy(update={"digest": "3" * 64}) if getattr(body, "version", 0) == 3 else body

    rewritten(run.log, tmp_path / "forged", lambda body: forged(body) if body.kind == "versioned" else body)
    replayed = Log.open(tmp_path / "forged").replay()
    assert not replayed.identical and replayed.first_different is not None
    assert (replayed.first_different.version, replayed.first_different.logged) == (3, "3" * 64)
    assert re.fullmatch(
        rf"Replayed\({run.state.version + 1} versions, version 3 of {run.encoder} published as 3{{16}}…, computed as "
        r"[0-9a-f]{16}…\)",
        repr(replayed),
    )
    same, other = VersionCheck("text-1", 0, "a", "a"), VersionCheck("text-1", 1, "a", "b")
    for checks, identical in {(): False, (same,): True, (same, other): False}.items():
        assert Replayed(checks, "").identical is identical, "a log without a version proves nothing"


def test_another_rule_fewer_nodes_and_any_version(found: Federated, tmp_path: Path) -> None:
    log = found.log()
    same, south = log.refold(), log.refold(without=["south"], rule="fedasync")
    assert (same.version, same.distance, same.counted) == (found.version, 0.0, found.updates)
    assert south.counted == {"north": 6, "south": 0} and south.weights["north"] > 0 and south.distance > 0
    other = south.encoder(out=tmp_path / "other")
    assert "without a node" in (tmp_path / "other/README.md").read_text(), "who was left out is not named in a card"
    half = log.refold(changes={"outer.lr": 0.5})
    assert half.distance > 0 and half.version == found.version
    published, first = log.encoder(), log.encoder(found.id, version=1, out=tmp_path / "first")
    texts = ["patient 3 was seen", "12 mg"]
    exported = found.encoder().features(texts)
    assert np.array_equal(published.features(texts), exported) and np.array_equal(
        same.encoder().features(texts), exported
    )
    assert not np.array_equal(first.features(texts), exported) and not np.array_equal(other.features(texts), exported)
    assert "version 1," in (tmp_path / "first/README.md").read_text()
    assert np.array_equal(load_encoder(tmp_path / "first").features(texts), first.features(texts))


def test_features_do_not_depend_on_their_neighbours(found: Federated) -> None:
    encoder = found.encoder()
    texts = [" ".join(["patient"] * number) for number in range(1, 40)]
    together, alone = encoder.features(texts), np.concatenate([encoder.features([text]) for text in texts])
    assert together.shape == (39, 64) and together.dtype == np.float32 and np.allclose(together, alone, atol=1e-5)
    assert np.array_equal(encoder.features(texts[-1:], max_tokens=8), encoder.features(texts[-2:-1], max_tokens=8))
    assert encoder.features([]).shape == (0, 64)


ERRORS: dict[str, Callable[[Log, Federated], object]] = {
    "no message log in none; give": lambda log, found: Log.open("none"),
    "of no aggregators": lambda log, found: Log.open(found.directory / "master", aggregators=["x"]),
    "no encoder x is in the log; there are: text-": lambda log, found: log.replay("x"),
    "version 99 of text-": lambda log, found: log.encoder(version=99),
    "no node 'west' is in the log; there are: north, south": lambda log, found: log.refold(without=["west"]),
    "without all of its nodes": lambda log, found: log.refold(without=["north", "south"]),
    "changes: there is no setting 'outer.lrr'; did you mean 'lr'?": lambda log, found: log.refold(
        changes={"outer.lrr": 1}
    ),
    "changes: 'lr' is no number of a rule": lambda log, found: log.refold(changes={"lr": 1}),
    "mine holds something else than an exported encoder": lambda log, found: log.encoder(out="mine"),
    "mine/notes.txt is there and is no exported message log": lambda log, found: log.export("mine/notes.txt"),
    "mine is no exported encoder": lambda log, found: load_encoder("mine"),
    "mine holds no private parts": lambda log, found: load_encoder(found.directory / "encoder", "mine"),
    "no node 'west' took part": lambda log, found: found.encoder("west"),
    "this log is closed": lambda log, found: (log.close(), log.replay()),
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_are_one_line_that_says_how_to_mend_it(
    found: Federated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(UserError) as raised:
        ERRORS[words](found.log(), found)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert issubclass(UserError, SharedEncoderError) and Path("mine/notes.txt").read_text() == "mine"


# --- the caller's process --------------------------------------------------------------------------------------------


def test_a_call_leaves_the_callers_process_as_it_was(
    found: Federated, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    mine = [structlog.processors.JSONRenderer()]
    structlog.configure(processors=mine)
    before = structlog.get_config()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log = found.log()
            log.replay()
            log.encoder(version=2).features(["a text"])
            with pytest.raises(UserError):
                federation(CORPORA, architecture={"hidden": 1})
            federation(CORPORA, versions=1, architecture=SMALL)
        assert torch.get_num_threads() == 2 and structlog.get_config() == before
        assert capfd.readouterr() == ("", "") and not recwarn.list
    finally:
        torch.set_num_threads(threads)
    structlog.reset_defaults()
    with undisturbed():
        assert structlog.is_configured() and torch.get_num_threads() == 1
    assert not structlog.is_configured()


def test_an_encoder_says_what_it_is_in_a_line(found: Federated) -> None:
    assert isinstance(found.encoder("south"), Encoder) and repr(found.encoder()).count("\n") == 0
    assert repr(found).startswith(f"Federated({found.id} version 6; held-out loss north ")
