"""The protocol as the master decides it: small logs and what must come out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numbers.layout import Layout
from common.wire.fields import MAX_COUNT
from common.wire.to_master import Continue, Fetch, Get, InstructionAck, Join, Leave, Stop
from common.wire.to_node import (
    Answer,
    Finish,
    Instruction,
    Introduce,
    Notice,
    Receipt,
    Resend,
    Rule,
    Withdrawn,
    receipt_hash,
)
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Broadcast, Conclude, Generate, Publish, Send, Step
from master_service.decisions.records import (
    Entry,
    Generated,
    GenerationFailed,
    Presence,
    Started,
    StepFailed,
    Tick,
)
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.rules.weights import STEPS_BOUND
from master_service.decisions.settings import LossPlateau, StopRule
from master_service.decisions.settled import KEPT_INCARNATIONS
from master_service.decisions.state import Tally
from tests.builders import LAYOUT
from tests.unit.scenario import Scenario, receipts, sent

ARRIVAL = aggregation_rule("fedasync")
COHORT = aggregation_rule("fedavg")


def test_the_protocol_in_its_order() -> None:
    run = Scenario(rule=COHORT, stop=StopRule(versions=1), min_nodes=2)
    [generate] = run.apply(Get(sender="operator", encoder_type="text"))
    assert isinstance(generate, Generate)
    # a second get joins the first, and both are answered when the encoder is there
    assert run.apply(Get(sender="other", encoder_type="text")) == []
    run = Scenario(rule=COHORT, stop=StopRule(versions=1), min_nodes=2)
    name = run.generate()
    publish, broadcast, answer = run.effects[-3:]
    assert isinstance(publish, Publish) and publish.version == 0
    assert isinstance(broadcast, Broadcast) and isinstance(broadcast.message, Instruction)
    assert isinstance(answer, Send) and isinstance(answer.message, Answer)

    assert sent(run.join("a", name), Rule) == []  # min_nodes: nobody starts before the second
    rules = sent(run.join("b", name), Rule)
    assert {rule.node for rule in rules} == {"a", "b"}
    assert all(rule.update_rule.wait and rule.version == 0 for rule in rules)

    assert run.update("a", name, 0) == []
    effects = run.update("b", name, 0)
    kinds = [type(effect.message if isinstance(effect, Send | Broadcast) else effect) for effect in effects]
    assert kinds == [Step, Receipt, Receipt, Publish, Conclude, Finish]
    assert [(r.node, r.version, r.return_count) for r in receipts(effects)] == [("a", 1, 1), ("b", 1, 1)]


def test_a_late_node_starts_from_the_current_version_and_everybody_waiting_is_told_once() -> None:
    run = Scenario(rule=ARRIVAL)
    name = run.generate()
    run.join("a", name)
    for sequence in range(3):
        effects = run.update("a", name, sequence)
        # the receipt comes before the notice: the node must know what is counted before it reads the version
        assert [type(e.message) for e in effects if isinstance(e, Send)] == [Receipt, Notice]
    [rule] = sent(run.join("late", name), Rule)
    assert rule.version == 3
    assert sent(run.update("late", name, 0), Notice, "a") == []


def test_who_has_gone_is_not_waited_for() -> None:
    for goes in (Leave(node="c", incarnation="first"), Presence(node="c", present=False)):
        run = Scenario(rule=COHORT)
        name = run.generate()
        for node in "abc":
            run.join(node, name)
        run.update("a", name, 0)
        assert run.update("b", name, 0) == []
        assert len(receipts(run.apply(goes))) == 2
        # an update that was on its way when the node went still counts, and does not bring it back
        run.update("c", name, 0)
        assert not run.coordinator.state.encoders[name].members["c"].active


def test_grace_flushes_a_buffer_that_waits_for_a_silent_node() -> None:
    run = Scenario(rule=COHORT)
    name = run.generate()
    run.join("a", name)
    run.join("b", name)
    run.update("a", name, 0)
    deadline = run.coordinator.deadline()
    assert deadline == run.at + COHORT.buffer.grace_seconds
    run.at = deadline - 1
    assert run.apply(Tick()) == []
    run.at = deadline
    assert [r.node for r in receipts(run.apply(Tick()))] == ["a"]


def test_an_update_counts_once_however_often_it_comes() -> None:
    run = Scenario(rule=COHORT)
    name = run.generate()
    run.join("a", name)
    run.join("b", name)
    run.update("a", name, 7)
    assert run.update("a", name, 7, attempt=1) == []  # waits in the buffer: nothing to say yet
    run.update("b", name, 0)
    [first] = receipts(run.effects, "a")
    [again] = receipts(run.update("a", name, 7, attempt=2), "a")
    assert again == first and again.accepted
    [conflict] = receipts(run.update("a", name, 7, digest="0" * 64), "a")
    assert (conflict.accepted, conflict.reason) == (False, "conflict")
    assert run.coordinator.state.encoders[name].members["a"].returns == 1


def test_a_new_incarnation_numbers_anew_and_keeps_its_return_count() -> None:
    run = Scenario(rule=ARRIVAL)
    name = run.generate()
    run.join("a", name)
    run.update("a", name, 0)
    run.join("a", name, incarnation="second")
    [receipt] = receipts(run.update("a", name, 0, incarnation="second"))
    assert receipt.accepted and receipt.return_count == 2
    assert receipts(run.update("a", name, 1)) == [] and len(sent(run.effects, Introduce, "a")) == 1
    # the first incarnation is not forgotten: should it come back, what it handed in counts no second time
    [again] = receipts(run.update("a", name, 0, attempt=1))
    assert again.accepted and (again.version, again.incarnation) == (1, "first")
    run.join("a", name, incarnation="first")
    [conflict] = receipts(run.update("a", name, 0, digest="3" * 64))
    assert conflict.reason == "conflict"
    assert run.coordinator.state.encoders[name].members["a"].returns == 2


def test_of_many_incarnations_the_oldest_are_known_as_settled() -> None:
    run = Scenario(rule=ARRIVAL)
    name = run.generate()
    for number in range(KEPT_INCARNATIONS + 1):
        run.join("a", name, incarnation=f"i{number}")
        assert receipts(run.update("a", name, 0, incarnation=f"i{number}"))[0].accepted
    run.join("a", name, incarnation="i0")
    assert [r.reason for r in receipts(run.update("a", name, 0, incarnation="i0"))] == ["conflict"]
    assert [r.reason for r in receipts(run.update("a", name, 1, incarnation="i0"))] == ["conflict"]
    assert run.coordinator.state.encoders[name].members["a"].returns == KEPT_INCARNATIONS + 1


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"layout_digest": "1" * 64}, "layout", "is not the encoder's"),
        (
            {"layout_digest": "1" * 64, "layout": Layout([("layer.weight", (4, 9)), ("layer.bias", (4,))]).plain()},
            "layout",
            "'layer.weight' has shape [4, 9] instead of [4, 8]",
        ),
        ({"size": 1}, "size", "bytes in 1 chunks were expected"),
        ({"base_version": 9}, "future", "not made yet"),
    ],
)
def test_refusals_that_need_no_payload(changes: dict[str, object], reason: str, words: str) -> None:
    run = Scenario(rule=ARRIVAL)
    name = run.generate()
    run.join("a", name)
    manifest = run.manifest("a", name, 0).model_copy(update=changes)
    assert not run.coordinator.wants_payload(manifest)
    [receipt] = receipts(run.apply(manifest))
    assert (receipt.accepted, receipt.reason) == (False, reason)
    assert words in receipt.detail
    assert run.coordinator.state.encoders[name].version == 0


def test_refusals_of_a_payload_and_of_strangers() -> None:
    run = Scenario(rule=ARRIVAL.model_copy(update={"guards": ARRIVAL.guards.model_copy(update={"max_staleness": 1})}))
    name = run.generate()
    run.join("a", name)
    nan = run.manifest("a", name, 0)
    assert [r.reason for r in receipts(run.apply(nan, *run.payload(nan, finite=False)))] == ["not-finite"]
    swapped = run.manifest("a", name, 1)
    facts, payload = run.payload(run.manifest("a", name, 99))
    assert [r.reason for r in receipts(run.apply(swapped, facts, payload))] == ["digest"]
    for sequence in range(2, 5):
        run.update("a", name, sequence)
    effects = run.update("a", name, 5, base=0)
    assert [r.reason for r in receipts(effects)] == ["stale"]
    assert [notice.version for notice in sent(effects, Notice)] == [3]  # it is told what to go on from
    effects = run.update("stranger", name, 0)
    assert receipts(effects) == [] and sent(effects, Introduce, "stranger")
    assert [r.reason for r in receipts(run.update("a", "text-none", 0))] == ["unknown-encoder"]
    run.apply(Stop(sender="operator"))
    effects = run.update("a", name, 6)
    assert [r.reason for r in receipts(effects)] == ["finished"] and sent(effects, Finish, "a")


def test_a_finished_encoder_answers_a_get_and_is_trained_further_by_an_update_request() -> None:
    run = Scenario(rule=ARRIVAL, stop=StopRule(updates=2))
    name = run.generate()
    run.join("a", name)
    run.update("a", name, 0)
    run.update("a", name, 1)
    assert run.coordinator.state.encoders[name].reason == "2 updates"
    publish, answer = run.apply(Get(sender="reader", encoder_type="text"))
    assert isinstance(publish, Publish) and isinstance(answer, Send)
    assert isinstance(answer.message, Answer) and answer.message.status == "finished"
    assert any(isinstance(e, Generate) for e in run.apply(Get(sender="reader", encoder_type="text", fresh=True)))
    assert [r.reason for r in receipts(run.update("a", name, 2))] == ["finished"]
    run.apply(Continue(sender="reader", encoder=name))
    run.join("a", name)
    for sequence in (3, 4):
        assert receipts(run.update("a", name, sequence))[0].accepted
    assert run.coordinator.state.encoders[name].status == "finished"
    assert run.coordinator.state.encoders[name].version == 4


def test_stop_rules() -> None:
    run = Scenario(rule=ARRIVAL, stop=StopRule(seconds=30.0))
    name = run.generate()
    run.join("a", name)
    run.at += 30.0
    assert run.coordinator.deadline() == run.at
    assert any(isinstance(effect, Conclude) for effect in run.apply(Tick()))

    run = Scenario(rule=ARRIVAL, stop=StopRule(plateau=LossPlateau(patience=2, min_change=0.1)))
    name = run.generate()
    run.join("a", name)
    for sequence, loss in enumerate((5.0, 4.0, 3.95, 3.96)):
        run.update("a", name, sequence, loss=loss)
    assert run.coordinator.state.encoders[name].reason == "no better loss for 2 versions"

    # what is at hand when the operator stops becomes part of the last version
    run = Scenario(rule=COHORT)
    name = run.generate()
    run.join("a", name)
    run.join("b", name)
    run.update("a", name, 0)
    effects = run.apply(Stop(sender="operator"))
    assert receipts(effects, "a")[0].accepted and any(isinstance(effect, Conclude) for effect in effects)


def test_equal_nodes_get_the_plain_mean_under_the_default_rule() -> None:
    run = Scenario(rule=aggregation_rule("return-count", {"buffer": {"kind": "cohort"}}))
    name = run.generate()
    nodes = [f"n{i}" for i in range(5)]
    for node in nodes:
        run.join(node, name)
    for sequence in range(4):
        for node in nodes:
            effects = run.update(node, name, sequence)
        assert [receipt.weight for receipt in receipts(effects)] == pytest.approx([1.0] * 5)
    [step] = [effect for effect in effects if isinstance(effect, Step)]
    assert [c.coefficient for c in step.contributions] == pytest.approx([0.2] * 5)


@pytest.mark.parametrize(
    ("preset", "updates", "coefficients"),
    [
        # x − Σ cᵢ(x − localᵢ) = (100·local₁ + 300·local₂) / 400: the sample-weighted mean of the local models
        ("fedavg", [("a", 0, 100), ("b", 0, 300)], [100 / 400, 300 / 400]),
        # the mean, however many samples
        ("diloco", [("a", 0, 100), ("b", 0, 300)], [1 / 2, 1 / 2]),
        # x + α s(τ) (local − x) with α in the outer learning rate and s(3) = (1+3)^-½
        ("fedasync", [("a", 3, 100)], [1 / 2]),
        # K = 3 arrivals, each scaled by s(τ), over K
        ("fedbuff", [("a", 0, 1), ("b", 3, 1), ("a", 8, 1)], [1 / 3, 1 / 2 / 3, 1 / 3 / 3]),
        # p/q with one return added to each: a ½·6/4 and b ½·6/2, over 4 updates; s(0) and s(3)
        ("return-count", [("a", 0, 9), ("a", 0, 9), ("a", 3, 9), ("b", 0, 9)], [3 / 16, 3 / 16, 3 / 32, 6 / 16]),
    ],
)
def test_the_presets_by_hand(preset: str, updates: list[tuple[str, int, int]], coefficients: list[float]) -> None:
    run = Scenario(rule=aggregation_rule(preset))
    name = run.generate()
    for node in sorted({node for node, _, _ in updates}):
        run.join(node, name, samples=10**6)
    run.coordinator.state.encoders[name].version = 10
    for sequence, (node, staleness, samples) in enumerate(updates):
        effects = run.update(node, name, sequence, base=10 - staleness, steps=25, samples=samples)
    [step] = [effect for effect in effects if isinstance(effect, Step)]
    assert [item.coefficient for item in step.contributions] == pytest.approx(coefficients)
    assert step.outer.lr == {"fedasync": 0.6, "diloco": 0.7}.get(preset, 1.0)
    assert [r.weight for r in receipts(effects)] == pytest.approx([c * len(updates) for c in coefficients])


def test_an_update_far_beyond_the_usual_norm_is_cut_to_the_bound() -> None:
    run = Scenario(rule=ARRIVAL)
    name = run.generate()
    run.join("a", name)
    for sequence in range(6):
        manifest = run.manifest("a", name, sequence)
        effects = run.apply(manifest, *run.payload(manifest, norm=2.0 if sequence < 5 else 80.0))
    assert receipts(effects)[0].weight == pytest.approx(2 * 2.0 / 80.0), "who is alone is compared with itself"


def test_f13_an_update_of_many_steps_is_not_cut_like_an_attack_and_a_claim_does_not_hide_one() -> None:
    run = Scenario(rule=ARRIVAL)
    name = run.generate()
    run.join("a", name)
    weights = []
    far = 2.0 * 200**0.5
    for norm, steps in [(2.0, 25)] * 6 + [(far, 5000), (far, 25), (2e6, 1 << 60)]:
        manifest = run.manifest("a", name, len(weights), steps=steps)
        weights.append(receipts(run.apply(manifest, *run.payload(manifest, norm=norm)))[0].weight)
    assert weights[:7] == [1.0] * 7, "trained on while the master was away"
    assert weights[7] == pytest.approx(2 / 200**0.5)
    assert weights[8] == pytest.approx(2 * 2.0 * STEPS_BOUND**0.5 / 2e6)


def test_a_node_that_returns_more_often_weighs_less_each_time() -> None:
    run = Scenario()
    name = run.generate()
    for node in ("fast", "slow"):
        run.join(node, name)
    last: dict[str, float] = {}
    for sequence in range(40):
        effects = run.update("fast", name, sequence)
        if sequence % 4 == 0:
            effects += run.update("slow", name, sequence)
        last.update({receipt.node: receipt.weight for receipt in receipts(effects)})
    assert last["fast"] < 1 < last["slow"]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["join", "update", "again", "leave", "absent", "present", "fetch", "tick", "later", "stop"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(ACTIONS, st.sampled_from(["return-count", "fedavg", "fedbuff", "fedasync"]))
def test_in_any_order_each_update_counts_at_most_once_and_the_fold_is_deterministic(
    actions: list[tuple[str, str, int]], preset: str
) -> None:
    run = Scenario(rule=aggregation_rule(preset))
    name = run.generate()
    sequences = dict.fromkeys("abc", 0)
    for action, node, number in actions:
        match action:
            case "join":
                run.join(node, name)
            case "update":
                version = run.coordinator.state.encoders[name].version
                run.update(node, name, sequences[node], base=max(0, version - number))
                sequences[node] += 1
            case "again":
                run.update(node, name, max(0, sequences[node] - 1 - number), base=0, attempt=number)
            case "leave":
                run.apply(Leave(node=node, incarnation="first"))
            case "absent" | "present":
                run.apply(Presence(node=node, present=action == "present"))
            case "fetch":
                run.apply(Fetch(node=node, incarnation="first", encoder=name, have_version=number))
            case "tick":
                run.apply(Tick())
            case "later":
                run.at += 20.0 * number
            case "stop" if number == 0:
                run.apply(Stop(sender="operator"))
    encoder = run.coordinator.state.encoders[name]
    verdicts: dict[tuple[str, int], tuple[bool, int]] = {}
    for receipt in receipts(run.effects):
        verdict = (receipt.accepted, receipt.version)
        assert verdicts.setdefault((receipt.node, receipt.sequence), verdict) == verdict
    # F11: the sums that are kept are those that would be taken anew
    active, returned = encoder.active(), {item.node for item in encoder.buffer}
    assert encoder.tally == Tally(
        active=len(active),
        returns=sum(member.returns for member in active.values()),
        samples=sum(member.samples for member in active.values()),
        active_returned=len(returned & active.keys()),
        returned=len(returned),
        norms=sorted(each.usual_norm for each in active.values() if each.usual_norm is not None),
        steps=sorted(each.usual_steps for each in active.values() if each.usual_steps is not None),
        losses=sorted(each.claimed_loss for each in active.values() if each.claimed_loss is not None),
    )
    assert all(member.buffered == len(member.pending) for member in encoder.members.values())
    assert sum(member.buffered for member in encoder.members.values()) == len(encoder.buffer)
    counted = [c.payload for effect in run.effects if isinstance(effect, Step) for c in effect.contributions]
    assert len(counted) == len(set(counted)), "an update is in the encoder twice"
    accepted = [key for key, (good, _) in verdicts.items() if good]
    assert len(accepted) == len(counted)
    assert sum(member.returns for member in encoder.members.values()) == encoder.updates
    assert encoder.updates == len(counted) + len(encoder.buffer)
    versions = [effect.version for effect in run.effects if isinstance(effect, Step)]
    assert versions == list(range(1, len(versions) + 1))

    again, effects = Coordinator(), []
    for entry in run.log:
        effects += again.handle(entry)
    assert again.state == run.coordinator.state and effects == run.effects


def test_requests_while_the_encoder_is_made_and_when_it_cannot_be_made() -> None:
    run = Scenario()
    [generate] = run.apply(Get(sender="one", encoder_type="t" * 64))
    assert isinstance(generate, Generate)
    assert run.apply(Get(sender="two", encoder_type="t" * 64)) == []
    # the name is an id too, however long the type's is; and a reason of any length is told
    answers = run.apply(GenerationFailed(encoder=generate.encoder, reason="why " * 2000))
    assert [(e.to, e.message.accepted) for e in answers if isinstance(e, Send)] == [("one", False), ("two", False)]
    # the nodes that could have trained it are told too, those that come later included
    [told] = [effect for effect in answers if isinstance(effect, Broadcast)]
    assert isinstance(told.message, Withdrawn) and told.message.reason.startswith("why why ")
    joining = Join(node="a", incarnation="first", types=["t" * 64])
    assert sent(run.apply(joining), Withdrawn, "a") == [told.message]
    assert not sent(run.apply(joining.model_copy(update={"types": ["other"]})), Withdrawn)
    assert isinstance(run.apply(Get(sender="one", encoder_type="t" * 64))[0], Generate), "a failed one may be retried"
    assert not sent(run.apply(joining), Withdrawn), "there is something to wait for again"


def test_a_version_that_nobody_waits_for_is_published_every_so_often() -> None:
    run = Scenario(rule=ARRIVAL, publish_every_seconds=30.0)
    name = run.generate()
    run.join("a", name)
    run.at += 10.0
    effects = run.update("a", name, 0, wants_version=False)
    assert not [e for e in effects if isinstance(e, Publish)] and not sent(effects, Notice)
    assert run.coordinator.deadline() == 1030.0
    run.at = 1030.0
    assert [e.version for e in run.apply(Tick()) if isinstance(e, Publish)] == [1]
    assert run.coordinator.deadline() is None
    # who asks is told at once, from what is published already
    fetch = Fetch(node="a", incarnation="first", encoder=name, have_version=0)
    assert [type(e) for e in run.apply(fetch)] == [Send]
    # unless the stream has lost it: then it is published once more, and once is enough for all who miss it
    missing = fetch.model_copy(update={"sought": 1})
    assert [type(e) for e in run.apply(missing)] == [Send]
    run.at += 30.0
    assert [type(e) for e in run.apply(missing.model_copy(update={"sought": 2}))] == [Send]  # it was never published
    # whoever is told nothing moves nothing: a stranger, and who has the newest
    assert [type(e) for e in run.apply(missing.model_copy(update={"node": "nobody"}))] == [Send]
    assert run.apply(missing.model_copy(update={"have_version": 1})) == []
    assert [type(e) for e in run.apply(missing)] == [Publish, Send]
    assert [type(e) for e in run.apply(missing)] == [Send]
    # and who has the newest is told of the next, once
    run.apply(fetch.model_copy(update={"have_version": 1}))
    assert len(sent(run.update("a", name, 1), Notice)) == 1


def test_before_a_training_begins_nobody_is_told_of_a_version() -> None:
    run = Scenario(min_nodes=2)
    name = run.generate()
    run.join("a", name)
    assert run.apply(Fetch(node="a", incarnation="first", encoder=name, have_version=-1)) == []
    assert [type(effect) for effect in run.join("b", name)] == [Send, Send, Send]  # the instruction, and two rules


def test_joining_never_needs_an_order() -> None:
    run = Scenario()
    name = run.generate()
    messages = [
        Join(node="x", incarnation="i", types=["image"]),
        Leave(node="nobody", incarnation="i"),
        Presence(node="nobody", present=True),
        Fetch(node="x", incarnation="i", encoder=name, have_version=0),
        Fetch(node="x", incarnation="i", encoder="none", have_version=0),
        InstructionAck(node="y", incarnation="i", encoder="none", accepted=True, samples=5),
        InstructionAck(node="z", incarnation="i", encoder="none", accepted=False, reason="no samples"),
        Continue(sender="x", encoder="none"),
    ]
    random.Random(0).shuffle(messages)
    for message in messages:
        run.apply(message)
    assert sent(run.effects, Introduce, "x")
    assert sent(run.effects, Withdrawn) == [Withdrawn(encoder="none")] * 2 and not sent(run.effects, Withdrawn, "z")
    assert not sent(run.effects, Answer, "x")[0].accepted
    assert LAYOUT.size == run.coordinator.state.encoders[name].size


def test_who_accepts_the_instruction_of_an_encoder_that_has_ended_is_told_of_the_end_at_once() -> None:
    run = Scenario()
    name = run.generate()
    run.apply(Stop(sender="operator", encoder=name))
    run.apply(InstructionAck(node="late", incarnation="i", encoder=name, accepted=True, samples=5))
    assert [each.encoder for each in sent(run.effects, Finish, "late")] == [name]


def test_receipts_are_a_chain_per_encoder_in_the_order_in_which_they_were_issued() -> None:
    run = Scenario(rule=COHORT)
    name = run.generate()
    run.join("a", name)
    run.join("b", name)
    run.update("a", name, 0)
    run.update("b", name, 0)
    run.update("a", name, 1, size=1)  # refused
    run.update("stranger", name, 0)
    again = receipts(run.update("a", name, 0, attempt=1), "a")
    issued = receipts(run.effects)[:-1]
    assert [receipt.reason for receipt in issued] == ["", "", "size"]
    assert issued[0].previous == ""
    assert [receipt.previous for receipt in issued[1:]] == [receipt_hash(receipt) for receipt in issued[:-1]]
    assert again == [issued[0]], "a receipt that is sent again takes no new place in the chain"
    heavier = issued[0].model_copy(update={"weight": issued[0].weight + 1e-12})
    assert receipt_hash(heavier) != issued[1].previous


def test_a_step_that_fails_counts_nothing_of_what_was_lost_and_asks_for_it_again() -> None:
    run = Scenario(rule=COHORT)
    name = run.generate()
    run.join("a", name)
    run.join("b", name)
    run.update("a", name, 0)
    manifest = run.manifest("b", name, 0)
    facts, payload = run.payload(manifest)
    entry = Entry(len(run.log), "b0", run.at, manifest, facts, payload)
    [step] = run.coordinator.handle(entry)  # not answered yet: its payload is found damaged
    run.log.append(entry)
    assert isinstance(step, Step) and step.version == 1
    state = run.coordinator.state.encoders[name]
    assert (state.version, state.updates, len(state.stepping)) == (0, 2, 2)
    effects = run.apply(StepFailed(encoder=name, version=1, lost=[payload]))
    [resend] = sent(effects, Resend, "b")
    assert (resend.sequence, resend.attempt) == (0, 1) and receipts(effects) == []
    assert (state.version, state.updates, state.members["b"].returns, state.members["b"].steps) == (0, 1, 0, 0)
    assert [item.node for item in state.buffer] == ["a"]
    assert state.tally == Tally(
        active=2, returns=1, samples=200, active_returned=1, returned=1, losses=[5.0, 5.0]
    )  # F11
    assert list(state.members["a"].pending) == ["first/0"] and not state.members["b"].pending
    effects = run.update("b", name, 0, attempt=1)
    assert [(r.node, r.version, r.return_count) for r in receipts(effects)] == [("a", 1, 1), ("b", 1, 1)]


def test_a_master_that_starts_says_again_what_runs_and_the_log_knows_that_it_did() -> None:
    run = Scenario(rule=ARRIVAL, publish_every_seconds=30.0)
    name = run.generate()
    run.join("a", name)
    run.at += 10
    run.update("a", name, 0, wants_version=False)
    publish, broadcast = run.apply(Started(epoch=2, fingerprint={}))
    assert isinstance(publish, Publish) and publish.version == 1
    assert isinstance(broadcast, Broadcast) and broadcast.message.encoder == name
    assert run.coordinator.deadline() is None, "what is published needs no tick any more"


def test_a_stop_while_the_encoder_is_made_ends_it_once_it_is_there() -> None:
    run = Scenario()
    [generate] = run.apply(Get(sender="operator", encoder_type="text"))
    assert isinstance(generate, Generate)
    assert run.apply(Stop(sender="operator")) == []
    effects = run.apply(
        Generated(
            encoder=generate.encoder,
            architecture={},
            layout=LAYOUT.plain(),
            layout_digest=LAYOUT.digest,
            digest="0" * 64,
        )
    )
    assert [type(effect) for effect in effects[-3:]] == [Publish, Conclude, Broadcast]
    assert run.coordinator.state.encoders[generate.encoder].status == "finished"


def test_sums_that_a_hostile_node_claims_stay_within_what_a_message_carries() -> None:
    run = Scenario(rule=ARRIVAL, claims="taken")
    name = run.generate()
    run.join("a", name)
    for sequence in range(3):
        run.update("a", name, sequence, steps=MAX_COUNT, samples=MAX_COUNT)
    member = run.coordinator.state.encoders[name].members["a"]
    assert (member.steps, member.samples_seen, member.returns) == (MAX_COUNT, MAX_COUNT, 3)
