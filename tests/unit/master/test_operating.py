"""What operators do while it runs: it holds from the next decision on, in the log, and in whatever is made of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.errors import UserError
from common.wire.to_master import Admit, Change, Fetch, Get, Join, Kick, Leave, Pause, Resume, Stop, Words
from common.wire.to_node import Answer, Instruction, Rule, Withdrawn, verdict
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.decisions import operating
from master_service.decisions.changes import Logged, above, changed, still_live
from master_service.decisions.effects import Conclude, Effect, Generate, Send, Step
from master_service.decisions.records import Configured, Gathering, Presence, Started, Tick
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.rules.weights import STEPS_BOUND
from master_service.decisions.settings import Settings, StopRule, settings_of_start
from master_service.decisions.stopping import progress
from master_service.history.fold import Fold
from master_service.history.replay import origin, verify
from master_service.history.snapshot import read_snapshot
from master_service.log.message_log import open_log
from master_service.record import Todo
from node_service.handover.store import MemoryStore
from tests.unit.master.test_fold import Federation, snapshot
from tests.unit.master.test_replay import by, decided_anew
from tests.unit.scenario import Scenario, receipts, sent
from tests.unit.stepped import SteppedMaster, SteppedNode, together

ALL = {"rule": aggregation_rule("fedasync", {"guards": {"norm_clip": None}}), "stop": StopRule(versions=100)}


def running(**changes: Any) -> tuple[Scenario, str]:
    run = Scenario(**{**ALL, **changes})
    name = run.generate()
    for node in "ab":
        run.join(node, name)
    return run, name


def change(run: Scenario, member: str | None = None, back: tuple[str, ...] = (), **changes: Any) -> list[Effect]:
    """`update__when__steps=5` for update.when.steps."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return run.apply(Change(sender="op-1", changes=named, back=list(back), member=member))


def test_a_change_holds_from_the_next_decision_on_and_nodes_are_told_at_once() -> None:
    run, name = running()
    [before] = [each for each in run.update("a", name, 0) if isinstance(each, Step)]
    told = change(run, rule__outer__lr=2, update__when__steps=7, stop__versions=3)
    assert {rule.node: rule.update_rule.when.steps for rule in sent(told, Rule)} == {"a": 7, "b": 7}
    [answer] = sent(told, Answer, "op-1")
    assert answer.accepted and answer.detail.splitlines() == [
        "rule.outer.lr: 0.6 → 2.0",
        "update.when.steps: 25 → 7",
        "stop.versions: 100 → 3",
    ]
    [after] = [each for each in run.update("a", name, 1) if isinstance(each, Step)]
    assert (before.outer.lr, after.outer.lr) == (0.6, 2.0)
    assert not sent(change(run, rule__outer__lr=1), Rule), "nodes have nothing to do with that"
    # one that has the rule of now, whenever it comes
    assert [rule.update_rule.when.steps for rule in sent(run.join("c", name), Rule)] == [7]


def test_a_limit_that_is_passed_already_ends_the_training_at_once() -> None:
    run, name = running()
    run.update("a", name, 0)
    told = change(run, stop__versions=1)
    assert [type(each) for each in told if isinstance(each, Conclude)] == [Conclude]
    assert run.coordinator.state.encoders[name].reason == "1 versions"


