"""Replay, other rules, what is damaged, dropped or lost: proved, said, or refused, and never guessed."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.clock import SYSTEM
from common.errors import Damaged
from common.wire.to_master import Stop, UpdateManifest
from master_service.config import MasterConfig
from master_service.decisions.records import (
    Configured,
    Entry,
    Loggable,
    Repaired,
    Skipped,
    StepFailed,
    Tick,
    Versioned,
)
from master_service.decisions.rules.model import AggregationRule, aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.history.audit import examine, issued
from master_service.history.fold import Fold
from master_service.history.repair import repair
from master_service.history.replay import Refold, origin, rebuild, verify
from master_service.history.retention import droppable, prune
from master_service.history.snapshot import kept_snapshots, read_snapshot
from master_service.history.state_directory import Journal, open_journal
from master_service.log.jsonl import export_log, opened
from master_service.log.message_log import MessageLog, open_log
from master_service.log.payload_files import payload_path
from tests.unit.master.test_fold import Federation, checkpoint_wal, snapshot

PLAIN = {"staleness": "constant", "count": "none"}


def trained(directory: Path, preset: str, order: str = "aabcbacbbcaa") -> Federation:
    run = Federation(directory, preset)
    for sequence, node in enumerate(order):
        run.update(node, sequence)
    return run


def same(settings: Settings) -> Settings:
    return settings


def by(rule: AggregationRule) -> Callable[[Settings], Settings]:
    return lambda settings: settings.model_copy(update={"rule": rule})


def decided_anew(run: Federation, change: Callable[[Settings], Settings] | None = None, without: str = "") -> Refold:
    refold = Refold(open_log(run.directory, read_only=True), change, frozenset(without))
    for _ in refold.run():
        pass
    return refold


def replayed(directory: Path) -> Fold:
    """Verified from the log's origin; every version identical."""
    log = open_log(directory, read_only=True)
    fold = origin(log).fold
    assert all(check is None or check.identical for _, check in verify(log, fold))
    return fold


@pytest.mark.parametrize("preset", ["return-count", "fedavg", "fedasync", "fedbuff", "diloco"])
@pytest.mark.parametrize("change", [None, same])
def test_the_logged_rule_comes_to_the_published_bits(
    tmp_path: Path, preset: str, change: Callable[[Settings], Settings] | None
) -> None:
    run = Federation(tmp_path, preset)
    sequence = 0
    for pause in (0.0, 500.0, 30.0):  # within the grace time and beyond it
        for node in "abcab":
            run.update(node, sequence)
            sequence += 1
        run.at += pause
        run.record(Tick())
        run.at += 61.0
        run.update("c", sequence)  # an update may come after the deadline and before the tick
        sequence += 1
        run.record(Tick())
    run.record(Stop(sender="operator"))
    assert run.state.version > 3 and run.state.status == "finished"
    refold = decided_anew(run, change)
    again = refold.fold.coordinator.state.encoders[run.encoder]
    assert (again.version, again.digest, again.members) == (run.state.version, run.state.digest, run.state.members)


def test_a_counterfactual_ends_where_the_training_ended_and_its_grace_times_are_its_own(tmp_path: Path) -> None:
    run = Federation(tmp_path, "fedasync")
    run.record(Configured(settings=Settings(rule=aggregation_rule("fedasync"), stop=StopRule(updates=4))))
    for sequence, node in enumerate("aaba"):
        run.at += 200.0
        run.update(node, sequence)
    assert run.state.status == "finished" and run.state.version == 4
    run.update("b", 9)  # refused: the training has ended
    cohort = aggregation_rule("fedavg")
    again = decided_anew(run, by(cohort)).fold.coordinator.state.encoders[run.encoder]
    # nobody of the cohort waits for c longer than the grace time: every update is a version alone
    assert (again.status, again.version, again.updates) == ("finished", 4, 4)
    patient = aggregation_rule("fedavg", {"buffer": {"grace_seconds": 1e6}})
    again = decided_anew(run, by(patient)).fold.coordinator.state.encoders[run.encoder]
    assert (again.status, again.version, again.updates) == ("finished", 1, 4)


