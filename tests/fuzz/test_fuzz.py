"""A short run of the fuzzer, and everything that it ever found. `make fuzz` runs it for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.wire.broker import Publication
from tests.fuzz.cases import cases, fewest, note
from tests.fuzz.grammar import Grammar
from tests.fuzz.world import World, batches
from tests.unit.stepped import TOPOLOGY

MESSAGES = 1500


@pytest.mark.parametrize("accounts", [True, False], ids=["accounts", "open"])
def test_strangers_stop_nobody(tmp_path: Path, accounts: bool) -> None:
    world, grammar = World(tmp_path, accounts=accounts), Grammar(TOPOLOGY, seed=20261126)
    before = world.versions
    for batch in batches(grammar.next() for _ in range(MESSAGES)):
        world.feed(batch)
        grammar.saw(world.passing())
        grammar.encoders = ["text-1", *world.encoders[-3:]]
    assert world.set_aside.total() > MESSAGES / 10 and len(world.set_aside) >= 5, "each with its reason"
    if accounts:
        assert world.versions - before >= MESSAGES / 100, "the members went on meanwhile"
        assert world.set_aside["account"] > 0
    assert world.goes_on() is not None
    world.close()


@pytest.mark.parametrize(("raised", "accounts", "messages"), cases())
def test_what_somebody_died_of_once_is_taken(
    raised: str, accounts: bool, messages: list[Publication], tmp_path: Path
) -> None:
    world = World(tmp_path, accounts=accounts)
    for batch in batches(messages):
        world.feed(batch)
    assert world.goes_on() is not None, raised
    world.close()


def test_a_case_is_cut_down_and_written_as_it_is_read(tmp_path: Path) -> None:
    messages = [Publication("x", f"a.{number}", bytes([number]), {"h": number}, None, False) for number in range(100)]
    found = fewest(messages, lambda some: {"a.40", "a.77"} <= {each.routing_key for each in some})
    assert [each.routing_key for each in found] == ["a.40", "a.77"]
    file = tmp_path / "cases.jsonl"
    note("a slip", found, accounts=True, file=file)
    assert cases(file) == [("a slip", True, found)]
