"""What the owner of a node agrees to: what is not accepted is refused in words, and outside its hours a node rests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock, minute_of_day
from common.errors import UserError
from common.wire.to_master import Alive, InstructionAck, Join, Leave, UpdateManifest, Words
from common.wire.to_node import Instruction, WordsWanted
from common.wire.update_rule import FinishRule, ReturnWhen, UpdateRule
from deploy.config import load_config
from node_service.accept import Accept
from node_service.handover.store import MemoryStore
from tests.unit.stepped import LAYOUT, HandMaster, SteppedMaster, SteppedNode, instruction, together

#: Of text, shares all of its 32 numbers.
ASKED = instruction("text-3f9a").model_copy(update={"architecture": {"shared": "all"}})
NIGHT = "22:00-06:00"


@pytest.mark.parametrize(
    ("accept", "words"),
    [
        ({}, ""),
        ({"encoders": "text-*"}, ""),
        ({"encoders": ["image-*", "text-3f9a"]}, ""),
        ({"encoders": "text-4*"}, "accepts only encoders called text-4*"),
        ({"encoders": "TEXT-*"}, "accepts only encoders called TEXT-*"),
        ({"encoders": []}, "accepts only encoders called nothing"),
        ({"types": ["image", "text"]}, ""),
        ({"types": ["image", "tabular"]}, "accepts only encoders of type image or tabular"),
        ({"shared": ["lora", "all"]}, ""),
        ({"shared": "trunk"}, "lets trunk of an encoder travel; of this one all would"),
        ({"max_parameters": 32}, ""),
        ({"max_parameters": 31}, "accepts encoders of up to 31 parameters; this one has 32"),
        ({"encoders": "text-*", "types": "text", "shared": "lora"}, "lets lora of an encoder travel"),
    ],
)
def test_what_is_accepted(accept: dict[str, Any], words: str) -> None:
    why = Accept(**accept).refusal(ASKED)
    assert (words in why and "\n" not in why) if words else why == ""


@pytest.mark.parametrize(
    ("architecture", "accepted"),
    [({}, True), ({"shared": "trunk"}, True), ({"shared": "all"}, False), ({"shared": ["trunk"]}, False)],
)
def test_a_type_that_does_not_say_shares_a_trunk(architecture: dict[str, Any], accepted: bool) -> None:
    asked = ASKED.model_copy(update={"architecture": architecture})
    assert (Accept(shared=("trunk",)).refusal(asked) == "") is accepted


MINUTES = st.integers(0, 24 * 60 - 1)
PERIODS = st.lists(st.tuples(MINUTES, MINUTES).filter(lambda period: period[0] != period[1]), min_size=1, max_size=3)


@given(PERIODS, MINUTES)
def test_it_is_closed_outside_of_all_hours_until_the_next_of_them_begin(
    periods: list[tuple[int, int]], minute: int
) -> None:
    def shown(at: int) -> str:
        return f"{at // 60:02}:{at % 60:02}"

    opened = set()
    for begin, end in periods:
        while begin != end:
            opened.add(begin)
            begin = (begin + 1) % (24 * 60)
    accept = Accept(hours=tuple(f"{shown(begin)}-{shown(end)}" for begin, end in periods))
    until = minute
    while until not in opened:
        until = (until + 1) % (24 * 60)
    assert accept.closed_until(minute) == ("" if until == minute else shown(until))


def test_hours_may_end_with_the_day() -> None:
    accept = Accept(hours=("18:00-24:00",))
    assert [accept.closed_until(minute) for minute in (0, 1079, 1080, 1439)] == ["18:00", "18:00", "", ""]


@pytest.mark.parametrize(
    ("accept", "words"),
    [
        ('hours = "22-6"', "hours.0: write hours as \"22:00-06:00\", not '22-6'"),
        ('hours = "25:00-06:00"', "are no hours of a day"),
        ('hours = "06:00-06:60"', "are no hours of a day"),
        ('hours = "00:00-24:00"', "are no hours of a day"),
        ("hours = []", "at least 1 item"),
        ('shared = "everything"', "shared.0: input should be 'all', 'trunk' or 'lora'"),
        ("max_parameters = 0", "max_parameters: input should be greater than or equal to 1"),
        ('encoder = "text"', "there is no setting 'nodes.a.accept.encoder'; did you mean 'encoders'?"),
    ],
)
def test_a_slip_in_it_is_one_line(accept: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(f"[nodes.a.accept]\n{accept}\n")
    with pytest.raises(UserError) as raised:
        load_config(file, {})
    assert words in str(raised.value) and "\n" not in str(raised.value)


class World:
    """A master spoken by hand, and the processes of one node, which share a disk. It is `hour` o'clock."""

    def __init__(self, hour: float = 12.0) -> None:
        start = next(at for at in range(0, 86_400, 60) if minute_of_day(at) == int(hour * 60))
        self.server, self.clock, self.store = MemoryServer(), VirtualClock(float(start)), MemoryStore()
        self.master = HandMaster(self.server, self.clock)

    def process(self, **config: Any) -> SteppedNode:
        return SteppedNode(self.server, self.clock, store=self.store, **config).start()

    def until(self, node: SteppedNode, hour: float) -> None:
        """Let time pass for the node until that hour of the day."""
        while minute_of_day(self.clock.now()) != int(hour * 60):
            self.clock.wait(max(30.0 if node.node.figures.paused_until else 1.0, node.turn()))
        node.turn()