def test_another_rule_makes_what_a_run_of_the_same_updates_under_it_makes(tmp_path: Path) -> None:
    """Where base versions do not matter, the updates alone decide."""
    one, other = (aggregation_rule("fedasync", {"weights": PLAIN, "outer": {"lr": lr}}) for lr in (0.6, 0.25))
    runs = []
    for name, rule in {"one": one, "other": other}.items():
        run = Federation(tmp_path / name, "fedasync")
        run.record(Configured(settings=Settings(rule=rule)))
        for sequence, node in enumerate("abcacb"):
            run.update(node, sequence)
        runs.append(run)
    refold = decided_anew(runs[0], by(other))
    assert runs[0].state.digest != runs[1].state.digest
    assert refold.fold.arithmetic.targets[runs[0].encoder].parameters.digest() == runs[1].state.digest


def test_without_a_node_it_is_as_if_that_node_had_never_been(tmp_path: Path) -> None:
    rule = aggregation_rule("fedasync", {"weights": PLAIN})
    runs = []
    for name, nodes in {"all": "abc", "two": "ab"}.items():
        run = Federation(tmp_path / name, "fedasync")
        run.record(Configured(settings=Settings(rule=rule)))
        for sequence, node in enumerate("abccabcbac"):
            if node in nodes:
                run.update(node, sequence)
            else:  # the others' numbers are the same
                torch.randn(run.layout.size, generator=run.random)
        runs.append(run)
    everybody, two = runs
    refold = decided_anew(everybody, without="c")
    state = refold.fold.coordinator.state.encoders[everybody.encoder]
    assert list(state.members) == ["a", "b"]
    assert state.digest == two.state.digest != everybody.state.digest
    assert (state.version, state.updates) == (two.state.version, two.state.updates) == (6, 6)
    assert refold.logged.state.encoders[everybody.encoder].digest == everybody.state.digest


def test_a_step_that_failed_for_want_of_a_payload_fails_again_and_one_that_is_gone_is_not_counted(
    tmp_path: Path,
) -> None:
    run = Federation(tmp_path, "fedavg")
    run.update("a", 0)
    gone = str(run.log.entry(run.log.last_offset).payload)
    run.log.payloads.remove(gone)
    for sequence, node in enumerate("bcabca", start=1):
        run.update(node, sequence)
    assert [entry.body.lost for entry in run.log.entries() if isinstance(entry.body, StepFailed)] == [[gone]]
    assert run.state.version == 2 and replayed(tmp_path).coordinator.state == run.fold.coordinator.state
    assert not (found := examine(run.log)).damage and found.asked_again == 1
    again = decided_anew(run).fold.coordinator.state.encoders[run.encoder]
    assert (again.digest, again.last_receipt) == (run.state.digest, run.state.last_receipt)
    refold = decided_anew(run, by(aggregation_rule("fedasync")))
    assert refold.uncounted == 1 and refold.fold.coordinator.state.encoders[run.encoder].updates == 6


def test_an_update_that_was_refused_then_cannot_count_now_and_is_told(tmp_path: Path) -> None:
    run = trained(tmp_path, "fedasync")
    run.record(Configured(settings=Settings(rule=aggregation_rule("fedasync", {"guards": {"max_staleness": 0}}))))
    fresh = run.state.version
    run.update("a", 50)
    stale = next(e for e in reversed(list(run.log.entries())) if isinstance(e.body, UpdateManifest))
    assert isinstance(stale.body, UpdateManifest)
    late = stale.body.model_copy(update={"base_version": fresh - 3, "sequence": 51, "digest": "0" * 64})
    late = late.model_copy(update={"digest": run.log.write_payload(b"late")})
    facts = stale.facts.model_copy(update={"digest": late.digest}) if stale.facts else None
    run.record(late, facts, late.digest)
    assert run.state.members["a"].refused == 1
    run.log.drop([late.digest], "refused", 0.0)
    assert replayed(tmp_path).coordinator.state == run.fold.coordinator.state
    lenient = decided_anew(run, by(aggregation_rule("fedasync")))
    assert lenient.uncounted == 1 and lenient.fold.coordinator.state.encoders[run.encoder].updates == run.state.updates


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def rewritten(log: MessageLog, directory: Path, change: Callable[[Loggable], Loggable]) -> MessageLog:
    """Another log with whole checksums, in which some rows say something else."""
    made = open_log(directory)
    shutil.copytree(log.directory / "payloads", directory / "payloads", dirs_exist_ok=True)
    for entry in log.entries():
        made.append(
            change(entry.body), message_id=entry.message_id, at=entry.at, facts=entry.facts, payload=entry.payload
        )
    return made


