"""What the master remembers of settled updates: enough to answer each duplicate as it was answered first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.wire.codec import decode, encode
from common.wire.messages import Receipt, UpdateManifest, UpdateRule, receipt_hash, verdict
from master_service.decisions.state import KEPT_INCARNATIONS, KEPT_RECEIPTS, KNOWN_INCARNATIONS, EncoderState, Member
from master_service.decisions.verdicts import refusal, refused, settle
from node_service.agent import Agent, Answered
from tests.unit.scenario import DIGEST, LAYOUT, Scenario

ENCODER = EncoderState(
    encoder="text-1", encoder_type="text", architecture={}, status="running", layout=LAYOUT.plain(), size=LAYOUT.size
)


def manifest(**changes: object) -> UpdateManifest:
    return Scenario().manifest("a", "text-1", 0, **changes)


RECEIPT = refused(ENCODER, manifest(), "stale", "")


@given(st.permutations(range(KEPT_RECEIPTS + 40)))
def test_what_is_settled_stays_settled_in_whatever_order_receipts_come(order: list[int]) -> None:
    member = Member(node="a", incarnation="first", samples=1)
    for count, sequence in enumerate(order, 1):
        settle(member, RECEIPT.model_copy(update={"sequence": sequence}))
        settled = member.settled[RECEIPT.incarnation]
        assert len(settled.receipts) <= KEPT_RECEIPTS
        assert all(settled.holds(seen) for seen in order[:count])


def test_however_many_incarnations_a_node_claims_the_state_stays_small() -> None:
    member = Member(node="a", incarnation="i0", samples=1)
    for number in range(KNOWN_INCARNATIONS + 50):
        settle(member, RECEIPT.model_copy(update={"incarnation": f"i{number}"}))
    assert len(member.settled) == KNOWN_INCARNATIONS
    kept = [incarnation for incarnation, settled in member.settled.items() if settled.receipts]
    assert kept == [f"i{KNOWN_INCARNATIONS + 50 - number}" for number in range(KEPT_INCARNATIONS, 0, -1)]
    assert member.settled["i500"].holds(10**15)


def test_receipts_are_kept_for_as_many_updates_as_a_node_may_have_under_way() -> None:
    bound = next(item.le for item in UpdateRule.model_fields["max_unanswered"].metadata if hasattr(item, "le"))
    assert bound <= KEPT_RECEIPTS


def test_r_a_reason_that_only_a_newer_master_knows_is_no_poison_and_keeps_the_receipts_hash() -> None:
    newer = RECEIPT.model_copy(update={"reason": "out-of-favour"})
    read = decode(encode(newer))
    assert isinstance(read, Receipt) and read == newer and receipt_hash(read) == receipt_hash(newer)
    assert (verdict(read), verdict(RECEIPT)) == ("other", "stale")
    assert verdict(RECEIPT.model_copy(update={"accepted": True, "reason": ""})) == "accepted"
    assert Agent("a", "first", ("text",)).receive(read) == [Answered(read)]


def test_a_refusal_quotes_a_sender_only_as_far_as_a_receipt_takes() -> None:
    layout = [("x" * 100_000, [1] * 16)]
    problem = refusal(
        ENCODER.model_copy(update={"members": {"a": Member(node="a", incarnation="first", samples=1)}}),
        manifest(layout=layout, layout_digest=DIGEST),
        None,
    )
    assert problem is not None
    reason, detail = problem
    receipt = refused(ENCODER, manifest(), reason, detail)
    assert reason == "layout" and receipt.detail.startswith("the layout differs from the encoder's: tensor 'xxx")
