"""What a node cannot build or train by is refused with the reason, and what kills it twice is not tried again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import pytest
import structlog

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.broker import Publication
from common.wire.to_master import InstructionAck, UpdateManifest
from common.wire.to_node import Instruction, Rule
from common.wire.update_rule import InnerOptimizer, ReturnWhen, UpdateRule
from node_service.corpus.corpus import Corpus
from node_service.handover.local_state import LocalState
from node_service.handover.receipt_book import Ledger
from node_service.handover.store import MemoryStore
from node_service.training.session import Session
from tests.unit.stepped import TOPOLOGY, CountingTraining, HandMaster, SteppedNode, instruction

GOOD = UpdateRule(when=ReturnWhen(steps=4))
IMPOSSIBLE = {
    "betas of one": UpdateRule(inner=InnerOptimizer(betas=(0.9, 1.0))),
    "betas below zero": UpdateRule(inner=InnerOptimizer(betas=(-0.1, 0.99))),
    "a batch of 10^12": UpdateRule(inner=InnerOptimizer(batch_size=10**12)),
    "a rate of 10^30": UpdateRule(inner=InnerOptimizer(lr=1e30)),
}


class Killed(BaseException):
    """As when the kernel ends a process: nothing of it goes on."""


class World:
    """A master spoken by hand, and the processes of one node, which share a disk."""

    def __init__(self) -> None:
        self.server, self.clock, self.store = MemoryServer(), VirtualClock(1000.0), MemoryStore()
        self.master = HandMaster(self.server, self.clock)

    def process(self, build: Callable[..., Any] | None = None) -> SteppedNode:
        node = SteppedNode(self.server, self.clock, store=self.store)
        node.build = build
        return node.start()

    def refusals(self) -> list[str]:
        return [ack.reason for ack in self.master.heard(InstructionAck) if not ack.accepted]

    def kept(self) -> LocalState:
        return LocalState(self.store, "a")


def raising(error: BaseException) -> Callable[..., Any]:
    def build(*_: Any) -> Any:
        raise error

    return build


@pytest.mark.parametrize("error", [KeyError("hidden_size of John Doe"), RuntimeError("x" * 10_000), MemoryError()])
def test_f1_an_instruction_that_cannot_be_built_is_refused_and_the_next_is_taken(error: Exception) -> None:
    world = World()
    node = world.process(raising(error))
    world.master.say(instruction("text-0"))
    node.turn()
    [reason] = world.refusals()
    assert type(error).__name__ in reason and "John Doe" not in reason and len(reason) < 200
    node.build = None
    world.master.let_in(encoder="text-1")
    node.run(5.0)
    assert world.master.heard(UpdateManifest)


def test_an_instruction_whose_layout_is_not_what_its_digest_says_is_refused() -> None:
    world = World()
    node = world.process()
    world.master.say(instruction("text-0").model_copy(update={"layout_digest": "0" * 64}))
    node.turn()
    assert world.refusals() == ["the instruction's layout does not match its digest"] and not node.built


def test_what_a_rule_of_a_newer_release_has_beside_what_is_known_is_left_out_and_named() -> None:
    world = World()
    node = world.process()
    rule = Rule(encoder="text-1", node="a", update_rule=UpdateRule(), version=0, published_at=0.0).model_dump()
    rule["update_rule"] |= {"moon": "full", "inner": {**rule["update_rule"]["inner"], "tide": 3}}
    world.master.say(instruction("text-1"))
    world.master.publish(0)
    world.master.broker.publish(Publication(TOPOLOGY.rule, "a", msgpack.packb(rule)))
    with structlog.testing.capture_logs() as logs:
        node.run(2.0)
    assert [line["fields"] for line in logs if "leaves out" in line["event"]] == ["inner.tide, moon"]
    assert node.training.steps > 0


@pytest.mark.parametrize("architecture", [{}, {"hidden_size": 1 << 40}, {"num_hidden_layers": []}, {"vocab_size": -1}])
def test_f1_no_architecture_of_a_stranger_kills_the_real_training(architecture: dict[str, Any], tmp_path: Path) -> None:
    def build(wanted: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]) -> Session:
        texts = ["one text", "another text"]
        return Session(
            wanted, texts, tmp_path, private={}, seed=0, device="cpu", ledger=ledger, assets=assets, validation=()
        )

    world = World()
    node = world.process(build)
    world.master.say(instruction().model_copy(update={"architecture": architecture}))
    node.turn()
    [reason] = world.refusals()
    assert reason


@pytest.mark.parametrize("rule", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_f1_an_impossible_rule_is_refused_and_not_kept(rule: UpdateRule) -> None:
    world = World()
    node = world.process()
    world.master.let_in(rule)
    node.run(2.0)
    [reason] = world.refusals()
    assert reason.startswith("the rule is refused: inner.") and node.node.training is None
    assert world.kept().current() is None
    world.master.let_in(GOOD)
    node.run(4.0)
    assert world.master.heard(UpdateManifest), "a rule that is put right is taken"


def test_f1_an_impossible_rule_does_not_end_what_is_trained_by_a_good_one() -> None:
    world = World()
    node = world.process()
    world.master.let_in(GOOD)
    node.run(1.0)
    world.master.say(
        Rule(encoder="text-1", node="a", update_rule=IMPOSSIBLE["betas of one"], version=9, published_at=0)
    )
    node.run(3.0)
    current = world.kept().current()
    assert node.training.steps > 4 and world.refusals() == []
    assert current is not None and current.rule.update_rule == GOOD


def test_f1_an_impossible_rule_that_an_older_release_has_kept_does_not_end_the_next_start() -> None:
    world = World()
    rule = Rule(encoder="text-1", node="a", update_rule=IMPOSSIBLE["betas of one"], version=0, published_at=0.0)
    LocalState(world.store, "a", new_incarnation=lambda: "a-first").remember_current(instruction(), rule)
    node = world.process()
    node.run(1.0)
    assert node.built == [] and world.kept().current() is None


def test_f1_an_instruction_that_kills_twice_is_refused_at_the_third_start() -> None:
    world = World()
    for _ in range(2):
        node = world.process(raising(Killed()))
        world.master.say(instruction("text-0"))
        with pytest.raises(Killed):
            node.turn()
        node.broker.close()
    node = world.process(raising(Killed()))
    world.master.say(instruction("text-0"))
    node.turn()
    assert world.refusals()[-1] == "this node died of it twice"
    world.master.let_in(GOOD, encoder="text-1")
    node.build = None
    node.run(4.0)
    assert world.master.heard(UpdateManifest)


@pytest.mark.parametrize("error", [Killed(), MemoryError()])
def test_f1_a_rule_whose_first_step_kills_twice_is_refused_and_another_is_taken(error: BaseException) -> None:
    class Fragile(CountingTraining):
        def step(self) -> float:
            if self.rule.inner.batch_size == 1000:
                raise error
            return super().step()

    def build(wanted: Instruction, *_: Any) -> Fragile:
        return Fragile(wanted, saved=[])

    world = World()
    heavy = UpdateRule(inner=InnerOptimizer(batch_size=1000))
    for attempt in range(3):
        node = world.process(build)
        if attempt == 0:
            world.master.let_in(heavy)
        if attempt < 2:
            with pytest.raises(type(error)):
                node.run(1.0)
            node.broker.close()
    assert node.node.training is None, "it was not resumed"
    world.master.let_in(heavy)
    node.run(1.0)
    assert world.refusals() == ["the rule is refused: this node died of it twice"]
    world.master.let_in(GOOD)
    node.run(4.0)
    assert world.master.heard(UpdateManifest)


def test_what_its_owner_has_ended_and_what_went_well_does_not_count() -> None:
    world = World()
    for error in (Killed(), KeyboardInterrupt(), None, Killed()):
        node = world.process(raising(error) if error else None)
        world.master.say(instruction("text-0"))
        if error:
            with pytest.raises(type(error)):
                node.turn()
        else:
            node.turn()
        node.broker.close()
    node = world.process()
    world.master.say(instruction("text-0"))
    node.turn()
    assert node.built and world.refusals() == []