def change_rows(directory: Path, statement: str) -> None:
    with sqlite3.connect(directory / "ledger.sqlite") as db:
        assert db.execute(statement).rowcount == 1
    db.close()


def some_update(run: Federation) -> Entry:
    return next(entry for entry in run.log.entries() if isinstance(entry.body, UpdateManifest))


def test_a_flipped_byte_of_a_payload_is_named(tmp_path: Path) -> None:
    run = trained(tmp_path, "return-count")
    entry = some_update(run)
    flip(payload_path(run.log.directory / "payloads", str(entry.payload)))
    assert examine(run.log).damage == [f"payload {entry.payload} of row {entry.offset} is damaged"]
    with pytest.raises(Damaged, match=f"cannot be replayed: payload {entry.payload} is damaged"):
        replayed(tmp_path)
    with pytest.raises(Damaged, match=f"payload {entry.payload}"):
        decided_anew(run, same)


@pytest.mark.parametrize(
    ("statement", "damage"),
    [
        ("UPDATE entries SET body = replace(body, '\"steps\":5', '\"steps\":6') WHERE offset = {}", "is not what was"),
        (
            "UPDATE entries SET facts = replace(facts, '\"finite\":true', '\"finite\":false') WHERE offset = {}",
            "is not",
        ),
        ("UPDATE entries SET at = at + 0.001 WHERE offset = {}", "row {} is not what was written"),
        ("UPDATE entries SET body = x'00ff' WHERE offset = {}", "row {}"),
        ("DELETE FROM entries WHERE offset = {}", "rows {} to {} are missing"),
    ],
)
def test_a_changed_or_missing_row_is_named(tmp_path: Path, statement: str, damage: str) -> None:
    run = trained(tmp_path, "fedasync")
    run.log.close()
    offset = 14
    change_rows(tmp_path, statement.format(offset))
    log = open_log(tmp_path, read_only=True)
    found = examine(log).damage
    assert found and damage.format(offset, offset) in found[0] and len(found) <= 2
    with pytest.raises(Damaged, match=r"row (14|15) "):
        replayed(tmp_path)


def test_a_row_that_was_made_to_look_like_another_kind_is_found(tmp_path: Path) -> None:
    """The `kind` column is no part of the checksum: what it says must be what the body says."""
    run = trained(tmp_path, "fedasync", "ab")
    run.record(Skipped(offset=some_update(run).offset))
    run.log.close()
    change_rows(tmp_path, f"UPDATE entries SET kind = 'tick' WHERE offset = {run.log.last_offset}")
    assert "columns" in examine(open_log(tmp_path, read_only=True)).damage[0]


def test_a_version_that_is_not_what_was_published_is_found(tmp_path: Path) -> None:
    """A digest in the log that no replay comes to, in rows that are whole."""
    run = trained(tmp_path / "run", "fedasync")
    forged = rewritten(
        run.log,
        tmp_path / "forged",
        lambda body: (
            body.model_copy(update={"digest": "e" * 64}) if isinstance(body, Versioned) and body.version == 3 else body
        ),
    )
    assert not examine(forged).damage
    different = [c for _, c in verify(forged, origin(forged).fold) if c is not None and not c.identical]
    assert [(check.version, check.logged) for check in different] == [(3, "e" * 64)]
    with pytest.raises(Damaged, match="version 3 of"):
        rebuild(forged, run.encoder)


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    run = trained(tmp_path, "diloco")
    path = snapshot(run)
    assert examine(run.log).snapshots == 1
    flip(path / "tensors.safetensors")
    assert f"snapshot {path} is damaged" in examine(run.log).damage[0]


# --- what was dropped -------------------------------------------------------------------------------------------------


