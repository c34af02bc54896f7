"""The verdict on an update, and the words for it."""

from __future__ import annotations

from common.wire.codec import decode, encode
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt, receipt_hash, verdict
from master_service.decisions.state import EncoderState, Member
from master_service.decisions.verdicts import refusal, refused
from node_service.agent import Agent, Answered
from tests.builders import LAYOUT
from tests.unit.scenario import DIGEST, Scenario

ENCODER = EncoderState(
    encoder="text-1", encoder_type="text", architecture={}, status="running", layout=LAYOUT.plain(), size=LAYOUT.size
)


def manifest(**changes: object) -> UpdateManifest:
    return Scenario().manifest("a", "text-1", 0, **changes)


RECEIPT = refused(ENCODER, manifest(), "stale", "")


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
