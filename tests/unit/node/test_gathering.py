"""An instruction's assets on the node: read before anything is built, once, and kept; nothing else waits for them."""

from __future__ import annotations

from typing import Any

import pytest

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.assets import asset_entry, publish_asset
from common.wire.to_master import Alive, FetchAssets, InstructionAck
from common.wire.to_node import Instruction, Notice, Rule
from common.wire.update_rule import UpdateRule
from node_service.agent import Agent, CheckSamples, Gather, Resume
from node_service.handover.asset_cache import AssetCache
from node_service.handover.store import MemoryStore
from tests.unit.stepped import DIGEST, TOPOLOGY, HandMaster, SteppedNode, instruction

CONTENTS = {"tokenizer.json": b"t" * (3 << 20), "names.txt": b"alpha beta"}
TOKENIZER, NAMES = (asset_entry(name, content) for name, content in CONTENTS.items())
BOTH = (TOKENIZER, NAMES)


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(VirtualClock().now)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def provide(master: HandMaster, *entries: Any, encoder: str = "text-1") -> None:
    master.broker.declare(TOPOLOGY.assets(encoder, sum(entry.size for entry in entries)))
    for entry in entries:
        publish_asset(master.broker, TOPOLOGY, encoder, entry, CONTENTS[entry.name])


def let_in(master: HandMaster, node: SteppedNode, encoder: str = "text-1") -> None:
    """Answer the node's ack with the rule and a version."""
    master.publish(0, encoder)
    master.say(Rule(encoder=encoder, node="a", update_rule=UpdateRule(), version=0, published_at=0.0))
    node.turn()


def told(server: MemoryServer, clock: VirtualClock, store: MemoryStore | None = None, **options: Any) -> Any:
    """A node that has been told of an encoder whose assets are on no stream yet."""
    master = HandMaster(server, clock)
    node = SteppedNode(server, clock, store=store, **options).start()
    node.turn()
    master.say(instruction(assets=BOTH))
    node.turn()
    assert node.built == [] and node.node.figures.note == "reading the tokenizer, names.txt"
    return master, node


# --- the agent -------------------------------------------------------------------------------------------------------


def test_what_is_lacking_is_gathered_once_and_then_looked_at_again() -> None:
    agent, asked = Agent("a", "i", ("text",)), instruction(assets=BOTH)
    assert agent.receive(asked) == [CheckSamples(asked)]
    assert agent.lacks_assets(asked) == [Gather(asked)]
    assert agent.receive(asked) == [CheckSamples(asked)] and agent.lacks_assets(asked) == [], "it came twice"
    rule = Rule(encoder="text-1", node="a", update_rule=UpdateRule(), version=0, published_at=0.0)
    assert agent.receive(rule) == [] == agent.receive(notice(1)), "of a process before this one: nothing is built"
    assert agent.gathered() == [CheckSamples(asked)] and agent.gathered() == []
    agent.samples_checked(asked, 10)
    assert len(agent.receive(rule)) == 2 and agent.training is False


def notice(version: int) -> Notice:
    return Notice(encoder="text-1", version=version, digest=DIGEST, published_at=0.0)


def test_what_does_not_come_is_asked_for_and_another_encoder_has_its_turn() -> None:
    agent, first, second = Agent("a", "i", ("text",)), instruction(assets=BOTH), instruction("text-2")
    agent.receive(first)
    agent.lacks_assets(first)
    assert agent.gathering_failed("text-9") == [], "of one that it turned away from"
    [ask, again] = agent.gathering_failed("text-1")
    assert isinstance(ask.message, FetchAssets) and again == Gather(first)  # type: ignore[union-attr]
    assert agent.gathering_failed("text-1", ask=False) == [Gather(first)]
    agent.receive(second)
    assert agent.current == first and not any(isinstance(each, CheckSamples) for each in agent.ask()), "it may come yet"
    assert agent.gathering_failed("text-1")[-1] == CheckSamples(second)
    assert agent.current == second and list(agent.waiting) == ["text-1"] and agent.gathering is None


def test_what_is_resumed_is_resumed_once_nothing_is_lacking() -> None:
    agent, asked = Agent("a", "i", ("text",)), instruction(assets=BOTH)
    assert agent.lacks_assets(asked) == [Gather(asked)] and agent.gathered() == [Resume()]
    agent.lacks_assets(asked)
    agent.receive(asked)  # the answer to the join of its start
    assert agent.gathered() == [CheckSamples(asked)]


# --- the node --------------------------------------------------------------------------------------------------------


