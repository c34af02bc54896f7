"""Where two logs part: found at the first row, decision and version, whatever comes after."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.simulate import run_simulation
from master_service.history.difference import Difference, difference
from master_service.log.jsonl import export_log, opened

ORDINARY: dict[str, Any] = {
    "rule": "fedbuff",
    "changes": (),
    "nodes": 4,
    "returns": 4,
    "speeds": "1,2",
    "steps": 5,
    "parameters": 16,
    "link": "10MB",
    "late": 0.0,
    "leave": 0.0,
    "crash": 0.0,
    "crash_master": False,
    "seed": 3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "log"
    run_simulation(out, **ORDINARY)
    return out


def between(first: Path, second: Path) -> Difference:
    with opened(first) as one, opened(second) as other:
        return difference(one, other)


def cut(run: Path, to: Path, before: int) -> Path:
    with opened(run) as log:
        export_log(log, to, up_to=before - 1)
    return to


def test_a_log_is_the_same_as_itself_and_as_a_run_that_went_alike(run: Path, tmp_path: Path) -> None:
    found = between(run, run)
    assert found.same and found.rows > 20 and found.decisions > 10
    run_simulation(tmp_path / "again", **ORDINARY)
    assert between(run, tmp_path / "again") == found


@pytest.mark.parametrize("before", [1, 9, 25])
def test_one_that_ends_sooner_parts_where_it_ends(run: Path, tmp_path: Path, before: int) -> None:
    part = cut(run, tmp_path / "part.jsonl", before)
    found, whole = between(part, run), between(run, run)
    assert found.rows == before and found.row is not None
    assert (found.row.first, found.row.offset) == (None, before) and found.row.second is not None
    assert found.decision is not None and found.decision.first is None
    assert found.decisions == found.decision.number < whole.decisions
    assert all(each.first is None and each.second for each in found.versions)


def test_another_setting_is_found_with_its_name_and_with_the_first_version_that_it_changed(
    run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    run_simulation(other, **{**ORDINARY, "changes": ("outer.lr=0.5",)})
    found = between(run, other)
    assert found.row is not None and found.row.offset == 0
    assert found.row.fields == {"body.settings.rule.outer.lr": (1.0, 0.5)}
    [version] = found.versions
    assert version.version == 1 and version.first != version.second and None not in (version.first, version.second)


def test_a_row_that_was_written_over_is_where_they_part(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    run_simulation(changed, **ORDINARY)
    with closing(sqlite3.connect(changed / "ledger.sqlite")) as ledger:
        offset = ledger.execute("SELECT max(offset) FROM entries WHERE kind = 'update'").fetchone()[0]
        ledger.execute("UPDATE entries SET body = json_set(body, '$.steps', 77) WHERE offset = ?", (offset,))
        ledger.commit()
    with opened(run) as one, opened(changed) as other:
        rows = [(a.offset, a.body != b.body) for a, b in zip(one.rows(), other.rows(), strict=True)]
    assert [at for at, differs in rows if differs] == [offset]
    done = CliRunner().invoke(app, ["log", "diff", str(run), str(changed)])
    assert done.exit_code != 0


def test_what_the_command_says(run: Path, tmp_path: Path) -> None:
    part = cut(run, tmp_path / "part.jsonl.gz", 12)
    same = CliRunner().invoke(app, ["log", "diff", str(run), str(run)])
    assert same.exit_code == 0 and same.output.startswith("the same: ")
    parted = CliRunner().invoke(app, ["log", "diff", str(part), str(run)])
    assert parted.exit_code == 1
    assert "rows: 12 are the same; then, at offset 12," in parted.output and "A has no more rows" in parted.output
    found = json.loads(CliRunner().invoke(app, ["log", "diff", str(part), str(run), "--json"]).output)
    assert found["same"] is False and found["rows"] == 12 and found["row"]["first"] is None
