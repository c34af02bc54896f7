"""A snapshot is whole or is not used."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from master_service.history.snapshot import read_snapshot, whole_snapshots
from tests.unit.master.test_fold import Federation, snapshot


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    """Two snapshots of a federation whose rule has momentum, the newer one with an update in the buffer."""
    directory = tmp_path_factory.mktemp("run")
    run = Federation(directory, "diloco", size=3)
    for sequence, node in enumerate("abc"):
        run.update(node, sequence)
    snapshot(run)
    run.update("a", 3, loss=math.nan)
    snapshot(run)
    return run, directory / "snapshots"


def test_what_is_read_is_what_was_written_and_goes_on_alike(run: tuple[Federation, Path]) -> None:
    federation, snapshots = run
    fold = read_snapshot(snapshots, federation.log)
    assert fold.offset == federation.log.last_offset
    assert fold.coordinator.state.model_dump_json() == federation.fold.coordinator.state.model_dump_json()
    [item] = fold.coordinator.state.encoders[federation.encoder].buffer
    assert math.isnan(item.loss)
    mine, theirs = (f.arithmetic.targets[federation.encoder] for f in (fold, federation.fold))
    assert mine.parameters.digest() == theirs.parameters.digest()
    assert mine.momentum is not None and theirs.momentum is not None and mine.momentum.equal(theirs.momentum)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_of_one_byte_and_no_cut_is_taken_for_a_snapshot(
    run: tuple[Federation, Path], data: st.DataObject, tmp_path: Path
) -> None:
    federation, snapshots = run
    shutil.rmtree(tmp_path)
    shutil.copytree(snapshots, tmp_path)
    older, newest = sorted(tmp_path.iterdir())
    name = data.draw(st.sampled_from(["manifest.json", "state.json", "tensors.safetensors"]))
    content = bytearray((newest / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    (newest / name).write_bytes(content)
    fold = read_snapshot(tmp_path, federation.log)
    if (offset := fold.offset) != int(older.name):  # white space in the manifest may be damaged without harm
        assert name == "manifest.json" and offset == federation.log.last_offset
        state = federation.fold.coordinator.state
        assert fold.coordinator.state.model_dump_json() == state.model_dump_json()


def test_an_offset_that_is_not_its_own_is_damage(run: tuple[Federation, Path], tmp_path: Path) -> None:
    """Folding the log from another offset would count entries twice, or never."""
    federation, snapshots = run
    older, newest = sorted(Path(path) for path in shutil.copytree(snapshots, tmp_path / "copy").iterdir())
    manifest = newest / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"offset": {int(newest.name)}', f'"offset": {int(older.name)}'))
    (older / "state.json").unlink()
    fold = read_snapshot(tmp_path / "copy", federation.log)
    assert fold.offset == -1 and not fold.coordinator.state.encoders


def test_f10_a_snapshot_of_another_release_is_skipped(run: tuple[Federation, Path], tmp_path: Path) -> None:
    federation, snapshots = run
    older, newest = sorted(Path(path) for path in shutil.copytree(snapshots, tmp_path / "copy").iterdir())
    plain = json.loads((newest / "manifest.json").read_text())
    del plain["schema"], plain["seal"]  # as the first release wrote it
    seal = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps({**plain, "seal": seal}))
    assert read_snapshot(tmp_path / "copy", federation.log).offset == int(older.name)
    [_, (_, problem)] = whole_snapshots(tmp_path / "copy", federation.log.payloads)
    assert problem == "another release has written it (state schema 1, not 2)"


def test_what_a_dead_master_left_half_written_pushes_out_no_snapshot(tmp_path: Path) -> None:
    run = Federation(tmp_path, "fedasync", size=3)
    snapshots, offsets = tmp_path / "snapshots", []
    for sequence in range(4):
        run.update("a", sequence)
        offsets.append(run.log.last_offset)
        snapshot(run)
        (snapshots / f"{run.log.last_offset + 1:012d}.part").mkdir()
        assert read_snapshot(snapshots, run.log).offset == run.log.last_offset
    snapshot(run)  # once more at the same offset
    assert sorted(path.name for path in snapshots.iterdir()) == [f"{offset:012d}" for offset in offsets[-2:]]