def test_one_node_alone_trains_by_its_own_and_everybody_elses_change_does_not_undo_it() -> None:
    run, name = running()
    assert [rule.node for rule in sent(change(run, "a", update__when__steps=5), Rule)] == ["a"]
    assert [rule.node for rule in sent(change(run, update__when__steps=9), Rule)] == ["b"]
    told = sent(change(run, update__inner__batch_size=4), Rule)
    assert {rule.node: (rule.update_rule.when.steps, rule.update_rule.inner.batch_size) for rule in told} == {
        "a": (5, 4),
        "b": (9, 4),
    }
    [back] = sent(change(run, "a", back=("update",)), Rule)
    assert back.node == "a" and back.update_rule.when.steps == 9
    assert run.coordinator.state.own == {}
    # what is believed of an update is what its node's own rule allows
    change(run, "a", update__when__steps=1)
    for sequence, node in enumerate("ab"):
        run.update(node, name, sequence, steps=5 * STEPS_BOUND, samples=5000)
    members = run.coordinator.state.encoders[name].members
    assert (members["a"].steps, members["b"].steps) == (STEPS_BOUND, 5 * STEPS_BOUND)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"changes": {"rule.outer.lr": 0}}, "rule: outer.lr: input should be greater than 0"),
        ({"changes": {"rule.outer.rl": 1}}, "rule: there is no setting 'outer.rl'; there are: lr, momentum"),
        ({"changes": {"encoder.architecture.hidden_size": 4}}, "cannot be changed while it runs"),
        ({"changes": {"master.encoding": "int8"}}, "cannot be changed while it runs"),
        ({"changes": {"outer.lr": 1}}, "by names such as rule.outer.lr"),
        ({"changes": {"rule": {"preset": "fedavg"}}}, "cannot be changed while it runs"),
        ({"changes": {"rule..lr": 1}}, "cannot be changed while it runs"),
        ({"changes": {"rule.preset": "fedprox"}}, "no aggregation rule 'fedprox'"),
        ({"changes": {"rule.combine.how": "median"}}, "needs 5 distinct nodes"),
        ({"changes": {"update.when": 5}}, "update: when: "),
        ({}, "nothing to change was named"),
        ({"back": ["rule.outer.lr"]}, "rule.outer.lr was not changed while it runs"),
        ({"changes": {"update.when.steps": 5}, "member": "z"}, "no node z is known here; there are: a, b"),
        ({"changes": {"stop.versions": 5}, "member": "a"}, "of one node alone"),
        ({"changes": {"update.evaluate_every": 5}, "member": "a"}, "of one node alone"),
    ],
)
def test_what_is_refused_is_one_line_and_changes_nothing_also_in_a_log(asked: dict[str, Any], words: str) -> None:
    run, _ = running()
    body = Change(sender="op-1", **asked)
    why = operating.refused(run.coordinator.state, body)
    assert words in why and "\n" not in why
    before = run.coordinator.state.model_copy(deep=True)
    [answer] = sent(run.apply(body), Answer)
    assert (answer.accepted, answer.detail) == (False, why)
    assert run.coordinator.state == before


def test_a_preset_is_a_whole_rule_and_null_takes_a_limit_away() -> None:
    configured = Settings(**ALL)
    live = above({"rule.outer.lr": 3.0, "stop.versions": 5}, {"rule.preset": "diloco", "rule.outer.momentum": 0.5})
    made = changed(configured, live)
    assert made.rule == aggregation_rule("diloco", {"outer": {"momentum": 0.5}}) and made.stop.versions == 5
    ended = changed(configured, {"stop.plateau.patience": 7, "stop.versions": None})
    assert ended.stop.versions is None and ended.stop.plateau is not None and ended.stop.plateau.patience == 7
    both = changed(configured, {"update.when.seconds": 30, "update.when.steps": None})
    assert both.update_rule == UpdateRule(when=ReturnWhen(seconds=30))


class Start:
    """A log whose master was started with a file of `lr` 0.6, and in which an operator has set 2.0."""

    logged = Logged(Settings(**ALL), {"rule.outer.lr": 2.0, "stop.versions": 7})

    @classmethod
    def again(cls, given: dict[str, Any], *, change: bool = False) -> tuple[Settings, dict[str, Any]]:
        """What holds after a start with a file that says `given`, and what of it operators have changed."""
        now = changed(cls.logged.configured, cls.logged.live)
        made = settings_of_start(cls.logged.configured, Settings(), given, change=change, now=now)
        live = still_live(cls.logged, made)
        return changed(made, live), live


