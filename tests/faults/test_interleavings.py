"""Thousands of interleavings of master, nodes and broker, with every fault between them; and that the harness can fail.

`FAULT_EXAMPLES=5000 pytest tests/faults/test_interleavings.py` looks further than the suite does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from common.wire.to_master import UpdateManifest, Words
from master_service.decisions import gathering
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Effect, Send, Step
from master_service.decisions.records import Entry, Loggable
from master_service.decisions.state import EncoderState, State
from master_service.decisions.verdicts import accepted
from master_service.log.message_log import MessageLog
from master_service.record import Recorder
from tests.faults.interleavings import FAULTS, RULES, STOPS, Act, Plan, weather
from tests.faults.simulated import MemorySnapshots, simulated
from tests.faults.tiny import sends_whole
from tests.faults.workbench import Violation

EXAMPLES = int(os.environ.get("FAULT_EXAMPLES", "600"))
FOUND = Path(__file__).parents[1] / "logs" / "counterexamples.json"


def _actions() -> list[Act]:
    """What may happen next, the likelier the more often it is here; simple things first, to shrink towards them."""
    plain: list[Act] = [("run", 1), ("run", 4), ("run", 15), *([("run", 40)] * 3)]
    node: list[Act] = []
    for each in range(4):
        node += [*([("train", each)] * 6), ("hear", each), ("hear", each), ("send", each), ("send", each)]
        node += [("read", each), ("alive", each), ("ask", each), ("leave", each), ("start_node", each)]
        node += [("start_node", each), ("channel", each), ("wipe", each), ("backup", each), ("restore", each)]
        node += [("restart_node", each), *(("kill_node", each, steps) for steps in (0, 1, 2, 3, 5))]
        node += [("fault", each, fault) for fault in FAULTS]
    master: list[Act] = [("take", each) for each in ("inbox", "updates", "chunks")] * 5
    master += [("prefetch", each) for each in ("inbox", "updates", "chunks")]
    master += [("kill_master", steps) for steps in (0, 1, 2, 3, 4, 6, 9, 13, 20)] * 2
    master += [("restart_master", True), ("restart_master", False), ("start_master", True), ("start_master", False)] * 3
    master += [
        ("stop_master",),
        ("snapshot",),
        ("snapshot",),
        ("channel", "master"),
        ("chunks_missing",),
        ("deadly",),
    ] * 2
    master += [("fault", "master", fault) for fault in FAULTS] * 2
    master += [*(("kill_broker", late) for late in (0, 1, 2, 3, 5, 8, 13)), ("wipe_broker",), ("wipe_broker",)]
    master += [("later", 5.0), ("later", 31.0), ("later", 46.0), *(("settings", rule) for rule in RULES)]
    operator: list[Act] = [("operator", what) for what in ("stop", "continue", "continue", "get", "image")]
    operator += [("fault", "operator", fault) for fault in FAULTS]
    return [*plain * 3, *node, *master, *operator]


PLANS = st.builds(
    Plan,
    rule=st.sampled_from(RULES),
    nodes=st.integers(1, 4),
    present=st.integers(1, 4),
    min_nodes=st.sampled_from([1, 1, 2]),
    stop=st.sampled_from([0, 0, 0, 0, *range(1, len(STOPS))]),
    warm=st.booleans(),
    assets=st.sampled_from([0, 0, 1, 2]),
    words=st.sampled_from([False, False, True]),
    # short ones first, to shrink towards them; left alone, hypothesis draws few long lists
    actions=st.one_of(
        *(st.lists(st.sampled_from(_actions()), min_size=size, max_size=80) for size in (0, 20, 40, 60))
    ).map(tuple),
)
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.fixture(scope="module", autouse=True)
def _simulated() -> Iterator[None]:
    with simulated():
        yield


@settings(QUICK, max_examples=EXAMPLES)
@given(PLANS)
def test_whatever_happens_nothing_is_lost_and_nothing_is_doubled(plan: Plan) -> None:
    weather(plan)


# --- every labelled step, one after the other ------------------------------------------------------------------------

#: Everything that a short federation does: two nodes, an operator who wants another encoder, a snapshot, an end.
SHORT: tuple[Act, ...] = (
    ("run", 20),
    ("train", 0),
    ("train", 1),
    ("operator", "image"),
    ("run", 20),
    ("snapshot",),
    ("train", 0),
    ("run", 20),
    ("operator", "stop"),
    ("run", 20),
)
AGAIN: tuple[Act, ...] = tuple(act for each in SHORT for act in (each, ("start_master",), ("start_node", 0)))


#: The beginning alone: words of two nodes make an encoder that is trained once.
GATHERING: tuple[Act, ...] = (("run", 20), ("start_master", False), ("train", 0), ("run", 10), ("start_master", False))


@pytest.mark.parametrize("what", ["from-snapshot", "from-log", "words"])
def test_the_master_is_killed_at_every_step(what: str) -> None:
    """From the log, also where it makes a second encoder and the assets of that; and where nodes' words make one."""
    instead: dict[Act, Act] = {("start_master",): ("start_master", what == "from-snapshot")}
    if what == "from-snapshot":
        instead["operator", "image"] = ("operator", "get")
    again = GATHERING if what == "words" else tuple(instead.get(act, act) for act in AGAIN)
    words, assets = what == "words", {"from-snapshot": 0, "from-log": 2, "words": 1}[what]
    killed, reached, step = set[str](), set[str](), 0
    while step < 400:
        step += 1
        actions = (("kill_master", step), *again)
        seen = weather(Plan("return-count", 2, 2, warm=False, assets=assets, words=words, actions=actions)).seen
        died = {label.removeprefix("killed: ") for label in seen if label.startswith("killed: master")}
        killed |= died
        reached |= {label.replace(":", "", 1) for label in seen if label.startswith("master: ")}
        if not died:
            break
    assert killed == reached and len(killed) > (12 if words else 14), reached - killed


