"""`corpus check`: what a node would train on, in its words, and exit code 2 where it would refuse to start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from typer.main import get_command

from deploy.cli import app
from deploy.commands.run import load_corpora
from node_service.config import NodeConfig
from node_service.corpus.corpus import CorpusConfig
from tests.unit.deploy.conftest import Command


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "draft.txt").write_text("a deleted draft")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"note {i} of the day{'!' * (i % 3)}")
    (folder / "empty.txt").write_text("")
    (folder / "scan.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


LINE = (
    "text: 60 samples from 61 plain text files; 17 to 20 characters, 19 in the middle; "
    "left out: left by Jupyter (.ipynb_checkpoints), pictures (scan.png), empty (empty.txt)"
)


def test_it_prints_what_there_is_and_what_was_left_out_and_why(notes: Path, command: Command) -> None:
    code, out, _ = command("corpus", "check", notes)
    name, *rows = out.splitlines()
    assert (code, name) == (0, str(notes))
    found = [tuple(row.split(maxsplit=1)) for row in rows if not row.startswith("  left out")]
    assert found[:2] == [("corpus", LINE), ("parts", "48 to train on, 3 by which training is steered, 9 held out")]
    assert [heading for heading, _ in found[2:]] == ["example"] * 3
    assert found[2][1] == "17 characters: note 0 of the day"
    assert [row for row in rows if row.startswith("  left out")] == [
        f"  left out  {notes}/.ipynb_checkpoints: left by Jupyter",
        f"  left out  {notes}/scan.png: pictures",
        f"  left out  {notes}/empty.txt: empty",
    ]


def test_a_node_says_the_first_line_of_it_at_its_start_and_quotes_no_sample(notes: Path) -> None:
    with capture_logs() as logs:
        load_corpora("clinic", NodeConfig(corpus=[CorpusConfig(path=(str(notes),))]))
    assert logs[0]["event"] == LINE and logs[0]["node"] == "clinic"
    assert not any("of the day" in str(row) for row in logs)


def test_it_reads_what_a_file_says_of_its_nodes(
    notes: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "conf" / "run.toml"
    file.parent.mkdir()
    (file.parent / "owners_check_module.py").write_text("def load():\n    yield from ['a', 'bb', 'ccc']\n")
    file.write_text(
        '[nodes.a.corpus]\npath = "notes"\ndocuments = "line"\n'
        '[nodes.b.corpus]\nentry_point = "owners_check_module:load"\nheld_out = 0.4\n'
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("corpus", "check", "--config", file)
    assert code == 0 and [row for row in out.splitlines() if row[0] != " "] == ["nodes.a", "nodes.b"]
    code, out, _ = command("corpus", "check", "--config", file, "--node", "b")
    assert code == 0 and "text: 3 samples from 1 entry point; 1 to 3 characters" in out and "nodes.a" not in out
    for arguments, said in [
        (("--config", file, "--node", "c"), f"{file} has no node 'c'; "),
        (("--config", file, "--label", "x"), "--label is for paths"),
        ((), "nothing to check: give PATH, --entry-point MODULE:FUNCTION, or --config FILE"),
        ((notes, "--node", "a"), "--node is for the corpora of --config"),
        ((notes, "--alpha", "blue"), "corpus check: alpha: input should be 'white' or 'channel'"),
        ((notes, "--entry-point", "a:b"), "corpus check: give either path or entry_point"),
    ]:
        code, out, error = command("corpus", "check", *arguments)
        assert (code, out) == (2, "") and said in error, error


def test_what_a_node_would_refuse_is_all_there_and_what_can_be_read_is_shown(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "run.toml"
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(f"{name} one\n\n{name} two" if name == "b" else '{"text": "rows"}')
    tables = [f'[nodes.{name}.corpus]\npath = "{tmp_path / name}"\n' for name in ("a", "b", "c")]
    file.write_text("".join(tables))
    code, out, error = command("corpus", "check", "--config", file)
    assert code == 2 and "nodes.b" in out and "nodes.a" not in out
    said = error[error.index("shared-encoder: ") :].splitlines()
    assert said[0] == "shared-encoder: 2 things are wrong with the samples:"
    assert [line.partition(" begins with a JSON object")[0] for line in said[1:]] == [
        f"  {tmp_path / 'a'}",
        f"  {tmp_path / 'c'}",
    ]


def test_what_often_is_a_mistake_is_pointed_out(tmp_path: Path, command: Command) -> None:
    rows = ["good", "good", "a NUL \0 here", "a � there"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text, "label": text[0]}) + "\n" for text in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "good", "label": "g"}) + "\n")
    _, out, _ = command("corpus", "check", tmp_path / "a.jsonl", "--test", tmp_path / "test.jsonl")
    assert "  labels    2: g (3), a (2)\n" in out
    for said in (
        "a NUL, which no text needs: in 1 of 5",
        "the sign � of a conversion that went wrong: in 1 of 5",
        "equal to another one: 2 of 5",
        "held out, and trained on too: 1 of 1",
    ):
        assert f"  look at   {said}" in out, out
    assert r"a NUL \x00 here" in out
    np.save(tmp_path / "a.npy", np.eye(4, dtype=np.uint8)[None].repeat(3, axis=0))
    _, out, _ = command("corpus", "check", tmp_path / "a.npy", "--type", "image", "--held-out", "0")
    assert "image: 3 samples from 1 NumPy array; 4 x 4, values from 0 to 1" in out
    assert "look at   no pixel is above 1 of 255" in out and "example   4 x 4, values from 0 to 1, 0.25 in" in out


def test_every_setting_of_a_corpus_is_an_option() -> None:
    options = {
        name.removeprefix("--").replace("-", "_")
        for parameter in get_command(app).commands["corpus"].commands["check"].params  # type: ignore[attr-defined]
        for name in parameter.opts
    }
    named_otherwise = {"path": "paths", "test_path": "test"}
    assert {named_otherwise.get(name, name) for name in CorpusConfig.model_fields} <= options