def test_a_start_with_the_same_file_is_not_refused_and_undoes_nothing() -> None:
    file = {
        "rule": {"preset": "fedasync", "outer": {"lr": 0.6}, "guards": {"norm_clip": None}},
        "stop": {"versions": 100},
    }
    for said in ({}, file):
        made, live = Start.again(said)
        assert (made.rule.outer.lr, made.stop.versions) == (2.0, 7) and live == Start.logged.live
    # who has written the change into the file means the same by it
    made, live = Start.again({"rule": {"outer": {"lr": 2.0}}})
    assert (made.rule.outer.lr, made.stop.versions) == (2.0, 7) and live == {"stop.versions": 7}


def test_a_start_with_another_file_is_refused_with_what_holds_or_taken() -> None:
    other = {"rule": {"outer": {"lr": 3.0}}}
    with pytest.raises(UserError, match=r"rule\.outer\.lr: 2\.0 in the log, 3\.0 wanted"):
        Start.again(other)
    made, live = Start.again(other, change=True)
    assert (made.rule.outer.lr, made.stop.versions) == (3.0, 7) and live == {"stop.versions": 7}


def test_a_master_that_is_killed_goes_on_with_what_was_set_and_a_node_trains_by_it(
    server: MemoryServer, clock: VirtualClock
) -> None:
    served, node = SteppedMaster(server, clock).start(), SteppedNode(server, clock)
    node.start()
    together(5.0, served, node)
    served.master.recorder.record(Todo(Change(sender="op", changes={"rule.outer.lr": 2, "update.when.steps": 9})))
    together(2.0, served, node)
    assert node.training.rule.when.steps == 9
    again = SteppedMaster(server, clock, db=served.db, payloads=served.journal.log.payloads).start()
    state = again.master.state
    assert (state.settings.rule.outer.lr, state.settings.update_rule.when.steps) == (2.0, 9)
    assert state.live == {"rule.outer.lr": 2, "update.when.steps": 9}
    rows = [entry.body for entry in again.journal.log.entries() if isinstance(entry.body, Configured)]
    assert len(rows) == 1, "nothing is another, so there is nothing to say"


# --- rest ------------------------------------------------------------------------------------------------------------


def test_while_it_rests_no_version_is_made_no_time_runs_out_and_what_comes_counts_later() -> None:
    rule = aggregation_rule("return-count", {"buffer": {"grace_seconds": 60}})
    run, name = running(rule=rule, stop=StopRule(seconds=1000))
    encoder = run.coordinator.state.encoders[name]
    run.at += 100
    run.update("a", name, 0)
    run.at += 50
    told = run.apply(Pause(sender="op"))
    assert {each.node: each.paused for each in sent(told, Rule)} == {"a": True, "b": True}
    assert [each.detail for each in sent(told, Answer)] == [f"{name}: paused at version 0"]
    assert run.coordinator.deadline() is None
    run.at += 10_000
    assert [each.paused for each in sent(run.join("c", name), Rule)] == [True], "who comes meanwhile rests too"
    run.update("b", name, 0)
    run.apply(Tick())
    assert (encoder.version, encoder.status, len(encoder.buffer)) == (0, "running", 2)
    assert progress(encoder, StopRule(seconds=1000), run.at) == 0.15
    # nothing of what was counted is lost, nothing of the time is over
    told = run.apply(Resume(sender="op"))
    assert {each.node: each.paused for each in sent(told, Rule)} == {"a": False, "b": False, "c": False}
    assert [each.accepted for each in receipts(told)] == [True, True] and encoder.version == 1
    assert progress(encoder, StopRule(seconds=1000), run.at) == 0.15
    assert run.coordinator.deadline() == run.at + 850
    run.update("a", name, 1)
    assert run.coordinator.deadline() == run.at + 60, "the grace time of a new update is all of it"


