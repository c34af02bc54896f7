"""The master trusts no node: whatever well-formed messages come, in whatever order, the fold goes on and stays true."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from common.wire.codec import decode, encode
from common.wire.to_master import (
    Admit,
    Change,
    Continue,
    Fetch,
    Get,
    InstructionAck,
    Join,
    Kick,
    Leave,
    Pause,
    Resume,
    Stop,
)
from common.wire.to_node import Finish, Notice, Receipt
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Broadcast, Conclude, Effect, Generate, Publish, Send, Step
from master_service.decisions.records import (
    Configured,
    Entry,
    Generated,
    GenerationFailed,
    Presence,
    Tick,
    pack,
    unpack,
)
from master_service.decisions.rules.model import PRESETS, aggregation_rule
from master_service.decisions.settings import LossPlateau, Settings, StopRule
from master_service.decisions.state import State
from tests.builders import LAYOUT
from tests.unit.scenario import DIGEST, Scenario, receipts, sent

NODE = st.sampled_from(["a", "b", "c"])
INCARNATION = st.sampled_from(["first"] * 7 + ["second"])
SETTINGS = st.builds(
    Settings,
    rule=st.sampled_from(sorted(PRESETS)).map(aggregation_rule),
    stop=st.sampled_from(
        [StopRule(versions=3), StopRule(updates=4), StopRule(seconds=45.0), StopRule(plateau=LossPlateau(patience=2))]
    ),
    min_nodes=st.integers(1, 2),
    publish_every_seconds=st.just(20.0),
)
KINDS = (
    *("join", "ack", "ack", "refuse", "leave", "present", "fetch", *["update"] * 16, *["again"] * 4),
    *("get", "fresh", "continue", "continue", "stop", "tick", "tick", "later", "configure", "restore"),
    *("pause", "resume", "resume", "kick", "admit", "admit", "set", "own"),
)
SET: list[tuple[str, Any]] = [
    ("update.when.steps", 3),
    ("stop.versions", None),
    ("stop.seconds", 60),
    ("rule.preset", "fedavg"),
    ("rule.buffer.grace_seconds", 1),
    ("update.max_unanswered", 1),
    ("rule.combine.how", "median"),
]
#: What may be wrong with an update: mostly nothing.
WRONG: list[dict[str, Any]] = [
    *([{}] * 12),
    {"layout_digest": "1" * 64, "layout": [("x" * 5000, [1])]},
    {"size": 1},
    {"base_version": 1 << 61},
    {"base_version": 0},
    {"loss": math.nan},
    {"loss": math.inf, "samples": (1 << 62) - 1, "seconds": 1e308, "steps": (1 << 62) - 1},
    {"encoder": "text-none"},
]


class Storm(Scenario):
    """A scenario that any step may hit; answers generations and counts what a shell would see."""

    def __init__(self, given: Settings) -> None:
        super().__init__()
        self.apply(Configured(settings=given))
        self.sequences: dict[str, int] = {}

    def apply(self, body: Any, facts: Any = None, payload: str | None = None) -> list[Effect]:
        assert pack(unpack(pack(body))) == pack(body)
        effects = super().apply(body, facts, payload)
        for effect in effects:
            if isinstance(effect, Send | Broadcast):
                assert encode(decode(encode(effect.message))) == encode(effect.message)
            if isinstance(effect, Generate):
                name = effect.encoder
                if effect.encoder_type == "image":
                    self.apply(GenerationFailed(encoder=name, reason="no such type " * 500))
                else:
                    layout, digest = LAYOUT.plain(), LAYOUT.digest
                    self.apply(
                        Generated(encoder=name, architecture={}, layout=layout, layout_digest=digest, digest=DIGEST)
                    )
        return effects

    def act(self, kind: str, node: str, incarnation: str, number: int, wrong: dict[str, Any]) -> None:
        encoders = list(self.coordinator.state.encoders)
        name = encoders[number // 5 % len(encoders)] if encoders else "text-none"
        match kind:
            case "join":
                self.apply(Join(node=node, incarnation=incarnation, types=["text", "image"]))
            case "ack" | "refuse":
                accepted = kind == "ack"
                self.apply(
                    InstructionAck(node=node, incarnation=incarnation, encoder=name, accepted=accepted, samples=number)
                )
            case "update" | "again":
                next_one = self.sequences.get(node, 0)
                sequence = next_one if kind == "update" else max(0, next_one - 1 - number)
                self.sequences[node] = max(next_one, sequence + 1)
                digest = hashlib.sha256(f"{name}/{node}/{incarnation}/{sequence}".encode()).hexdigest()
                manifest = self.manifest(node, name, sequence, incarnation=incarnation, digest=digest)
                changed = manifest.model_copy(update=wrong if kind == "update" else {"attempt": number})
                # as the shell does: the payload is fetched only if the coordinator wants it
                wanted = self.coordinator.wants_payload(changed)
                self.apply(changed, *(self.payload(changed, finite=number != 5) if wanted else ()))
            case "leave":
                self.apply(Leave(node=node, incarnation=incarnation))
            case "present":
                self.apply(Presence(node=node, present=number % 2 == 0))
            case "fetch":
                self.apply(Fetch(node=node, incarnation=incarnation, encoder=name, have_version=number - 1))
            case "get" | "fresh":
                encoder_type = ("text", "image", "t" * 64)[number % 3]
                self.apply(Get(sender=node, encoder_type=encoder_type, fresh=kind == "fresh"))
            case "continue":
                self.apply(Continue(sender=node, encoder=name))
            case "stop":
                self.apply(Stop(sender=node, encoder=name if number % 2 else None))
            case "pause":
                self.apply(Pause(sender="op", encoder=name if number % 2 else None))
            case "resume":
                self.apply(Resume(sender="op", encoder=name if number % 2 else None))
            case "kick":
                self.apply(Kick(sender="op", member=node))
            case "admit":
                self.apply(Admit(sender="op", member=node))
            case "set" | "own":
                name_of, value = SET[number % len(SET)]
                self.apply(Change(sender="op", changes={name_of: value}, member=node if kind == "own" else None))
            case "tick" if (due := self.coordinator.deadline()) is not None:
                self.at = max(self.at, due)
                self.apply(Tick())
                left = self.coordinator.deadline()
                assert left is None or left > self.at, "a deadline that a tick does not meet would tick for ever"
            case "later":
                self.at += 7.0 * number
            case "configure":
                preset = sorted(PRESETS)[number % len(PRESETS)]
                rule = self.coordinator.state.settings.model_copy(update={"rule": aggregation_rule(preset)})
                self.apply(Configured(settings=rule))
            case "restore":
                self.coordinator = Coordinator(restored(self.coordinator.state))


def restored(state: State) -> State:
    return State.model_validate_json(state.model_dump_json())


ACTS = st.lists(
    st.tuples(st.sampled_from(KINDS), NODE, INCARNATION, st.integers(0, 5), st.sampled_from(WRONG)),
    min_size=20,
    max_size=60,
)
START = [("get", "a", "first", 0, {})] + [(kind, node, "first", 0, {}) for node in "abc" for kind in ("join", "ack")]


@settings(max_examples=150, deadline=None)
@given(ACTS, SETTINGS)
def test_the_fold_goes_on_and_stays_true(
    acts: list[tuple[str, str, str, int, dict[str, Any]]], given: Settings
) -> None:
    run = Storm(given)
    for act in [*START, *acts]:
        run.act(*act)

    outcomes: dict[tuple[str, str, str, int], tuple[bool, int, float]] = {}
    for receipt in receipts(run.effects):
        if receipt.reason in ("unknown-encoder", "conflict"):
            continue  # these settle nothing
        key = (receipt.encoder, receipt.node, receipt.incarnation, receipt.sequence)
        outcome = (receipt.accepted, receipt.version, receipt.weight)
        assert outcomes.setdefault(key, outcome) == outcome, "one update was answered in two ways"
    steps = [effect for effect in run.effects if isinstance(effect, Step)]
    counted = [item.payload for step in steps for item in step.contributions]
    assert len(counted) == len(set(counted)) == sum(accepted for accepted, *_ in outcomes.values())
    assert all(math.isfinite(item.coefficient) and item.coefficient > 0 for s in steps for item in s.contributions)
    for encoder in run.coordinator.state.encoders.values():
        assert [s.version for s in steps if s.encoder == encoder.encoder] == list(range(1, encoder.version + 1))
        assert sum(member.returns for member in encoder.members.values()) == encoder.updates
        assert encoder.status == "running" or not encoder.buffer, "an update was accepted and forgotten"
    told_in_order(run.effects)
    again(run.log, run)


def told_in_order(effects: list[Effect]) -> None:
    """A version's updates are answered before it is published, and nobody is told of it before that."""
    published: dict[str, int] = {}
    unanswered: dict[tuple[str, int], int] = {}
    for effect in effects:
        if isinstance(effect, Step):
            unanswered[effect.encoder, effect.version] = len(effect.contributions)
        for receipt in sent([effect], Receipt):
            if receipt.accepted and unanswered.get((receipt.encoder, receipt.version)):
                unanswered[receipt.encoder, receipt.version] -= 1
        if isinstance(effect, Publish):
            assert not unanswered.get((effect.encoder, effect.version))
            published[effect.encoder] = max(published.get(effect.encoder, -1), effect.version)
        if isinstance(effect, Conclude):
            assert published[effect.encoder] == effect.version
        if isinstance(effect, Send | Broadcast) and isinstance(effect.message, Notice | Finish):
            assert published[effect.message.encoder] >= effect.message.version


