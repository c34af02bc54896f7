"""Every second of a node has its place: in steps, in waiting, or lost to what is named."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.to_master import Alive, UpdateManifest
from common.wire.to_node import Instruction, Receipt
from common.wire.transfer import CompleteVersion
from common.wire.update_rule import ReturnWhen, UpdateRule
from node_service.corpus.corpus import Corpus
from node_service.handover.receipt_book import Ledger
from node_service.training.training import Training
from node_service.training.update_rule import SinceReturn
from tests.unit.stepped import CountingTraining, HandMaster, SteppedNode


class SlowTraining(CountingTraining):
    """Of which everything takes its time by the clock; a GPU's steps, `behind` seconds of each, are waited for when
    something else is done."""

    def __init__(self, instruction: Instruction, clock: VirtualClock, takes: Mapping[str, float]) -> None:
        super().__init__(instruction, seconds=0.0, saved=[])
        self._clock, self._takes, self._behind = clock, takes, 0.0

    def step(self) -> float:
        self._clock.wait(self._takes["step"])
        self._behind = self._takes["behind"]
        return super().step()

    def settle(self) -> None:
        self._clock.wait(self._behind)
        self._behind = 0.0

    def hand_in(self, sequence: int) -> tuple[SinceReturn, list[bytes]]:
        self._clock.wait(self._takes["hand_in"])
        return super().hand_in(sequence)

    def adopt(self, read: CompleteVersion) -> None:
        self._clock.wait(self._takes["adoption"])
        super().adopt(read)

    def save(self, incarnation: str, next_sequence: int) -> None:
        self._clock.wait(self._takes["checkpoint"])
        super().save(incarnation, next_sequence)

    def answered(self, receipt: Receipt) -> None:
        self._clock.wait(self._takes["other"])


def spent(takes: Mapping[str, float], seconds: float, **config: object) -> tuple[SteppedNode, HandMaster, float]:
    """A node that has trained for so long, answered at once and with a version; and the seconds that passed."""
    server, clock = MemoryServer(), VirtualClock(1000.0)
    master, node = HandMaster(server, clock), SteppedNode(server, clock, checkpoint_every_seconds=7.0, **config)

    def build(instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]) -> Training:
        return SlowTraining(instruction, clock, takes)

    node.build = build
    node.start()
    master.let_in(UpdateRule(when=ReturnWhen(steps=5), max_unanswered=2, evaluate_every=0))
    node.turn()
    began, answered, version = clock.monotonic(), 0, 0
    while clock.monotonic() < began + seconds:
        for update in master.heard(UpdateManifest)[answered:]:
            answered, version = answered + 1, version + 1
            master.publish(version)
            master.answer(update, version)
        clock.wait(node.turn())
    node.turn()
    return node, master, clock.monotonic() - began


quantities = st.fixed_dictionaries(
    {what: st.sampled_from([0.0, 0.25, 1.0]) for what in ("behind", "hand_in", "adoption", "checkpoint", "other")}
    | {"step": st.sampled_from([0.25, 0.5])}
)


@settings(max_examples=40, deadline=None)
@given(takes=quantities)
def test_the_parts_are_the_whole(takes: Mapping[str, float]) -> None:
    node, _, passed = spent(takes, 60.0)
    figures = node.node.figures
    last = takes["adoption"] + takes["step"] + takes["behind"] + 1.0  # before the first look, and after the last
    whole = figures.step_seconds + sum(figures.lost_seconds.values()) + figures.waiting_seconds
    assert whole == pytest.approx(passed, abs=last)
    handed_in, steps = figures.handed_in, node.node.training.steps if node.node.training else 0
    assert figures.lost_seconds["hand_in"] == pytest.approx(takes["hand_in"] * handed_in)
    assert figures.lost_seconds["checkpoint"] == pytest.approx(takes["checkpoint"] * len(saved(node)))
    assert figures.step_seconds >= takes["step"] * steps
    if takes["behind"] == 0.0:
        assert figures.step_seconds == pytest.approx(takes["step"] * steps)
    answers = figures.accepted
    assert figures.lost_seconds["other"] == pytest.approx(takes["other"] * answers, abs=takes["other"] * 2)


def saved(node: SteppedNode) -> list[int]:
    assert isinstance(node.node.training, SlowTraining)
    return node.node.training.saved


def test_what_a_throttled_node_does_in_its_pauses_is_not_lost() -> None:
    takes = {"step": 0.5, "behind": 0.0, "hand_in": 0.25, "adoption": 0.25, "checkpoint": 0.25, "other": 0.0}
    node, master, _ = spent(takes, 120.0, max_steps_per_second=0.1)
    figures = node.node.figures
    assert figures.handed_in > 1 and figures.version > 0
    assert len(saved(node)) > 3 and figures.lost_seconds["checkpoint"] == 0.0 == figures.lost_seconds["other"]
    assert figures.lost_seconds["hand_in"] == 0.25 * figures.handed_in, "a step is due, and waits for it"
    said = master.heard(Alive)[-1]
    assert said.hand_in_seconds > 0.0 and said.step_seconds > 5.0 and said.other_seconds == 0.0


def test_a_node_that_waits_loses_nothing() -> None:
    takes = {"step": 0.5, "behind": 0.0, "hand_in": 0.0, "adoption": 0.0, "checkpoint": 0.0, "other": 0.0}
    server, clock = MemoryServer(), VirtualClock(1000.0)
    master, node = HandMaster(server, clock), SteppedNode(server, clock)
    node.build = lambda instruction, corpus, ledger, assets: SlowTraining(instruction, clock, takes)
    node.start()
    master.let_in(UpdateRule(when=ReturnWhen(steps=5), wait=True))
    node.run(60.0)
    figures = node.node.figures
    assert figures.step_seconds == 2.5 and figures.waiting_seconds > 50.0
    assert sum(figures.lost_seconds.values()) == 0.0 and figures.lost_share == 0.0