def test_an_update_that_waited_before_the_rest_waits_as_long_after_it() -> None:
    run, name = running(rule=aggregation_rule("return-count", {"buffer": {"grace_seconds": 60}}))
    run.update("a", name, 0)
    run.at += 50
    run.apply(Pause(sender="op", encoder=name))
    run.at += 1000
    run.apply(Resume(sender="op", encoder=name))
    assert run.coordinator.deadline() == run.at + 10


def test_a_rest_before_the_training_begins_and_a_stop_in_the_midst_of_one() -> None:
    run = Scenario(**ALL, min_nodes=2)
    name = run.generate()
    run.join("a", name)
    run.apply(Pause(sender="op"))
    run.at += 500
    assert [each.paused for each in sent(run.join("b", name), Rule)] == [True, True]
    run.at += 500
    run.apply(Resume(sender="op"))
    encoder = run.coordinator.state.encoders[name]
    assert encoder.run_started_at == run.at
    run.apply(Pause(sender="op"))
    run.update("a", name, 0)
    told = run.apply(Stop(sender="op"))
    assert [each.accepted for each in receipts(told)] == [True] and encoder.status == "finished"
    assert operating.refused(run.coordinator.state, Resume(sender="op")) == "nothing is paused"


@pytest.mark.parametrize(
    ("before", "asked", "words"),
    [
        ((), Resume(sender="op"), "nothing is paused"),
        ((), Resume(sender="op", encoder="NAME"), "NAME is not paused"),
        ((), Pause(sender="op", encoder="other"), "no encoder other is known here; there are: NAME"),
        ((Pause(sender="op"),), Pause(sender="op"), "nothing is being trained that could be paused"),
        ((Pause(sender="op"),), Pause(sender="op", encoder="NAME"), "NAME is paused already"),
        ((Stop(sender="op"),), Pause(sender="op", encoder="NAME"), "NAME is finished: only what is being trained"),
    ],
)
def test_a_rest_that_cannot_be_is_refused(before: tuple[Any, ...], asked: Pause | Resume, words: str) -> None:
    run, name = running()
    for each in before:
        run.apply(each)
    if asked.encoder == "NAME":
        asked = asked.model_copy(update={"encoder": name})
    assert operating.refused(run.coordinator.state, asked).startswith(words.replace("NAME", name))


def test_a_node_rests_keeps_what_it_has_not_handed_in_and_says_so_also_when_both_start_again(
    server: MemoryServer, clock: VirtualClock
) -> None:
    store = MemoryStore()
    served, node = SteppedMaster(server, clock).start(), SteppedNode(server, clock, store=store).start()
    together(5.25, served, node)
    served.master.recorder.record(Todo(Pause(sender="op")))
    together(1.0, served, node)
    steps, since, [encoder] = node.training.steps, node.training.since.steps, served.master.state.encoders
    together(400.0, served, node)
    assert (node.training.steps, node.training.since.steps) == (steps, since) and steps > 0
    assert node.node.figures.doing == "paused by the operator"
    report = served.master.report().encoders[encoder]
    assert report.paused and report.members["a"].active, "it gives signs of life"
    served.master.close()
    again = SteppedMaster(server, clock, db=served.db, payloads=served.journal.log.payloads).start()
    restarted = SteppedNode(server, clock, store=store).start()
    together(30.0, again, restarted)
    assert restarted.training.steps == 0
    again.master.recorder.record(Todo(Resume(sender="op")))
    version = again.master.state.encoders[encoder].version
    together(30.0, again, restarted)
    assert restarted.training.steps > 0 and again.master.state.encoders[encoder].version > version
    assert restarted.node.figures.doing == "training"


# --- who takes part --------------------------------------------------------------------------------------------------


