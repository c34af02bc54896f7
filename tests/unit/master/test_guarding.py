"""Claims are not facts: what one member may say and send, and what comes of it for the others."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.wire.fields import MAX_COUNT
from common.wire.to_master import Continue, Stop
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.decisions.effects import Step
from master_service.decisions.guarding import KEPT, allowed_steps, believed
from master_service.decisions.records import Configured, Tick
from master_service.decisions.rules.model import GuardRule, aggregation_rule
from master_service.decisions.rules.weights import STEPS_BOUND
from master_service.decisions.settings import Claims, LossPlateau, Settings, StopRule, carried_over
from master_service.decisions.state import Buffered, EncoderState, State
from tests.unit.scenario import Scenario, receipts

ARRIVAL = aggregation_rule("fedasync", {"weights": {"staleness": "constant"}})
STEPS = 25


class Run:
    """Members that have acked; every update is a version of its own once a second node is known."""

    def __init__(self, *nodes: str, claims: Claims = "compared", **changes: object) -> None:
        self.scenario = Scenario(claims=claims, **{"rule": ARRIVAL, "stop": StopRule(versions=10**6), **changes})
        self.name = self.scenario.generate()
        for node in nodes:
            self.scenario.join(node, self.name, samples=1000)
        self._sequence = 0

    @property
    def encoder(self) -> EncoderState:
        return self.scenario.coordinator.state.encoders[self.name]

    def update(self, node: str, norm: float = 5.0, **changes: object) -> dict[str, float]:
        """An update; what moved of it and of others at once, by node: ‖coefficient·Δ‖ in a buffer of one."""
        self._sequence += 1
        plain = {"steps": STEPS, "samples": 400, **changes}
        manifest = self.scenario.manifest(node, self.name, self._sequence, **plain)
        facts, payload = self.scenario.payload(manifest, norm=norm)
        effects = self.scenario.apply(manifest, facts, payload)
        self.norms = getattr(self, "norms", {}) | {payload: (node, norm)}
        steps = [effect for effect in effects if isinstance(effect, Step)]
        return {
            self.norms[each.payload][0]: each.coefficient * len(step.contributions) * self.norms[each.payload][1]
            for step in steps
            for each in step.contributions
        }


# --- norms -----------------------------------------------------------------------------------------------------------


def test_the_first_updates_wait_for_a_second_nodes_and_are_cut_to_twice_the_smallest() -> None:
    run = Run("noisy", "a", "b")
    assert run.update("noisy", norm=5000.0) == {} and run.update("noisy", norm=7000.0) == {}
    moved = run.update("a", norm=5.0)
    assert moved == pytest.approx({"noisy": 10.0, "a": 5.0})


def test_nobody_waits_longer_than_the_grace_time_and_who_is_alone_not_at_all() -> None:
    run = Run("a")
    assert run.update("a", norm=3.0) == {"a": 3.0}
    run = Run("a", "b")
    assert run.update("a") == {}
    deadline = run.scenario.coordinator.deadline()
    assert deadline is not None
    run.scenario.at = deadline
    assert [each.node for each in receipts(run.scenario.apply(Tick()))] == ["a"]


def test_huge_updates_do_not_make_room_for_others() -> None:
    run = Run("noisy", "a", "b", "c")
    for node in "abc":
        run.update(node)
    for _ in range(40):  # three a second
        assert run.update("noisy", norm=5000.0)["noisy"] <= 10.0 + 1e-9
    for node in "abc":
        assert run.update(node) == {node: 5.0}, "and the honest ones are not cut"


def test_an_update_of_nothing_chokes_nobody() -> None:
    run = Run("idle", "a", "b")
    run.update("idle", norm=0.0)
    assert run.update("a") == {"idle": 0.0, "a": 5.0}
    for _ in range(20):
        run.update("idle", norm=0.0)
    assert run.update("b") == {"b": 5.0}


def test_updates_of_nothing_say_nothing_of_what_is_usual_though_most_send_them() -> None:
    run = Run("idle", "idler", "idlest", "a", "b")
    for node in "ab":
        run.update(node)
    for _ in range(KEPT):
        for node in ("idle", "idler", "idlest"):
            run.update(node, norm=0.0)
    assert run.update("a") == {"a": 5.0}


def test_a_claim_of_many_steps_does_not_hide_a_huge_update() -> None:
    run = Run("noisy", "a", "b", update_rule=UpdateRule(when=ReturnWhen(seconds=10.0)))
    for node in "ab":
        run.update(node)
    moved = run.update("noisy", norm=5e9, steps=MAX_COUNT)["noisy"]
    assert moved == pytest.approx(2 * 5.0 * STEPS_BOUND**0.5)


NORMS = st.floats(0.5, 2.0)
LIES = st.floats(0.0, 1e12) | st.sampled_from([0.0, 1e-30, 1e30])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), NORMS, LIES), min_size=1, max_size=60))
def test_while_most_are_honest_nobody_moves_more_than_twice_an_honest_one_and_no_honest_one_is_choked(
    said: list[tuple[bool, float, float]],
) -> None:
    run = Run("a", "b", "c", "liar")
    for node in ("a", "b", "c"):
        run.update(node, norm=1.0)
    for number, (lies, norm, lie) in enumerate(said):
        node = "liar" if lies else "abc"[number % 3]
        moved = run.update(node, norm=lie if lies else norm)[node]
        assert moved <= 2 * 2.0 * (1 + 1e-9)
        assert lies or moved >= min(norm, 2 * 0.5) * (1 - 1e-9)
    assert run.encoder.tally.norms == sorted(
        statistics.median(member.norms) for member in run.encoder.members.values() if member.norms
    )
    assert all(len(member.norms) <= KEPT for member in run.encoder.members.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 6), LIES, st.lists(NORMS, min_size=5, max_size=5), st.integers(1, MAX_COUNT))
def test_a_liar_in_the_first_version_chokes_nobody_and_makes_no_room_for_itself(
    nodes: int, lie: float, honest: list[float], steps: int
) -> None:
    """A robust rule waits for every node, so a liar of them is there by necessity."""
    names = ["liar", *"abcde"[: nodes - 1]]
    run = Run(*names, rule=aggregation_rule("fedavg"), update_rule=UpdateRule(when=ReturnWhen(seconds=10.0)))
    for _ in range(3):
        said = {name: honest[number] for number, name in enumerate(names[1:])}
        for name, norm in said.items():
            assert not run.update(name, norm=norm)
        moved = run.update("liar", norm=lie, steps=steps)
        for name, norm in said.items():
            # four times: the honest ones differ by that, and the lower of two in the middle may be the least of them
            assert moved[name] >= min(norm, 2 * min(said.values())) * (1 - 1e-9)
        assert moved["liar"] <= 2 * max(said.values()) * STEPS_BOUND**0.5 * (1 + 1e-9)


@pytest.mark.parametrize("claims", ["checked", "compared"])
def test_after_a_tiny_one_in_the_first_version_the_others_move_as_far_as_they_trained(claims: Claims) -> None:
    run = Run("rider", "a", "b", claims=claims, rule=aggregation_rule("fedavg"))
    for version in range(3):
        run.update("rider", norm=0.005), run.update("a")
        moved = run.update("b")
        held_back = {"a": 0.01 * (1 + version), "b": 0.01 * (1 + version)}  # as logs have it that masters before wrote
        assert {**moved, "rider": 0} == pytest.approx(
            {"rider": 0, **(held_back if claims == "checked" else {"a": 5.0, "b": 5.0})}
        )


def test_of_two_nodes_a_liar_never_makes_room_for_itself() -> None:
    run = Run("liar", "a")
    for _ in range(50):
        run.update("liar", norm=1e6)
        run.update("a")
    assert run.update("liar", norm=1e6)["liar"] == pytest.approx(10.0)


# --- steps, samples, seconds ------------------------------------------------------------------------------------------


def test_what_a_rule_allows() -> None:
    assert allowed_steps(UpdateRule(when=ReturnWhen(steps=10), away_steps=500)) == 500
    assert allowed_steps(UpdateRule(when=ReturnWhen(steps=10, samples=32), away_steps=1)) == 2
    assert allowed_steps(UpdateRule(when=ReturnWhen(steps=10))) == 10 * STEPS_BOUND
    assert allowed_steps(UpdateRule(when=ReturnWhen(), away_steps=25)) == 25
    assert allowed_steps(UpdateRule(when=ReturnWhen(seconds=5.0), away_steps=25)) is None


def test_whoever_claims_everything_weighs_as_others_do() -> None:
    rule = UpdateRule(when=ReturnWhen(steps=STEPS), away_steps=STEPS)
    run = Run("liar", "a", "b", rule=aggregation_rule("fedavg"), update_rule=rule)
    run.scenario.at += 50.0
    claims = {"steps": MAX_COUNT, "samples": MAX_COUNT, "seconds": 1e300}
    run.update("liar", **claims)
    run.update("a")
    moved = run.update("b")
    assert moved == pytest.approx({"liar": 5.0, "a": 5.0, "b": 5.0})
    liar = run.encoder.members["liar"]
    assert (liar.steps, liar.samples_seen, liar.seconds) == (STEPS, 16 * STEPS, 50.0)


def test_nobody_weighs_by_more_samples_than_it_has() -> None:
    run = Run(rule=aggregation_rule("fedavg"))
    run.scenario.join("small", run.name, samples=100)
    run.scenario.join("large", run.name, samples=10_000)
    run.update("small")
    assert run.update("large") == pytest.approx({"small": 5 * 2 / 5, "large": 5 * 8 / 5})


def test_nothing_counts_before_the_training_has_started() -> None:
    run = Run("early", min_nodes=2)
    run.update("early", norm=1e9)
    [receipt] = receipts(run.scenario.effects)
    assert (receipt.accepted, receipt.reason) == (False, "early") and not run.encoder.buffer
    assert not run.scenario.coordinator.wants_payload(run.scenario.manifest("early", run.name, 99))
    run.scenario.join("second", run.name)
    run.update("early"), run.update("second")
    assert run.encoder.version == 1
    run.scenario.apply(Stop(sender="operator"))
    run.scenario.apply(Continue(sender="operator", encoder=run.name))
    run.scenario.join("early", run.name)
    run.update("early")
    assert receipts(run.scenario.effects)[-1].reason == "early", "and of another run neither"


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", [-1e308, -1e6, 1e308, float("nan"), float("-inf")])
def test_the_training_loss_that_one_claims_does_not_end_a_run(lie: float) -> None:
    run = Run("liar", "a", "b", stop=StopRule(versions=10**6, plateau=LossPlateau(patience=20)))
    for number in range(60):
        loss = 5.0 - 0.05 * number
        run.update("a", loss=loss), run.update("liar", loss=lie), run.update("b", loss=loss)
    assert run.encoder.status == "running"
    for _ in range(25):  # but where there is no gain it ends
        run.update("a", loss=3.0), run.update("liar", loss=lie), run.update("b", loss=3.0)
    assert run.encoder.status == "finished"


@pytest.mark.parametrize("lie", [-2e6, 2e6, float("nan")])
def test_a_training_loss_beyond_all_use_is_none(lie: float) -> None:
    run = Run("a")
    run.update("a", loss=lie)
    assert run.encoder.members["a"].claimed_loss is None
    run.update("a", loss=3.0)
    run.update("a", loss=lie)
    assert run.encoder.members["a"].claimed_loss == 3.0


@pytest.mark.parametrize("lie", [-1e308, -1e6, 1e6])
@pytest.mark.parametrize("falling", [True, False])
def test_the_held_out_loss_that_one_claims_ends_no_run_and_prolongs_none(lie: float, falling: bool) -> None:
    plateau = LossPlateau(patience=40)
    run = Run("liar", "a", "b", "c", stop=StopRule(versions=10**6, plateau=plateau))
    for number in range(200):
        if run.encoder.status != "running":
            break
        loss = 5.0 - (0.01 * number if falling else 0.0)
        for node in "abc":
            run.update(node, held_out=loss, held_out_version=run.encoder.version)
        run.update("liar", held_out=lie - number, held_out_version=run.encoder.version)
    assert run.encoder.status == ("running" if falling else "finished")
    assert run.encoder.best_held_out is not None and 0 < run.encoder.best_held_out <= 5.0


def test_a_window_that_a_liar_alone_measured_is_no_yardstick() -> None:
    run = Run("liar", "a", "b", stop=StopRule(versions=10**6, plateau=LossPlateau(patience=40)))
    run.update("liar", held_out=-5.0, held_out_version=0)
    run.update("a")
    for number in range(60):
        for node in "ab":
            run.update(node, held_out=5.0 - 0.01 * number, held_out_version=run.encoder.version)
    assert run.encoder.status == "running" and run.encoder.best_held_out == pytest.approx(4.5, abs=0.3)


# --- old logs ---------------------------------------------------------------------------------------------------------


def test_a_log_that_does_not_say_so_is_decided_as_it_was() -> None:
    row = Configured(settings=Settings(rule=ARRIVAL)).model_dump(mode="json")
    del row["claims"]
    assert Configured.model_validate(row).claims == "taken" and State().claims == "taken"
    assert State().settings.rule.guards.norm_clip == 10.0, "what masters left unsaid that wrote no row of settings"
    run = Run("noisy", "a", claims="taken", rule=aggregation_rule("fedasync", {"guards": {"norm_clip": 10.0}}))
    for _ in range(5):
        assert run.update("a") == {"a": 5.0}, "each at once"
    assert run.update("noisy", norm=5000.0)["noisy"] == pytest.approx(50.0)
    assert not run.encoder.tally.norms and len(run.encoder.norms) == 6


def test_a_master_that_goes_on_with_it_checks_from_there_on_by_todays_multiple() -> None:
    old = Settings(rule=aggregation_rule("fedasync", {"guards": {"norm_clip": 10.0}}))
    assert carried_over(old, "taken").rule.guards == GuardRule()
    assert carried_over(old, "checked") == old, "somebody wants it so"
    own = Settings(rule=aggregation_rule("fedasync", {"guards": {"norm_clip": 4.0}}))
    assert carried_over(own, "taken") == own
    run = Run("noisy", "a", "b", claims="taken", rule=old.rule)
    run.update("a")
    run.scenario.apply(Configured(settings=carried_over(old, "taken"), claims="compared"))
    run.update("noisy", norm=5000.0)
    assert run.update("b")["noisy"] == pytest.approx(10.0)


def test_of_an_update_alone_nothing_is_believed_beyond_its_claim() -> None:
    run = Run("a")
    item = Buffered(
        node="a", incarnation="first", sequence=0, digest="", payload="", encoding="int8", base_version=0, attempt=0,
        steps=100, samples=1, seconds=0.0, size=0, norm=30.0, loss=1.0,
    )  # fmt: skip
    [found] = believed(run.encoder, [item], 2.0, "compared")
    assert (found.made_of, found.factor, found.norm) == (100, 1.0, 3.0)