def test_a_node_is_killed_at_every_step() -> None:
    killed, reached = set[str](), set[str]()
    for step in range(1, 400):
        seen = weather(Plan("fedavg", 2, 2, warm=False, assets=2, actions=(("kill_node", 0, step), *AGAIN))).seen
        died = {label.removeprefix("killed: ") for label in seen if label.startswith("killed: node")}
        killed |= died
        reached |= {label.removeprefix("node: ") for label in seen if label.startswith("node: ")}
        if not died:
            break
    assert killed == reached and len(killed) == 9, reached - killed


def test_chunks_that_a_broker_lost_when_it_restarted_are_sent_again() -> None:
    """They are transient; the manifests that announce them are not, nor what travels in these."""
    sent = (("run", 20), ("train", 0), ("train", 1), *[("send", 0), ("send", 1)] * 3)
    world = weather(Plan("return-count", 2, 2, warm=False, actions=(*sent, ("kill_broker", 0))))
    assert world.seen["transient: gone"] >= 2
    again = [body for body in world.disk.log().bodies("update") if isinstance(body, UpdateManifest) and body.attempt]
    assert {body.node for body in again} == {name for name in world.nodes if not sends_whole(name)}


# --- what was found ---------------------------------------------------------------------------------------------------


def _found() -> list[Any]:
    """The recorded plans."""
    cases = []
    for case in json.loads(FOUND.read_text()):
        actions = tuple(tuple(act) for act in case["plan"].pop("actions"))
        cases.append(pytest.param(Plan(**case["plan"], actions=actions), id=case["name"]))
    return cases


@pytest.mark.parametrize("plan", _found())
def test_what_was_found_once_stays_mended(plan: Plan) -> None:
    weather(plan)


# --- the harness can fail: each defect reaches into what is nobody else's ---------------------------------------------