def test_a_node_that_is_out_is_waited_for_by_nobody_and_what_was_counted_of_it_stays() -> None:
    run, name = running(rule=aggregation_rule("fedavg"))
    run.join("c", name)
    encoder = run.coordinator.state.encoders[name]
    run.update("a", name, 0)
    run.update("c", name, 0)
    told = run.apply(Kick(sender="op", member="b", reason="a broken GPU"))
    assert [each.accepted for each in receipts(told)] == [True, True], "the cohort is whole without it"
    [out] = sent(told, Withdrawn, "b")
    assert out.kicked and out.reason == "a broken GPU" and out.encoder == name
    assert sent(told, Answer)[0].detail == "b is out; what was counted of it stays counted"
    # what it hands in is answered at once, with the reason, and nothing of it is fetched
    late = run.manifest("b", name, 0)
    assert not run.coordinator.wants_payload(late)
    [receipt] = receipts(run.apply(late))
    assert (receipt.reason, verdict(receipt)) == ("kicked", "kicked")
    assert receipt.detail == "an operator has taken b out of the training: a broken GPU"
    # and one that has handed in before stays counted
    run.update("a", name, 1)
    told = run.apply(Kick(sender="op", member="a"))
    assert len(encoder.buffer) == 1 and encoder.members["a"].returns == 2
    assert [each.node for each in receipts(run.update("c", name, 1)) if each.accepted] == ["a", "c"]


def test_a_node_that_is_out_stays_out_whatever_it_says_until_it_is_let_in() -> None:
    run, name = running()
    run.apply(Kick(sender="op", member="a"))
    fetch = Fetch(node="a", incarnation="first", encoder=name, have_version=-1)
    for said in (run.join("a", name), run.apply(fetch), run.join("a", name, incarnation="second")):
        messages = [each.message for each in said if isinstance(each, Send)]
        assert messages and all(isinstance(each, Withdrawn) and each.kicked for each in messages)
    # a stranger to this incarnation is not asked to join, which would go on for ever
    other = run.manifest("a", name, 5, incarnation="second")
    assert [each.kicked for each in sent(run.apply(other), Withdrawn)] == [True]
    assert not sent(run.apply(Presence(node="a", present=False)), Rule)
    run.apply(Presence(node="a", present=True))
    assert list(run.coordinator.state.encoders[name].active()) == ["b"]
    told = run.apply(Admit(sender="op", member="a"))
    assert [each.encoder for each in sent(told, Instruction, "a")] == [name]
    assert sent(run.join("a", name, incarnation="second"), Rule, "a")
    assert list(run.coordinator.state.encoders[name].active()) == ["a", "b"]
    assert [
        operating.refused(run.coordinator.state, each)
        for each in (Admit(sender="op", member="a"), Kick(sender="op", member="z"))
    ] == ["a is not out", "no node z is known here; there are: a, b"]


def test_words_of_a_node_that_is_out_are_neither_wanted_nor_counted() -> None:
    run = Scenario()
    for node in "abc":
        run.apply(Join(node=node, incarnation="first", types=["text"]))
    [generate] = run.apply(Get(sender="operator", encoder_type="text"))
    name = generate.encoder  # type: ignore[union-attr]
    run.apply(Gathering(encoder=name))
    words = Words(node="a", incarnation="first", encoder=name, documents=9, words=[("word", 3)])
    for node in "ab":
        run.apply(words.model_copy(update={"node": node}))
    assert run.coordinator.state.encoders[name].status == "gathering"
    told = run.apply(Kick(sender="op", member="c"))
    assert [type(each) for each in told if isinstance(each, Generate)] == [Generate], "nobody else is waited for"
    assert not run.coordinator.wants_words(words.model_copy(update={"node": "c"}))