def again(log: list[Entry], run: Storm) -> None:
    """The log as it lies on disk leads another coordinator to the same state and the same effects."""
    other, effects = Coordinator(), []
    for entry in log:
        body = unpack(pack(entry.body))
        effects += other.handle(Entry(entry.offset, entry.message_id, entry.at, body, entry.facts, entry.payload))
    assert other.state.model_dump_json() == run.coordinator.state.model_dump_json()
    assert effects == run.effects


def test_an_update_of_an_earlier_incarnation_is_no_duplicate_of_this_ones() -> None:
    run = Scenario(rule=aggregation_rule("fedavg"))
    name = run.generate()
    for node in "abc":
        run.join(node, name)
    run.update("a", name, 0)  # waits in the buffer, and is counted whatever becomes of its incarnation
    run.join("a", name, incarnation="second")
    renewed = run.manifest("a", name, 0, incarnation="second", digest="2" * 64)
    run.apply(renewed, *run.payload(renewed))
    assert run.apply(renewed) == [], "the same update again is waiting, not in conflict with the older one"
    run.update("b", name, 0)
    effects = run.update("c", name, 0)
    assert [r.incarnation for r in receipts(effects, "a")] == ["first", "second"]
    assert [r.accepted for r in receipts(effects, "a")] == [True, True]
    late = run.apply(run.manifest("a", name, 0))
    assert [r.accepted for r in receipts(late, "a")] == [True], "it is in the log, and answered alike"


def test_who_waited_when_a_run_ended_is_told_nothing_of_the_next() -> None:
    run = Scenario(rule=aggregation_rule("fedasync"), stop=StopRule(versions=1))
    name = run.generate()
    run.join("gone", name)
    run.update("gone", name, 0)
    run.apply(Continue(sender="operator", encoder=name))
    run.join("b", name)
    run.apply(Configured(settings=Settings(rule=aggregation_rule("fedasync"))))
    assert [m.version for m in sent(run.update("b", name, 0), Notice, "b")] == [2]
    assert sent(run.effects, Notice, "gone") == []