def pruned(directory: Path) -> Federation:
    """Two snapshots, and updates before, between and after them."""
    run = Federation(directory, "return-count")
    for sequence, node in enumerate("abcabbcacab"):
        run.update(node, sequence)
        if sequence in (4, 7):
            snapshot(run)
    assert prune(run.log, kept_snapshots(directory / "snapshots"), "since-snapshot", 99.0) > 0
    return run


def test_what_retention_dropped_is_said_and_the_rest_is_proved(tmp_path: Path) -> None:
    run = pruned(tmp_path)
    start = origin(run.log)
    first = start.fold.coordinator.state.encoders[run.encoder].version
    count = len(run.log.dropped())
    assert f"{run.encoder} before version {first}" in start.left_out
    assert f"{count} payloads were dropped (retention since-snapshot)" in start.left_out
    assert 0 < first < run.state.version and replayed(tmp_path).coordinator.state == run.fold.coordinator.state
    assert rebuild(run.log, run.encoder, first)[0].version == first
    with pytest.raises(KeyError, match="were dropped"):
        rebuild(run.log, run.encoder, first - 1)
    with pytest.raises(Damaged, match=f"{count} payloads were dropped .* another rule needs all"):
        decided_anew(run, same)
    found = examine(run.log)
    assert (found.dropped, found.damage) == (count, [])
    # receipts need no payload
    assert len(list(issued(run.log))) == run.state.updates - len(run.state.buffer)
    for path in (tmp_path / "snapshots").iterdir():
        shutil.rmtree(path)
    with pytest.raises(Damaged, match="no whole snapshot to begin from"):
        origin(run.log)


@pytest.mark.parametrize("damaged", [False, True])
def test_pruning_leaves_what_a_start_needs_from_either_snapshot(tmp_path: Path, damaged: bool) -> None:
    run = pruned(tmp_path)
    newest = sorted((tmp_path / "snapshots").iterdir())[-1]
    if damaged:
        flip(newest / "state.json")
    fold = read_snapshot(tmp_path / "snapshots", run.log)
    assert (fold.offset == int(newest.name)) != damaged
    assert all(check is None or check.identical for _, check in verify(run.log, fold))
    assert fold.coordinator.state == run.fold.coordinator.state
    # nothing more can go, whatever is asked
    assert droppable(run.log, kept_snapshots(tmp_path / "snapshots"), 0) == []


def test_with_one_snapshot_alone_nothing_is_dropped(tmp_path: Path) -> None:
    run = trained(tmp_path, "fedasync")
    snapshot(run)
    assert prune(run.log, kept_snapshots(tmp_path / "snapshots"), 0, 1.0) == 0 and not run.log.dropped()


# --- repair -----------------------------------------------------------------------------------------------------------


def start_again(directory: Path) -> Journal:
    """What a master does first, without a broker."""
    return open_journal(MasterConfig(state_dir=directory), clock=SYSTEM)


def test_a_ledger_that_is_whole_needs_no_repair(tmp_path: Path) -> None:
    run = trained(tmp_path, "fedasync")
    snapshot(run)
    run.log.close()
    assert repair(tmp_path) is None


def test_a_truncated_ledger_is_kept_as_far_as_it_is_whole(tmp_path: Path) -> None:
    run = trained(tmp_path, "fedasync", "abc" * 40)
    run.log.close()
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(Damaged, match="log repair"):
        start_again(tmp_path)
    report = repair(tmp_path)
    assert report is not None and 0 < report.last_whole == report.resumed_at < run.log.last_offset
    assert report.damaged.exists() and not (tmp_path / "repaired").exists()
    assert repair(tmp_path) is None
    fold = replayed(tmp_path)
    log = open_log(tmp_path, read_only=True)
    assert f"rows after {report.last_whole} were lost" in origin(log).left_out
    assert 0 < fold.coordinator.state.encoders[run.encoder].version < run.state.version
    journal = start_again(tmp_path)
    assert all(check is None or check.identical for _, check in verify(journal.log, journal.fold))
    journal.close()


