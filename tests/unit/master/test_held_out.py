"""Held-out losses of the members: how they come together, what is the best version, and when there is no more gain."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.errors import Poison
from common.wire.codec import decode, encode
from common.wire.to_master import Continue, Leave, Stop, UpdateManifest
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.arithmetic.export import card
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Claims, LossPlateau, Settings, StopRule
from master_service.decisions.state import EncoderState, State
from tests.builders import update_manifest
from tests.unit.scenario import Scenario
from tests.unit.stepped import SteppedMaster, SteppedNode, together

ARRIVAL = aggregation_rule("fedasync")


class Run:
    """Every update is a version of its own, and members measure one of every ten."""

    def __init__(
        self, *nodes: str, plateau: LossPlateau | None = None, every: int = 10, claims: Claims = "compared"
    ) -> None:
        self.scenario = Scenario(
            rule=ARRIVAL,
            stop=StopRule(versions=100_000, plateau=plateau),
            update_rule=UpdateRule(evaluate_every=every),
            claims=claims,
        )
        self.name = self.scenario.generate()
        for node in nodes:
            self.scenario.join(node, self.name)
        self._sequences = dict.fromkeys(nodes, 0)

    @property
    def encoder(self) -> EncoderState:
        return self.scenario.coordinator.state.encoders[self.name]

    def update(self, node: str, loss: float | None = None, version: int | None = None, **changes: object) -> None:
        """An update that makes a version; what is measured is measured of the newest one, unless `version` says."""
        of = {"held_out": loss, "held_out_version": self.encoder.version if version is None else version}
        sequence, self._sequences[node] = self._sequences[node], self._sequences[node] + 1
        self.scenario.update(node, self.name, sequence, **(of if loss is not None else {}), **changes)

    def until(self, version: int, node: str) -> None:
        while self.encoder.version < version and self.encoder.status == "running":
            self.update(node)

    def window(self, losses: Mapping[str, float]) -> None:
        """What each says once in the next ten versions; the windows before these are closed at their end."""
        start = self.encoder.version
        for node, loss in losses.items():
            self.update(node, loss)
        self.until(start + 10, next(iter(losses)))


@pytest.mark.parametrize("claims", ["taken", "checked", "compared"])
def test_a_window_is_of_those_who_measured_in_it_and_closes_when_ten_more_are_made(claims: Claims) -> None:
    run = Run("a", "b", claims=claims)
    if claims != "taken":
        run.update("a"), run.update("b")  # the first version waits for both
        run.until(10, "a")
        run.window({"a": 4.0, "b": 2.0})
        run.until(40, "a")
        assert (run.encoder.best_held_out, run.encoder.best_version) == (3.0, 11)
        return
    run.window({"a": 4.0, "b": 2.0})
    assert run.encoder.held_out is None, "somebody may be slow"
    assert run.encoder.members["a"].held_out == (0, 4.0) and run.encoder.members["b"].held_out == (1, 2.0)
    run.update("b", 1.0, version=3)  # late, and newer than what it said before
    run.until(20, "a")
    assert (run.encoder.held_out, run.encoder.held_out_version) == (2.5, 3)
    assert (run.encoder.best_held_out, run.encoder.best_version) == (2.5, 3)
    run.update("b", 0.5, version=4)  # too late
    run.until(40, "a")
    assert run.encoder.best_held_out == 2.5 and not run.encoder.measured
    assert run.encoder.members["b"].held_out == (4, 0.5), "it is that member's newest all the same"


@pytest.mark.parametrize("claims", ["taken", "checked", "compared"])
def test_nobodys_coming_or_going_passes_for_a_gain(claims: Claims) -> None:
    run = Run("easy", "hard", "third", claims=claims)
    if claims != "taken":
        run.update("easy"), run.update("hard")  # the first version waits for a second node
        run.until(10, "easy")
    first = run.encoder.version
    run.window({"easy": 2.0, "hard": 5.0, "third": 2.0})
    run.window({"easy": 2.1, "third": 2.1})  # the hard one is away: a lower mean, and still worse
    run.window({"easy": 1.0, "hard": 4.9, "third": 2.0})
    run.window({"easy": 0.1})  # too few of those whom the best is made of
    run.until(60 + first, "easy")
    loss = (1.0 + 4.9 + 2.0) / 3 if claims == "taken" else 2.0  # their mean, or median
    assert run.encoder.best_held_out == pytest.approx(loss) and run.encoder.best_version == 22 + first
    assert run.encoder.held_out == run.encoder.best_held_out, "what cannot be compared is not shown either"
    for node in ("hard", "third"):
        run.scenario.apply(Leave(node=node, incarnation="first"))
    run.window({"easy": 0.9})  # the others have gone for good
    run.until(90 + first, "easy")
    assert (run.encoder.best_held_out, run.encoder.best_version) == (0.9, 60 + first)


def test_the_plateau_goes_by_held_out_losses_where_there_are_any() -> None:
    plateau = LossPlateau(patience=20, min_change=0.1)
    run = Run("a", plateau=plateau)
    for loss in (3.0, 2.5, 2.45):  # the last is no gain worth the name
        run.window({"a": loss})
    run.until(200, "a")  # claimed training losses, which do not change, have stood still for long
    assert run.encoder.best_version == 10 and run.encoder.status == "running"
    run.update("a", 2.6)
    run.until(400, "a")
    assert run.encoder.status == "finished" and run.encoder.reason == "no better held-out loss for 20 versions"
    assert run.encoder.version == 220, "as soon as the window that stood still was closed"


def test_without_measurements_the_plateau_goes_by_training_losses() -> None:
    run = Run("a", plateau=LossPlateau(patience=20))
    run.until(400, "a")
    assert run.encoder.version == 21 and run.encoder.reason == "no better loss for 20 versions"


def test_at_the_end_what_was_measured_counts_at_once_and_another_run_begins_anew() -> None:
    run = Run("a")
    run.update("a", 3.0)
    run.scenario.apply(Stop(sender="operator"))
    assert run.encoder.status == "finished" and (run.encoder.best_held_out, run.encoder.best_version) == (3.0, 0)
    text = card(run.encoder, Settings())
    assert "3.000 about version 0" in text and "| 3.000 (0) |" in text
    run.scenario.apply(Continue(sender="operator", encoder=run.name))
    assert run.encoder.best_version is None and not run.encoder.best_measured
    run.scenario.join("a", run.name)
    run.update("a", 1.0, version=0)  # of the run before
    assert not run.encoder.measured


def test_a_node_can_claim_no_version_that_is_not_there_and_no_number_that_is_none() -> None:
    run = Run("a")
    run.update("a", 3.0, version=1)
    run.update("a", 3.0, version=1 << 61)
    assert not run.encoder.measured and run.encoder.members["a"].held_out is None
    for loss in (float("nan"), float("inf")):
        body = encode(update_manifest("a", 0).model_copy(update={"held_out": loss, "held_out_version": 0}))
        with pytest.raises(Poison):
            decode(body)
    with pytest.raises(Poison):
        decode(encode(update_manifest("a", 0).model_copy(update={"held_out": 1.0, "held_out_version": -1})))
    run = Run("a", "b", every=0)
    run.update("a", 3.0)
    run.update("b", 1e308)
    run.scenario.apply(Stop(sender="operator"))
    assert run.encoder.held_out is None, "nobody was asked"


def test_an_update_of_an_older_node_says_nothing_of_it() -> None:
    plain = update_manifest("a", 0).model_dump()
    del plain["held_out"], plain["held_out_version"]
    assert UpdateManifest.model_validate(plain).held_out is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.floats(-1e308, 1e308), st.integers(0, 12)), max_size=80),
    st.integers(1, 5),
)
def test_what_comes_together_is_finite_in_order_and_survives_a_snapshot(
    said: list[tuple[str, float | None, int]], every: int
) -> None:
    run = Run("a", "b", "c", every=every)
    newest: list[int] = []
    for node, loss, behind in said:
        run.update(node, loss, version=max(0, run.encoder.version - behind))
        encoder = run.encoder
        if encoder.held_out_version is not None and encoder.held_out_version not in newest[-1:]:
            newest.append(encoder.held_out_version)
        assert all(window + 2 * every > encoder.version for window in encoder.measured), "at most two wait"
        for value in (encoder.held_out, encoder.best_held_out):
            assert value is None or abs(value) <= 1e308 * (1 + 1e-12)
        assert encoder.best_version is None or encoder.best_version in newest
    assert newest == sorted(newest)
    state = run.scenario.coordinator.state
    assert State.model_validate_json(state.model_dump_json()) == state


# --- real nodes ------------------------------------------------------------------------------------------------------


def test_nodes_measure_the_master_stops_at_the_plateau_and_both_show_it() -> None:
    server, clock = MemoryServer(VirtualClock().now), VirtualClock(1000.0)
    rule = UpdateRule(when=ReturnWhen(steps=10), encoding="float32", evaluate_every=5)
    stop = StopRule(versions=1000, plateau=LossPlateau(patience=15, min_change=0.0))
    master = SteppedMaster(server, clock, settings=Settings(rule=ARRIVAL, update_rule=rule, stop=stop)).start()
    losses = {version: abs(version - 20.0) for version in range(1000)}  # better up to version 20
    node = SteppedNode(server, clock, training={"losses": losses}, alive_every_seconds=1.0).start()
    together(400.0, master, node)
    [encoder] = master.master.state.encoders.values()
    assert encoder.status == "finished" and encoder.reason == "no better held-out loss for 15 versions"
    assert encoder.best_version is not None and abs(encoder.best_version - 20) <= 4 and encoder.version < 60
    assert encoder.best_held_out == losses[encoder.best_version]
    shown = master.master.report().encoders[encoder.encoder]
    assert (shown.best_version, shown.best_held_out) == (encoder.best_version, encoder.best_held_out)
    newest = node.node.figures
    assert (shown.members["a"].held_out, shown.members["a"].held_out_version) == (
        newest.held_out,
        newest.held_out_version,
    )
