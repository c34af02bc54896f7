"""A skipped entry has no effect, whoever folds the log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deploy.demo.report import series
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.records import Skipped
from master_service.decisions.rules.model import aggregation_rule
from master_service.history.audit import issued
from master_service.log.message_log import open_log
from tests.unit.scenario import Scenario, receipts


def test_s_a_skipped_entry_moves_nothing_in_the_coordinator() -> None:
    run = Scenario(rule=aggregation_rule("fedasync"))
    name = run.generate()
    run.join("a", name)
    run.update("a", name, 0)
    again = Coordinator()
    for entry in run.log:
        before = again.state.model_copy(deep=True)
        assert again.handle(replace(entry, skipped=True)) == [] and again.state == before
        again.handle(entry)
    assert again.state == run.coordinator.state


def test_s_the_audit_shows_no_receipt_of_a_skipped_update(tmp_path: Path) -> None:
    # a cohort of two: the skipped update of the second is the last, so that no version follows it
    run = Scenario(rule=aggregation_rule("fedavg"))
    name = run.generate()
    for node in "ab":
        run.join(node, name)
    for node, sequence in (("a", 0), ("b", 0), ("a", 1)):
        run.update(node, name, sequence)
    run.update("b", name, 1, size=1)  # refused: a receipt follows at once
    log = open_log(tmp_path)
    for entry in run.log:
        log.append(entry.body, message_id=entry.message_id, at=entry.at, facts=entry.facts, payload=entry.payload)
    assert [(each.node, each.sequence) for each in issued(log)] == [("a", 0), ("b", 0), ("b", 1)]
    log.append(Skipped(offset=log.last_offset), message_id="skip", at=run.at)
    assert [(each.node, each.sequence) for each in issued(log)] == [("a", 0), ("b", 0)]
    log.close()


def test_s_the_demos_report_counts_no_skipped_update(tmp_path: Path) -> None:
    run = Scenario(rule=aggregation_rule("fedasync"))
    name = run.generate()
    run.join("a", name)
    run.update("a", name, 0)
    log = open_log(tmp_path)
    for entry in run.log:
        log.append(entry.body, message_id=entry.message_id, at=entry.at, facts=entry.facts, payload=entry.payload)
    # the same update once more, which is answered by its receipt again, unless that row is skipped
    again = run.manifest("a", name, 0, base=0, attempt=1)
    log.append(again, message_id="again", at=run.at)
    log.append(Skipped(offset=log.last_offset), message_id="skip", at=run.at)
    log.close()
    assert len(receipts(run.effects)) == 1 and len(series(tmp_path).weight["a"]) == 1