def test_behind_a_newer_snapshot_a_lost_wal_costs_rows_and_no_state(tmp_path: Path) -> None:
    run = Federation(tmp_path, "return-count")
    for sequence, node in enumerate("abcab"):
        run.update(node, sequence)
    checkpoint_wal(run.log)
    whole = run.log.last_offset
    snapshot(run)
    for sequence, node in enumerate("cabca", start=5):
        run.update(node, sequence)
    snapshot(run)
    state = run.fold.coordinator.state.model_copy(deep=True)
    lost = run.log.last_offset
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("*-wal", "*-shm", "copy"))
    with pytest.raises(Damaged, match="rows are lost"):
        start_again(copy)
    report = repair(copy)
    assert report is not None and (report.last_whole, report.resumed_at) == (whole, lost)
    journal = start_again(copy)
    assert journal.fold.offset == lost and journal.fold.coordinator.state == state
    assert not any(check for _, check in verify(journal.log, journal.fold)) and journal.carried_out == lost
    journal.close()
    log = open_log(copy, read_only=True)
    start = origin(log)
    assert f"rows after {whole}, up to {lost}, were lost" in start.left_out and start.fold.offset == lost
    assert replayed(copy).coordinator.state == state
    assert not (found := examine(log)).damage and f"rows {whole + 1} to {lost} are lost" in found.notes[0]
    gaps: list[str] = []
    shown = list(issued(log, gaps))
    assert f"rows {whole + 1} to {lost}" in gaps[0] and shown == list(issued(run.log))[: len(shown)]
    with pytest.raises(Damaged, match="cannot be decided anew"):
        list(Refold(log, same).run())
    assert repair(copy) is None


def test_rows_that_follow_a_snapshot_are_kept_behind_a_damaged_one(tmp_path: Path) -> None:
    """What was counted after the snapshot has its receipts: it must stay counted."""
    run = Federation(tmp_path, "return-count")
    for sequence, node in enumerate("abcabbcacab"):
        run.update(node, sequence)
        if sequence in (4, 7):
            snapshot(run)
    older = int(min(path.name for path in (tmp_path / "snapshots").iterdir()))
    told, rows = list(issued(run.log)), list(run.log.entries())
    run.log.close()
    change_rows(tmp_path, "UPDATE entries SET body = replace(body, '50', '51') WHERE offset = 13")
    report = repair(tmp_path)
    assert report is not None
    assert (report.last_whole, report.resumed_at, report.newest) == (12, older, rows[-1].offset)
    assert repair(tmp_path) is None
    log = open_log(tmp_path, read_only=True)
    kept = list(log.entries())
    assert kept[:13] == rows[:13] and kept[14:] == rows[older + 1 :] and isinstance(kept[13].body, Repaired)
    assert replayed(tmp_path).coordinator.state == run.fold.coordinator.state
    journal = start_again(tmp_path)
    assert all(check is None or check.identical for _, check in verify(journal.log, journal.fold))
    assert journal.fold.coordinator.state == run.fold.coordinator.state
    assert journal.append(Tick()) is not None
    journal.close()
    assert not examine(open_log(tmp_path, read_only=True)).damage
    gaps: list[str] = []
    shown = list(issued(log, gaps))
    assert len(gaps) == 1 and all(receipt in told for receipt in shown) and shown[-1] == told[-1]
    export_log(log, tmp_path / "log.jsonl.gz")
    with opened(tmp_path / "log.jsonl.gz") as again:
        assert not examine(again).damage


def test_a_snapshot_that_is_damaged_itself_does_not_stand_for_lost_rows(tmp_path: Path) -> None:
    run = trained(tmp_path, "fedasync", "ab")
    checkpoint_wal(run.log)
    whole = run.log.last_offset
    for sequence in range(2, 6):
        run.update("a", sequence)
        if sequence in (3, 5):
            snapshot(run)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("*-wal", "*-shm", "copy"))
    older, newest = sorted((copy / "snapshots").iterdir())
    flip(newest / "tensors.safetensors")
    report = repair(copy)
    assert report is not None and (report.last_whole, report.resumed_at) == (whole, int(older.name))
    journal = start_again(copy)
    assert journal.fold.offset == int(older.name)
    assert not any(check for _, check in verify(journal.log, journal.fold))
    journal.close()