def ack_before_append(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Recorder.record

    def record(self: Recorder, todo: Any, **named: Any) -> None:
        self._broker.ack(*todo.deliveries)
        real(self, todo, **named)

    monkeypatch.setattr(Recorder, "record", record)


# private: a defect is put where the code would have it
def settled_updates_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coordinator, "_known_update", lambda self, encoder, manifest: False)


# private: a defect is put where the code would have it
def receipts_before_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Recorder._send_out

    def send_out(self: Recorder, effects: list[Effect]) -> None:
        for step in [each for each in effects if isinstance(each, Step)]:
            encoder = self.state.encoders[step.encoder]
            ahead = encoder.model_copy(update={"version": step.version})
            real(self, [Send(w.item.node, accepted(ahead, w.item, w.weight, 0, 1)) for w in encoder.stepping])
        real(self, effects)

    monkeypatch.setattr(Recorder, "_send_out", send_out)


# private: a defect is put where the code would have it
def duplicates_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Coordinator._duplicate

    def duplicate(self: Coordinator, encoder: EncoderState, manifest: UpdateManifest) -> list[Effect]:
        encoder.members[manifest.node].returns += 1
        return real(self, encoder, manifest)

    monkeypatch.setattr(Coordinator, "_duplicate", duplicate)


def effects_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MessageLog.append

    def append(self: MessageLog, body: Loggable, **named: Any) -> Entry | None:
        return real(self, body, **{**named, "carried_out": self.last_offset + 1})

    monkeypatch.setattr(MessageLog, "append", append)


def snapshots_without_receipts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MemorySnapshots.read

    def read(self: MemorySnapshots) -> Any:
        fold = real(self)
        for encoder in fold.coordinator.state.encoders.values():
            for member in encoder.members.values():
                member.settled = {}
        return fold

    monkeypatch.setattr(MemorySnapshots, "read", read)


def lost_versions_are_only_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("membership", "streams"):
        name = f"master_service.decisions.{room}.publish_again"
        monkeypatch.setattr(name, lambda settings, encoder, sought, at: [])


def lost_assets_are_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("master_service.decisions.membership.provide_again", lambda encoder, at: [])


def words_are_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gathering.counts

    def counts(state: State, body: Words) -> bool:
        forgetful = {name: each.model_copy(update={"answered": {}}) for name, each in state.encoders.items()}
        return real(state.model_copy(update={"encoders": forgetful}), body)

    monkeypatch.setattr(gathering, "counts", counts)


def answers_of_another_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("master_service.decisions.coordinator.issued", lambda encoder, receipt: receipt)


#: The master starts again when one of two nodes has answered with its words, and asks it again.
ASKED_TWICE = Plan(
    nodes=2,
    present=2,
    warm=False,
    words=True,
    actions=(("send", 0), ("take", "inbox"), ("hear", 0), ("send", 0), ("take", "inbox"), ("restart_master", True)),
)


def test_the_harness_notices_words_that_are_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weather(ASKED_TWICE)
    words_are_counted_again(monkeypatch)
    with pytest.raises(Violation, match="count more than once"):
        weather(ASKED_TWICE)


@pytest.mark.parametrize(
    "mutate",
    [
        ack_before_append,
        settled_updates_are_forgotten,
        receipts_before_the_row,
        duplicates_are_counted,
        effects_are_not_repeated,
        snapshots_without_receipts,
        lost_versions_are_only_named,
        lost_assets_are_not_written_again,
        answers_of_another_chain,
    ],
)
def test_the_harness_can_fail(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(plan: Plan) -> bool:
        try:
            weather(plan)
        except AssertionError:
            return True
        return False

    mutate(monkeypatch)
    once = settings(QUICK, max_examples=1500, phases=[Phase.generate], database=None)
    find(PLANS, fails, settings=once)  # raises NoSuchExample if nothing is noticed
