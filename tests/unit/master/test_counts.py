"""What the master counts for metrics: each answer once, and nothing that a stranger can make grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.brokers.memory import MemoryServer
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt
from master_service.counts import KEPT_ENCODERS, STALENESS, Answered, Counts, Histogram
from master_service.decisions.effects import Send
from master_service.decisions.records import Entry
from tests.builders import update_manifest
from tests.integration.harness import HandNode, eventually, numbers, running_master
from tests.unit.scenario import Scenario


class Counting(Scenario):
    """Notes every entry as the recorder does."""

    def __init__(self, **settings: Any) -> None:
        self.counts = Counts()
        super().__init__(**settings)

    def apply(self, body: Any, *rest: Any) -> Any:
        known = isinstance(body, UpdateManifest) and self.coordinator.knows(body)
        before = len(self.effects)
        at = len(self.log)
        found = super().apply(body, *rest)
        if at == len(self.log) - 1:  # one entry alone: what follows from it notes itself
            self.counts.note(self.log[at], self.effects[before:], self.coordinator.state.encoders, known=known)
        return found


def receipt(encoder: str, **changes: Any) -> Receipt:
    plain = {"node": "a", "incarnation": "i", "sequence": 0, "digest": "0" * 64, "accepted": True, "version": 1}
    return Receipt(**{"encoder": encoder, **plain, **changes})


def noted(counts: Counts, said: Receipt, encoders: set[str], *, known: bool = False) -> None:
    manifest = update_manifest("a", 0, encoder=said.encoder)
    counts.note(Entry(0, "m", 1.0, manifest), [Send("a", said)], encoders, known=known)


@given(st.lists(st.floats(0, 1e6)))
def test_a_histogram_has_each_value_in_the_first_bucket_that_is_not_below_it(values: list[float]) -> None:
    histogram = Histogram(STALENESS)
    for value in values:
        histogram.add(value)
    assert histogram.cumulative() == [
        (bound, sum(value <= bound for value in values)) for bound in (*STALENESS, float("inf"))
    ]
    assert histogram.total == sum(values)


def test_refusals_are_counted_by_reason_and_a_duplicate_is_no_second_answer() -> None:
    scenario = Counting()
    encoder = scenario.generate()
    scenario.join("a", encoder)
    stale = scenario.manifest("a", encoder, 0, base=7)
    scenario.apply(stale, *scenario.payload(stale))
    assert scenario.counts.answered == {Answered(encoder, "refused", "future"): 1}
    scenario.apply(stale, *scenario.payload(stale))  # its answer was lost
    assert scenario.counts.answered == {
        Answered(encoder, "refused", "future"): 1,
        Answered(encoder, "duplicate"): 1,
    }


def test_an_encoder_that_is_not_known_is_no_label_of_its_own() -> None:
    counts = Counts()
    for number in range(1000):
        noted(counts, receipt(f"made-up-{number}", accepted=False, reason="unknown-encoder"), {"text-1"})
    assert counts.answered == {Answered("", "refused", "unknown-encoder"): 1000}


def test_a_reason_that_only_a_newer_master_knows_is_other() -> None:
    counts = Counts()
    noted(counts, receipt("text-1", accepted=False, reason="some words of whoever"), {"text-1"})
    assert counts.answered == {Answered("text-1", "refused", "other"): 1}


def test_a_conflict_is_refused_though_its_number_is_known() -> None:
    counts = Counts()
    noted(counts, receipt("text-1", accepted=False, reason="conflict"), {"text-1"}, known=True)
    noted(counts, receipt("text-1", accepted=True), {"text-1"}, known=True)
    assert counts.answered == {Answered("text-1", "duplicate"): 2, Answered("text-1", "refused", "conflict"): 1}
    assert not counts.weights, "the second was counted when it came first"


def test_of_many_encoders_the_newest_are_kept() -> None:
    counts, names = Counts(), [f"text-{number}" for number in range(3 * KEPT_ENCODERS)]
    for name in names:
        noted(counts, receipt(name, weight=1.5, staleness=3), set(names))
    kept = names[-KEPT_ENCODERS:]
    assert [answered.encoder for answered in counts.answered] == kept
    assert list(counts.weights) == list(counts.staleness) == kept


def test_a_copy_stays_as_it_was() -> None:
    counts = Counts()
    noted(counts, receipt("text-1", weight=1.0), {"text-1"})
    copy = counts.copy()
    noted(counts, receipt("text-1", weight=1.0), {"text-1"})
    assert copy.answered == {Answered("text-1", "counted"): 1} and copy.weights["text-1"].total == 1.0


def test_a_running_master_counts_what_it_answers(tmp_path: Path) -> None:
    """An update, the same one again, and one that is not finite; then the numbers begin anew with the process."""
    server = MemoryServer()
    with running_master(server, tmp_path) as master:
        node = HandNode(server, "a")
        instruction = node.enter()
        good, bad = numbers(instruction), numbers(instruction, float("nan"))
        node.send(node.manifest(instruction, 0, good), good)
        assert node.hear(Receipt).accepted
        node.send(node.manifest(instruction, 0, good, attempt=1), good)
        assert node.hear(Receipt).accepted, "the stored answer again"
        node.send(node.manifest(instruction, 1, bad), bad)
        assert node.hear(Receipt).reason == "not-finite"
        counts, encoder = master.service.counts, instruction.encoder
        eventually(lambda: len(counts.answered) == 3)
        assert counts.answered == {
            Answered(encoder, "counted"): 1,
            Answered(encoder, "duplicate"): 1,
            Answered(encoder, "refused", "not-finite"): 1,
        }
        assert counts.weights[encoder].cumulative()[-1][1] == counts.staleness[encoder].cumulative()[0][1] == 1
        size = sum(map(len, good))
        assert counts.payload_bytes == {encoder: 2 * size} and list(counts.version_at) == [encoder]
        waiting = master.service.waiting()
        assert waiting == {"arrived": 0, "updates": 0, "outbox": 0, "held": 0}
    with running_master(server, tmp_path) as master:
        assert master.service.counts.answered == {}