def test_nothing_is_built_before_all_is_there_and_nothing_else_waits_for_it(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master, node = told(server, clock)
    provide(master, TOKENIZER)
    node.run(10.0)
    assert node.built == [] and not master.heard(InstructionAck)
    assert {alive.note for alive in master.heard(Alive)} == {"reading the tokenizer, names.txt"}, "it keeps in touch"
    assert not master.heard(FetchAssets), "it may come yet"
    provide(master, NAMES)
    node.turn()
    assert node.built == [("text-1", CONTENTS)]
    [ack] = master.heard(InstructionAck)
    assert ack.accepted
    let_in(master, node)
    assert node.training.version == 0


def test_assets_that_do_not_come_are_asked_for_until_they_do(server: MemoryServer, clock: VirtualClock) -> None:
    master, node = told(server, clock)
    provide(master, TOKENIZER)  # and the broker has lost the other
    node.run(50.0)
    asked = master.heard(FetchAssets)
    assert 2 <= len(asked) <= 4 and {each.encoder for each in asked} == {"text-1"}
    provide(master, *BOTH)
    node.run(1.0)
    assert node.built == [("text-1", CONTENTS)]
    node.run(60.0)
    assert master.heard(FetchAssets) == asked


def test_a_restart_reads_nothing_and_so_does_another_encoder_with_the_same_tokenizer(
    server: MemoryServer, clock: VirtualClock
) -> None:
    store = MemoryStore()
    master, node = told(server, clock, store)
    provide(master, *BOTH)
    node.turn()
    let_in(master, node)
    node.broker.close()
    server.delete_queue(TOPOLOGY.asset_stream("text-1"))
    again = SteppedNode(server, clock, store=store).start()
    assert again.built == [("text-1", CONTENTS)], "before it hears of anybody"
    again.broker.close()
    store.remove("current.json")  # it has ended
    other = SteppedNode(server, clock, store=store).start()
    master.say(instruction("text-2", assets=[TOKENIZER]))
    other.turn()
    assert other.built == [("text-2", {"tokenizer.json": CONTENTS["tokenizer.json"]})]
    assert store.names("assets") == [f"assets/{TOKENIZER.digest}"], "what nobody needs any more is gone"


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_cache_that_is_damaged_is_read_again_and_what_was_trained_goes_on(
    server: MemoryServer, clock: VirtualClock, damage: str
) -> None:
    store = MemoryStore()
    master, node = told(server, clock, store)
    provide(master, *BOTH)
    node.turn()
    let_in(master, node)
    node.broker.close()
    name = f"assets/{TOKENIZER.digest}"
    store.files.pop(name) if damage == "gone" else store.cut(name, 5)
    again = SteppedNode(server, clock, store=store).start()
    assert again.built == []
    again.run(1.0)
    assert again.built == [("text-1", CONTENTS)] and again.training.version == 0, "from its own disk and the streams"


def test_a_node_that_is_killed_in_between_reads_only_what_is_lacking(server: MemoryServer, clock: VirtualClock) -> None:
    store = MemoryStore()
    master, node = told(server, clock, store)
    provide(master, TOKENIZER)
    node.turn()
    node.broker.close()
    server.delete_queue(TOPOLOGY.asset_stream("text-1"))
    provide(master, NAMES)
    again = SteppedNode(server, clock, store=store).start()
    master.say(instruction(assets=BOTH))
    again.turn()
    assert again.built == [("text-1", CONTENTS)]


def test_the_turn_goes_to_another_encoder_while_assets_are_missed_and_comes_back(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master, node = told(server, clock)
    master.say(instruction("text-2"))
    node.run(20.0)
    assert node.built == [("text-2", {})]
    refusals = [ack for ack in master.heard(InstructionAck) if not ack.accepted]
    assert [ack.encoder for ack in refusals] == ["text-1"] and "its turn" in refusals[0].reason
    provide(master, *BOTH)
    node.run(60.0)  # nobody lets it into the second
    assert node.built[1:2] == [("text-1", CONTENTS)]


def test_the_cache_holds_nothing_but_what_it_says() -> None:
    store = MemoryStore()
    cache = AssetCache(store)
    assert cache.read(BOTH) is None and cache.lacking(BOTH) == list(BOTH) and cache.read([]) == {}
    for entry in BOTH:
        cache.keep(entry, CONTENTS[entry.name])
    assert cache.read(BOTH) == CONTENTS and cache.lacking(BOTH) == []
    store.files[f"assets/{NAMES.digest}"] = b"alpha zeta"
    assert cache.read(BOTH) is None and cache.lacking(BOTH) == [NAMES]
    cache.keep_only([NAMES])
    assert list(store.files) == [f"assets/{NAMES.digest}"]


def test_an_instruction_of_an_older_master_has_no_assets() -> None:
    plain = instruction().model_dump()
    del plain["assets"]
    assert Instruction.model_validate(plain) == instruction()
