"""What the master remembers of settled updates: enough to answer each duplicate as it was answered, and little."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from common.numbers.layout import Layout
from common.wire.to_node import receipt_hash
from common.wire.update_rule import UpdateRule
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import StopRule
from master_service.decisions.settled import (
    KEPT_INCARNATIONS,
    KEPT_MARGIN,
    KNOWN_INCARNATIONS,
    KNOWN_NUMBERS,
    is_settled,
    settle,
)
from master_service.decisions.state import EncoderState, Member, State
from master_service.decisions.verdicts import refused
from tests.builders import LAYOUT
from tests.unit.scenario import Scenario, receipts

MIB = 1 << 20
ENCODER = EncoderState(encoder="text-1", encoder_type="text", architecture={}, status="running")
RECEIPT = refused(ENCODER, Scenario().manifest("a", "text-1", 0), "stale", "")


@given(st.permutations(range(KNOWN_NUMBERS + 40)))
def test_f10_what_is_settled_stays_settled_in_whatever_order_receipts_come(order: list[int]) -> None:
    member = Member(node="a", incarnation="first", samples=1, may_owe=2)
    for count, sequence in enumerate(order, 1):
        settle(member, RECEIPT.model_copy(update={"sequence": sequence}))
        settled = member.settled[RECEIPT.incarnation]
        assert list(settled.answers) == order[:count][-(2 + KEPT_MARGIN) :], "the answers that were given last"
        assert len(settled.above) <= KNOWN_NUMBERS
        assert all(is_settled(member, RECEIPT.incarnation, seen) for seen in order[:count])
        if count <= KNOWN_NUMBERS:  # a number that waits for its answer is none of them
            assert not any(is_settled(member, RECEIPT.incarnation, unseen) for unseen in order[count:])


def test_however_many_incarnations_a_node_claims_the_state_stays_small() -> None:
    member = Member(node="a", incarnation="i0", samples=1)
    for number in range(KNOWN_INCARNATIONS + 50):
        settle(member, RECEIPT.model_copy(update={"incarnation": f"i{number}"}))
    assert len(member.settled) == KNOWN_INCARNATIONS
    kept = [incarnation for incarnation, settled in member.settled.items() if settled.answers]
    assert kept == [f"i{KNOWN_INCARNATIONS + 50 - number}" for number in range(KEPT_INCARNATIONS, 0, -1)]
    assert is_settled(member, "i500", 10**15)


def test_f10_a_duplicate_gets_the_very_receipt_that_its_update_got_also_from_a_snapshot() -> None:
    run = Scenario(update_rule=UpdateRule(max_unanswered=3))
    name = run.generate()
    for node in "ab":
        run.join(node, name)
    strange = Layout([("layer.weight", (4, 9)), ("layer.bias", (4,))]).plain()
    manifests = []
    for sequence in range(3 + KEPT_MARGIN):
        changes = {"layout_digest": "1" * 64, "layout": strange} if sequence % 4 == 3 else {}
        manifests.append(run.manifest("a", name, sequence, loss=1 / 3, samples=7 + sequence, **changes))
        run.apply(manifests[-1], *run.payload(manifests[-1], norm=1.0))
        run.update("b", name, sequence, base=max(0, run.coordinator.state.encoders[name].version - sequence % 3))
    first = {receipt.sequence: receipt for receipt in receipts(run.effects, "a")}
    assert len(first) == len(manifests) and {r.accepted for r in first.values()} == {True, False}
    assert any("'layer.weight' has shape" in receipt.detail for receipt in first.values())
    for restart in (False, True):
        if restart:
            run.coordinator = Coordinator(State.model_validate_json(run.coordinator.state.model_dump_json()))
        for manifest in manifests:
            [again] = receipts(run.apply(manifest.model_copy(update={"attempt": 1})))
            assert again == first[manifest.sequence] and receipt_hash(again) == receipt_hash(first[manifest.sequence])
            other = manifest.model_copy(update={"digest": manifest.digest[::-1]})
            assert [r.reason for r in receipts(run.apply(other))] == ["conflict"]


def test_f10_as_many_answers_are_kept_as_the_largest_rule_that_a_node_was_told_lets_it_owe() -> None:
    run = Scenario(rule=aggregation_rule("fedasync"), update_rule=UpdateRule(max_unanswered=64))
    name = run.generate()
    run.join("a", name)
    for sequence in range(100):
        run.update("a", name, sequence)
    assert len(run.coordinator.state.encoders[name].members["a"].settled["first"].answers) == 64 + KEPT_MARGIN


def test_f10_the_state_of_ten_thousand_nodes_with_many_updates_each_is_less_than_20_mib() -> None:
    members, updates = 40, 64
    run = Scenario(rule=aggregation_rule("return-count"), stop=StopRule(versions=10**6))
    name = run.generate()
    nodes = {
        f"hospital-{number:05d}": hashlib.sha256(str(number).encode()).hexdigest()[:12] for number in range(members)
    }
    for node, incarnation in nodes.items():
        run.join(node, name, samples=123_456, incarnation=incarnation)
    for sequence in range(updates):
        for number, (node, incarnation) in enumerate(nodes.items()):
            facts = {"loss": 5 / (3 + number), "seconds": 100 / 3, "samples": 160_000, "steps": 10_000}
            run.update(node, name, sequence, incarnation=incarnation, **facts)
    state = run.coordinator.state
    assert state.encoders[name].updates == members * updates and LAYOUT.size == state.encoders[name].size
    size = len(state.model_dump_json()) / members * 10_000
    assert size < 20 * MIB, f"{size / MIB:.1f} MiB"