def test_what_is_not_accepted_is_refused_in_the_answer_and_shown_and_what_is_comes_next() -> None:
    world = World()
    node = world.process(accept={"encoders": ["text-1"]}, private={"contribute_words": True, "min_documents": 2})
    world.master.say(instruction("text-0"))
    world.master.say(WordsWanted(encoder="text-0", encoder_type="text"))
    node.turn()
    [refused] = world.master.heard(InstructionAck)
    assert not refused.accepted and refused.reason == "the owner of this node accepts only encoders called text-1"
    assert refused.reason in node.node.figures.doing and node.built == []
    assert [(words.encoder, words.words) for words in world.master.heard(Words)] == [("text-0", [])]
    assert not world.store.names("words"), "they are not even counted"
    world.master.let_in()
    node.run(5.0)
    assert [ack.accepted for ack in world.master.heard(InstructionAck)] == [False, True]
    assert world.master.heard(UpdateManifest)


@pytest.mark.parametrize("accept", [{"types": "image"}, {"max_parameters": LAYOUT.size - 1}, {"encoders": "other"}])
def test_who_thinks_better_of_it_leaves_at_the_next_start_and_sends_no_more_of_it(accept: dict[str, Any]) -> None:
    world = World()
    node = world.process()
    world.master.let_in()
    node.run(6.0)
    sent = world.master.heard(UpdateManifest)
    assert sent and node.node.state.owed
    node.broker.close()
    node = world.process(accept=accept, incarnation="second")
    world.master.say(instruction())
    node.run(400.0)
    assert world.master.heard(UpdateManifest) == sent and node.built == []
    assert [ack.accepted for ack in world.master.heard(InstructionAck)] == [True, False]
    # an update that it has forgotten may count: should the owner agree again, its steps must not count twice
    first, *_, last = world.master.heard(Join)
    assert (first.incarnation, last.incarnation) == ("a-first", "a-second")
    assert "the owner of this node accepts only" in node.node.figures.doing or "up to 31" in node.node.figures.doing


def test_who_still_accepts_it_goes_on_at_the_next_start() -> None:
    world = World()
    node = world.process()
    world.master.let_in()
    node.run(6.0)
    node.broker.close()
    before = len(world.master.heard(UpdateManifest))
    world.process(accept={"types": "text", "max_parameters": LAYOUT.size}).run(3.0)
    assert len(world.master.heard(UpdateManifest)) > before


def test_when_its_hours_end_it_hands_in_leaves_and_rests_and_comes_back_when_they_begin() -> None:
    world = World(hour=5.99)
    node = world.process(accept={"hours": NIGHT}, checkpoint_every_seconds=1e9)
    world.master.let_in(UpdateRule(when=ReturnWhen(steps=1000)))
    world.until(node, 6.0)
    [update] = world.master.heard(UpdateManifest)
    assert update.steps == node.training.steps > 0, "nothing that was trained waits for the evening"
    assert len(world.master.heard(Leave)) == 1 and node.saved[-1] == node.training.steps
    assert world.master.heard(Alive)[-1].note.endswith("paused until 22:00 (accept.hours)")
    steps, said = node.training.steps, len(world.master.came)
    spent = node.node.figures.waiting_seconds
    world.master.say(instruction("text-9"))  # nobody is told yes who then rests
    world.until(node, 21.9)
    assert node.training.steps == steps and len(world.master.heard(Join)) == 1 and len(world.master.came) == said
    assert node.node.figures.waiting_seconds - spent < 60.0, "it does not wait for the master"
    world.until(node, 22.0)
    node.run(3.0)
    assert node.training.steps > steps and len(world.master.heard(Join)) == 2
    assert "paused" not in node.node.figures.doing


def test_who_starts_outside_its_hours_joins_when_they_begin() -> None:
    world = World(hour=12.0)
    node = world.process(accept={"hours": NIGHT})
    world.master.say(instruction())
    world.until(node, 21.9)
    assert world.master.heard(Join) == world.master.heard(InstructionAck) == node.built == []
    world.until(node, 22.0)
    node.turn()
    assert len(world.master.heard(Join)) == 1
    world.master.let_in()
    node.run(3.0)
    assert node.training.steps > 0


def test_a_finishing_phase_keeps_to_the_hours_too() -> None:
    world = World(hour=5.99)
    node = world.process(accept={"hours": NIGHT}, training={"finishing": 1000})
    world.master.let_in(UpdateRule(finish=FinishRule(steps=1000)))
    node.run(2.0)
    node.training.finish_on()
    node.run(2.0)
    assert node.training.finishing is not None and node.training.finishing.steps > 0
    world.until(node, 6.0)
    steps = node.training.steps
    world.until(node, 7.0)
    assert node.training.steps == steps


def test_nobody_waits_for_a_node_that_rests() -> None:
    world = World(hour=5.999)
    server, clock = MemoryServer(), VirtualClock(world.clock.now())
    master = SteppedMaster(server, clock).start()
    day, night = (
        SteppedNode(server, clock, "day").start(),
        SteppedNode(server, clock, "night", accept={"hours": NIGHT}).start(),
    )
    together(30.0, master, day, night)
    [encoder] = master.master.state.encoders.values()
    assert set(encoder.active()) == {"day", "night"}
    together(60.0, master, day, night)
    assert set(encoder.active()) == {"day"}
    assert encoder.members["night"].returns > 0
    note = master.master.report().encoders[encoder.encoder].members["night"].note
    assert "paused until 22:00" in note


def test_an_instruction_is_not_built_to_find_out_how_large_it_is() -> None:
    huge: Instruction = ASKED.model_copy(update={"layout": [("w", [1 << 62] * 16)]})
    assert "up to 5 parameters" in Accept(max_parameters=5).refusal(huge)
