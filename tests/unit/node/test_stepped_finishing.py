"""The shipped Node at the end of a training, stepped by hand: what it says at once, and what it then does by itself."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.to_master import Alive, Finished, InstructionAck, Join
from common.wire.to_node import Finish, Receipt, Rule
from common.wire.update_rule import ReturnWhen, UpdateRule
from node_service.handover.store import MemoryStore
from node_service.training.looks import Looks
from tests.unit.stepped import DIGEST, HandMaster, SteppedNode, instruction

RULE = UpdateRule(when=ReturnWhen(steps=1000), encoding="float32")
PHASE = 40
#: Of a step, seconds.
SECONDS = 0.5


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(VirtualClock().now)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def finishing(
    server: MemoryServer, clock: VirtualClock, phase: int = PHASE, **options: Any
) -> tuple[HandMaster, SteppedNode]:
    """A node that has just read its last version, version 7."""
    master = HandMaster(server, clock)
    training = {"finishing": phase, "losses": {7: 2.5, 0: 9.0}}
    node = SteppedNode(server, clock, training=training, **options).start()
    node.turn()
    master.let_in(RULE)
    node.run(5.0)
    master.publish(7)
    master.say(Finish(encoder="text-1", encoder_type="text", version=7, digest=DIGEST, published_at=0.0))
    node.turn()
    return master, node


def phase_of(node: SteppedNode) -> Looks:
    assert node.training.finishing is not None
    return node.training.finishing


def test_the_master_is_told_at_once_and_the_node_is_finished_once_its_phase_is_over(
    server: MemoryServer, clock: VirtualClock
) -> None:
    with structlog.testing.capture_logs() as logs:
        master, node = finishing(server, clock, alive_every_seconds=1.0)
        assert [each.version for each in master.heard(Finished)] == [7] and not node.node.finished
        node.run(PHASE / 2 * SECONDS)
        assert phase_of(node).steps == pytest.approx(PHASE / 2, abs=1) and node.node.figures.waiting_since is None
        said = master.heard(Alive)[-1]
        assert said.note.startswith("finishing ") and said.note.endswith("/40 steps, held-out -10.00 (best -10.00)")
        assert said.encoder == "text-1" and 0 <= node.training.steps - said.steps <= 2
        assert not node.node.finished and node.node.state.current() is None
        node.run(PHASE / 2 * SECONDS + 1.0)
    assert node.node.finished and node.training.finishing is None and node.node.state.finishing() is None
    assert node.node.figures.note == "finished" and not node.node.ready
    begins, ended = (each for each in logs if each["event"].startswith("finishing phase"))
    assert (begins["event"], begins["steps"]) == ("finishing phase begins", PHASE)
    assert (ended["event"], ended["steps"]) == ("finishing phase ended", PHASE)
    assert (ended["held_out_before"], ended["held_out_after"]) == (0.0, -PHASE)


def test_without_a_phase_it_is_finished_at_once(server: MemoryServer, clock: VirtualClock) -> None:
    master, node = finishing(server, clock, phase=0)
    assert node.node.finished and node.node.state.finishing() is None and len(master.heard(Finished)) == 1


def test_the_last_version_is_measured_and_that_is_said(server: MemoryServer, clock: VirtualClock) -> None:
    master, _ = finishing(server, clock, alive_every_seconds=1e9)
    assert [(each.encoder, each.held_out, each.held_out_version) for each in master.heard(Alive)] == [
        ("text-1", 2.5, 7)
    ]


def test_another_encoder_ends_the_phase_with_its_best_so_far(server: MemoryServer, clock: VirtualClock) -> None:
    master, node = finishing(server, clock)
    node.run(10 * SECONDS)
    phase = phase_of(node)
    master.let_in(RULE, encoder="text-2")
    node.turn()
    assert node.node.finished and node.node.state.finishing() is None and phase.steps < PHASE
    assert node.training.instruction.encoder == "text-2" and node.training.version == 0
    assert [ack.encoder for ack in master.heard(InstructionAck)] == ["text-1", "text-2"]
    node.run(5.0)
    assert node.training.since.steps > 5


def test_an_encoder_that_waits_has_its_turn_at_once(server: MemoryServer, clock: VirtualClock) -> None:
    master = HandMaster(server, clock)
    node = SteppedNode(server, clock, training={"finishing": PHASE}).start()
    node.turn()
    master.let_in(RULE)
    node.run(5.0)
    master.say(instruction("text-2"))
    master.publish(7)
    master.say(Finish(encoder="text-1", encoder_type="text", version=7, digest=DIGEST, published_at=0.0))
    node.turn()
    assert node.node.finished and node.training.instruction.encoder == "text-2"


def test_the_same_encoder_ends_its_phase_by_the_rule_and_not_by_an_instruction_that_comes_twice(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master, node = finishing(server, clock)
    node.run(5 * SECONDS)
    master.say(instruction())
    node.run(5 * SECONDS)
    assert phase_of(node).steps > 5 and not node.node.finished
    master.publish(8)
    master.say(Rule(encoder="text-1", node="a", update_rule=RULE, version=8, published_at=0.0))
    node.turn()
    assert node.node.finished and node.training.finishing is None and node.training.version == 8
    assert node.node.state.current() is not None and node.node.state.finishing() is None
    node.run(5.0)
    assert node.training.since.steps > 5


def test_a_node_goes_on_with_its_phase_whoever_is_away(server: MemoryServer, clock: VirtualClock) -> None:
    store = MemoryStore()
    _, first = finishing(server, clock, store=store, checkpoint_every_seconds=3.0)
    saved = len(first.saved)
    first.run(10 * SECONDS)
    assert len(first.saved) > saved, "as often as a checkpoint"
    first.node.goodbye()
    assert first.saved[-1] == first.training.steps
    first.broker.close()
    # nobody says what it trained, and no version is read
    back = SteppedNode(server, clock, store=store, training={"finishing": PHASE}, ask_after_seconds=5.0).start()
    assert back.node.encoder == "text-1" and not back.node.finished
    back.run(PHASE * SECONDS + 1.0)
    assert back.node.finished and back.node.state.finishing() is None
    last = SteppedNode(server, clock, name="a", store=store, training={"finishing": PHASE})
    assert last.node.encoder is None


def test_one_that_died_between_the_export_and_its_memory_of_it_is_finished(
    server: MemoryServer, clock: VirtualClock
) -> None:
    store = MemoryStore()
    _, first = finishing(server, clock, store=store)
    first.broker.close()
    back = SteppedNode(server, clock, store=store, training={"finishing": 0}).start()  # no phase is there any more
    assert back.node.finished and back.node.state.finishing() is None
    assert back.node.training is None, "what stands at no version must not be saved over the checkpoint"


def test_a_new_identity_does_not_end_the_phase_and_it_asks_for_more_to_do(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master, node = finishing(server, clock, phase=400, ask_after_seconds=10.0)
    joined = len(master.heard(Join))
    node.run(35.0)
    assert len(master.heard(Join)) == joined + 3, "what began meanwhile may have been missed"
    conflict = Receipt(
        encoder="text-1",
        node="a",
        incarnation="a-first",
        sequence=0,
        digest=DIGEST,
        accepted=False,
        reason="conflict",
        version=7,
    )
    with structlog.testing.capture_logs() as logs:
        master.say(conflict)
        node.run(5.0)
    assert any("joining under a new identity" in each["event"] for each in logs)
    assert phase_of(node).steps > 70 and node.node.encoder == "text-1"
