"""A snapshot is whole or is not used."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.clock import VirtualClock
from common.workers import Worker
from master_service.config import MasterConfig
from master_service.decisions.records import Tick
from master_service.history.snapshot import SnapshotDirectory, read_snapshot, whole_snapshots
from master_service.history.state_directory import Background, Journal
from master_service.log.deadly import MemoryMark
from master_service.log.room import Room
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
    assert problem == "another release has written it (state schema 1, not 3)"


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


def test_a_snapshot_is_of_the_moment_in_which_it_was_taken_whatever_goes_on(tmp_path: Path) -> None:
    """A step waits until the operating system has the targets, and for no longer."""
    run = Federation(tmp_path, "diloco", size=3000)
    for sequence, node in enumerate("abc"):
        run.update(node, sequence)
    taken_at, before = run.fold.offset, run.fold.coordinator.state.model_dump_json()
    version, digest = run.state.version, run.fold.arithmetic.digest(run.encoder)
    taken = SnapshotDirectory(run.log).take(run.fold, run.log.checksum(taken_at) or "")
    run.update("a", 3)
    run.update("b", 4)
    last = Worker("deciding", lambda: run.update("c", 5), failed=lambda error: None)
    assert not last.join(0.3), "it steps"
    synced: list[bool] = []
    with mock.patch("master_service.history.snapshot.sync", lambda path: synced.append(last.join(5.0))):
        taken.write()
    assert synced and all(synced), "nobody waits for the disk"
    assert run.state.version == version + 1 and run.fold.arithmetic.digest(run.encoder) != digest
    fold = read_snapshot(tmp_path / "snapshots", run.log)
    assert fold.offset == taken_at and fold.coordinator.state.model_dump_json() == before
    assert fold.arithmetic.digest(run.encoder) == digest
    for entry in run.log.entries(taken_at):
        fold.apply(entry)
    assert fold.arithmetic.digest(run.encoder) == run.fold.arithmetic.digest(run.encoder), (
        "and the log leads on from it"
    )


def journal_of(
    run: Federation, clock: VirtualClock, background: Background, free: Callable[[], int] = lambda: 1 << 60
) -> Journal:
    """A journal that goes on with a federation's log; `free`: bytes on its disk."""
    config, room = MasterConfig(state_dir=run.directory), Room(run.directory, free, 1)
    return Journal(run.log, SnapshotDirectory(run.log), MemoryMark(), room, config, clock=clock, background=background)


@pytest.mark.parametrize("free", [0, 1 << 60])
def test_a_snapshot_that_cannot_be_written_holds_nobody_up(tmp_path: Path, free: int) -> None:
    """For want of room, seen before it is written or only then. `free`: bytes, as is said before."""
    run, left = Federation(tmp_path, "fedasync", size=300), [1 << 60]
    journal = journal_of(run, VirtualClock(), lambda name, work: work(), lambda: left[0])
    journal.append(Tick())
    for entry in run.log.entries(journal.fold.offset):
        journal.fold.apply(entry)
    left[0] = free
    with mock.patch("master_service.history.snapshot.save_tensors", side_effect=OSError(errno.ENOSPC, "full")):
        journal.snapshot()
    assert not list((tmp_path / "snapshots").glob("*"))
    stepping = Worker("deciding", lambda: journal.fold.arithmetic.hold()(), failed=lambda error: None)
    assert stepping.join(5.0), "no step gets on any more"
    journal.close()


@pytest.mark.parametrize(("seconds", "after"), [(0.1, 60.0), (4.0, 200.0)])
def test_snapshots_take_a_fiftieth_of_the_time_at_most(tmp_path: Path, seconds: float, after: float) -> None:
    """`seconds` that one takes; `after` so many the next is due."""
    run, clock = Federation(tmp_path, "fedasync", size=300), VirtualClock()
    beside: deque[Callable[[], None]] = deque()
    journal = journal_of(run, clock, lambda name, work: beside.append(work))

    def goes_on() -> None:
        journal.append(Tick())
        for entry in run.log.entries(journal.fold.offset):
            journal.fold.apply(entry)

    goes_on()
    clock.wait(60.0)
    assert journal.snapshot_due(60.0)
    journal.snapshot()
    began = clock.monotonic()
    goes_on()
    assert not journal.snapshot_due(), "while one is being written"
    with mock.patch("master_service.history.snapshot.sync", lambda path: clock.wait(seconds / 5)):
        beside.popleft()()  # four files and folders are synced, and the one above them
    assert clock.monotonic() == pytest.approx(began + seconds)
    clock.time = began + after - 0.5
    assert not journal.snapshot_due(60.0) and journal.snapshot_due(), "at the end of a run it is"
    clock.time = began + after + 0.5
    assert journal.snapshot_due(60.0)
    journal.close()