def test_a_node_lets_go_says_so_once_and_trains_again_when_it_is_let_in(
    server: MemoryServer, clock: VirtualClock, capsys: pytest.CaptureFixture[str]
) -> None:
    served, node = SteppedMaster(server, clock).start(), SteppedNode(server, clock).start()
    together(5.0, served, node)
    served.master.recorder.record(Todo(Kick(sender="op", member="a", reason="a test")))
    together(300.0, served, node)
    assert not node.node.ready
    steps = node.training.steps
    words = "taken out by the master's operator: a test; waiting to be let in again"
    assert node.node.figures.doing == words
    assert capsys.readouterr().err.count(words) == 1
    [encoder] = served.master.report().encoders.values()
    assert encoder.members["a"].kicked and not encoder.members["a"].active
    returns = encoder.members["a"].returns
    served.master.close()
    again = SteppedMaster(server, clock, db=served.db, payloads=served.journal.log.payloads).start()
    together(60.0, again, node)
    assert not node.node.ready and node.node.figures.doing == words and again.master.state.kicked == {"a": "a test"}
    again.master.recorder.record(Todo(Admit(sender="op", member="a")))
    together(30.0, again, node)
    [encoder] = again.master.report().encoders.values()
    assert encoder.members["a"].active and encoder.members["a"].returns > returns
    assert len(node.built) == 1 and node.training.steps > steps > 0, "what it had learned for itself is still there"


# --- any order -------------------------------------------------------------------------------------------------------

DID = st.lists(
    st.tuples(
        st.sampled_from(
            ["update", "update", "update", "set", "own", "back", "tick", "leave", "restart", "pause", "resume"]
        ),
        st.sampled_from("abc"),
        st.integers(0, 4),
    ),
    min_size=5,
    max_size=25,
)
SET = (
    {"rule.outer.lr": 2.0},
    {"rule.preset": "fedavg", "rule.buffer.grace_seconds": 5},
    {"rule.buffer.kind": "count", "rule.buffer.size": 2, "update.when.steps": 3},
    {"rule.weights.staleness_exponent": 1.0, "update.encoding": "float32"},
    {"rule.outer.optimizer": "nesterov", "rule.outer.momentum": 0.5},
)


def did(run: Federation, actions: list[tuple[str, str, int]]) -> None:
    for sequence, (action, node, number) in enumerate(actions):
        run.at += 3.0 * number
        match action:
            case "update":
                run.update(node, sequence)
            case "set":
                run.record(Change(sender="op", changes=SET[number]))
            case "own":
                run.record(Change(sender="op", changes={"update.when.steps": number + 1}, member=node))
            case "back":
                run.record(Change(sender="op", back=["rule"]))
            case "tick":
                run.record(Tick())
            case "kick" | "admit":
                run.record({"kick": Kick, "admit": Admit}[action](sender="op", member=node))
            case "join":
                run.join(node)
            case "pause" | "resume":
                run.record({"pause": Pause, "resume": Resume}[action](sender="op"))
            case "leave" if number == 0:
                run.record(Leave(node=node, incarnation="i"))
            case "restart":
                run.record(Started(epoch=sequence + 2, fingerprint={}))


@settings(max_examples=25, deadline=None)
@given(DID)
def test_from_any_row_recovery_leads_to_the_same_state_and_replay_to_the_same_bits(
    actions: list[tuple[str, str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        run = Federation(directory, "fedasync", size=40)
        half = len(actions) // 2
        did(run, actions[:half])
        snapshot(run)
        did(run, [(action, node, number) for action, node, number in actions[half:]])
        reader = open_log(directory, read_only=True)
        for fold in (origin(reader).fold, read_snapshot(directory / "snapshots", reader)):
            assert all(check is None or check.identical for _, check in verify(reader, fold))
            same(fold, run)
        again = decided_anew(run).fold
        assert again.coordinator.state == run.fold.coordinator.state
        # and so does a counterfactual that changes nothing, but for limits that it has none of
        nothing = decided_anew(run, lambda settings: settings).fold
        assert nothing.arithmetic.digest(run.encoder) == run.state.digest
        # by one rule all along, whatever was set: what was set of it is overruled
        other = decided_anew(run, by(aggregation_rule("fedbuff"))).fold.coordinator.state
        assert other.settings.rule == aggregation_rule("fedbuff")


def same(fold: Fold[Any], run: Federation) -> None:
    assert fold.coordinator.state == run.fold.coordinator.state
    assert fold.arithmetic.digest(run.encoder) == run.state.digest
