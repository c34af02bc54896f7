"""Words of nodes are gathered: who is asked, how long, what counts, and what the log leads to whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoders import words
from common.wire.fields import MAX_COUNT
from common.wire.to_master import Get, Join, Leave, Stop, Words
from common.wire.to_node import Answer, Introduce, WordsWanted
from master_service.arithmetic.generation import generated
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Broadcast, Effect, Generate
from master_service.decisions.records import Gathering, Generated, GenerationFailed, Presence, Started, Tick
from master_service.decisions.settings import WordsRule
from master_service.decisions.state import State
from tests.builders import LAYOUT
from tests.integration.harness import SMALL
from tests.unit.scenario import DIGEST, Scenario, sent

AGREED = {**SMALL, "vocabulary": "agreed", "entries": 300}
Counts = list[tuple[str, int]]


class Gathered:
    """A scenario in which words are being gathered, with these nodes here."""

    def __init__(self, *nodes: str, **settings: Any) -> None:
        self.run = Scenario(architecture=AGREED, words=WordsRule(nodes=2, seconds=60), **settings)
        for node in nodes:
            self.join(node)
        [order] = self.run.apply(Get(sender="operator", encoder_type="text"))
        assert isinstance(order, Generate) and order.gathered is None
        [outcome] = generated(order)
        assert isinstance(outcome.body, Gathering)
        self.name = order.encoder
        self.asked = self.run.apply(outcome.body)

    def join(self, node: str, types: tuple[str, ...] = ("text",)) -> list[Effect]:
        return self.run.apply(Join(node=node, incarnation="first", types=list(types)))

    def words(
        self, node: str, counts: Sequence[tuple[str, int]] = (), incarnation: str = "first", many: int = 99
    ) -> Words:
        plain: dict[str, Any] = {"node": node, "incarnation": incarnation, "encoder": self.name, "documents": many}
        return Words(**plain, words=list(counts))

    def say(self, *said: Any, **named: Any) -> list[Effect]:
        return self.run.apply(self.words(*said, **named))

    @property
    def encoder(self) -> Any:
        return self.run.coordinator.state.encoders[self.name]


def orders(effects: list[Effect]) -> list[Generate]:
    return [effect for effect in effects if isinstance(effect, Generate)]


def test_everybody_is_asked_and_once_all_have_answered_the_encoder_is_made_of_the_sums() -> None:
    it = Gathered("a", "b", "image-only")
    it.join("image-only", ("image",))
    wanted = WordsWanted(encoder=it.name, encoder_type="text")
    assert Broadcast("text", wanted) in it.asked
    [answer] = sent(it.asked, Answer, "operator")
    assert answer.accepted and answer.status == "gathering"
    assert it.say("a", [("fever", 3), ("the", 9)]) == []
    late = it.join("late")
    assert sent(late, WordsWanted, "late") == [wanted] and sent(it.join("a"), WordsWanted) == [], "a has answered"
    assert it.say("b") == [], "it takes part without contributing; another one is missing"
    [order] = orders(it.say("late", [("fever", 2)]))
    assert order.gathered == {"fever": 5, "the": 9} and it.encoder.status == "generating"
    assert it.encoder.answered == {"a": True, "b": False, "late": True}
    assert it.run.coordinator.unmade() == [order], "a master that dies now makes it of the same words"
    assert it.say("b", [("more", 2)]) == [] and it.run.coordinator.unmade() == [order], "too late"
    plain = {"layout": LAYOUT.plain(), "layout_digest": LAYOUT.digest, "digest": DIGEST}
    told = it.run.apply(Generated(encoder=it.name, architecture=AGREED, **plain))
    assert sent(told, Answer, "operator")[0].status == "running" and it.encoder.gathered is None
    assert sent(it.join("last"), WordsWanted) == []


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from("abcde"),
        st.dictionaries(st.sampled_from(["fever", "the", "of"]), st.integers(2, 1 << 40), min_size=1)
        .map(lambda d: list(d.items()))
        .flatmap(lambda counts: st.tuples(st.integers(max(n for _, n in counts), MAX_COUNT), st.just(counts))),
        min_size=2,
    ),
    st.data(),
)
def test_neither_order_nor_repeats_of_contributions_make_a_difference(
    contributions: dict[str, tuple[int, Counts]], data: st.DataObject
) -> None:
    def run(order: list[str]) -> Any:
        it = Gathered(*"abcde", "absent")
        made = []
        for node in order:
            documents, counts = contributions[node]
            made += orders(it.say(node, counts, many=documents))
        it.run.at += 60
        [made] = made + orders(it.run.apply(Tick()))
        # the log alone leads to the same again, through a snapshot anywhere in it
        cut = data.draw(st.integers(0, len(it.run.log) - 1), label="snapshot")
        half = Coordinator()
        for entry in it.run.log[:cut]:
            half.handle(entry)
        rest = Coordinator(State.model_validate_json(half.state.model_dump_json()))
        effects = [effect for entry in it.run.log[cut:] for effect in rest.handle(entry)]
        assert rest.state == it.run.coordinator.state and (orders(effects) or rest.unmade())[-1] == made
        return made.gathered

    names = sorted(contributions)
    shuffled = data.draw(st.permutations(names + data.draw(st.lists(st.sampled_from(names), max_size=4))))
    total = words.summed(words.WordList(many, 2, tuple(counts)) for many, counts in contributions.values())
    assert run(names) == run(shuffled) == total


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdx"), st.sampled_from(["first", "old"]), st.sampled_from([0, 2])), max_size=9
    )
)
def test_words_are_wanted_exactly_when_they_would_change_something(said: list[tuple[str, str, int]]) -> None:
    it = Gathered("a", "b", "c")
    it.join("d", ("image",))
    for node, incarnation, count in said:
        body = it.words(node, [("fever", count)] if count else [], incarnation)
        before, wanted = it.run.coordinator.state.model_dump_json(), it.run.coordinator.wants_words(body)
        effects = it.run.apply(body)
        assert wanted == (it.run.coordinator.state.model_dump_json() != before)
        assert wanted or effects == [] or sent(effects, Introduce, node) == [Introduce(node=node)]
    unknown = it.words("a").model_copy(update={"encoder": "text-0"})
    assert not it.run.coordinator.wants_words(unknown)


def test_the_first_answer_of_a_node_counts_whatever_it_says_later() -> None:
    it = Gathered("a", "b")
    it.say("a", [("fever", 3)])
    it.join("a")
    assert it.say("a", [("fever", 50), ("other", 9)]) == []
    assert orders(it.say("b"))[0].gathered == {"fever": 3}


def test_after_the_time_it_is_made_of_what_came_and_a_restart_gives_the_time_anew() -> None:
    it = Gathered("a", "b", "silent")
    it.say("a", [("fever", 3)])
    it.say("b")
    assert it.run.coordinator.deadline() == it.run.at + 60
    it.run.at += 59
    assert orders(it.run.apply(Tick())) == []
    effects = it.run.apply(Started(epoch=2, fingerprint={}))
    assert Broadcast("text", WordsWanted(encoder=it.name, encoder_type="text")) in effects
    it.run.at += 59
    assert orders(it.run.apply(Tick())) == [] and it.run.coordinator.deadline() == it.run.at + 1
    it.run.at += 1
    [order] = orders(it.run.apply(Tick()))
    assert order.gathered == {"fever": 3} and it.run.coordinator.deadline() is None


def test_while_too_few_have_answered_or_none_with_words_the_time_begins_anew() -> None:
    it = Gathered()

    def time_is_over() -> list[Effect]:
        it.run.at += 60
        effects = it.run.apply(Tick())
        if not orders(effects):
            assert it.run.coordinator.deadline() == it.run.at + 60 and it.encoder.status == "gathering"
        return effects

    assert time_is_over() == time_is_over() == [], "nobody is there yet"
    it.join("early")
    assert it.say("early", [("surname", 9)]) == time_is_over() == [], "one alone decides nothing, nor is it asked again"
    it.join("silent")
    assert sent(time_is_over(), WordsWanted, "silent") == [WordsWanted(encoder=it.name, encoder_type="text")]
    it.run.apply(Presence(node="silent", present=False))
    it.join("closed")
    [order] = orders(it.say("closed"))
    assert order.gathered == {"surname": 9}
    again = Coordinator()
    for entry in it.run.log:
        again.handle(entry)
    assert again.state == it.run.coordinator.state and again.unmade() == [order]
    none = Gathered("a", "b", "silent")
    none.say("a")
    none.say("b")
    none.run.at += 60
    assert sent(none.run.apply(Tick()), WordsWanted, "silent"), "the last one may have words"
    none.join("last")
    none.say("last", [("fever", 2)])
    none.run.at += 60
    assert [order.gathered for order in orders(none.run.apply(Tick()))] == [{"fever": 2}]


@pytest.mark.parametrize("goes", [Leave(node="c", incarnation="first"), Presence(node="c", present=False)])
def test_nobody_waits_for_a_node_that_has_gone(goes: Any) -> None:
    it = Gathered("a", "b", "c")
    it.say("a", [("fever", 3)])
    assert orders(it.say("b")) == []
    assert [order.gathered for order in orders(it.run.apply(goes))] == [{"fever": 3}]


def test_one_node_alone_agrees_with_nobody_before_the_time_is_over() -> None:
    it = Gathered("a")
    assert orders(it.say("a", [("fever", 3)])) == []
    more = Gathered("a", "b", min_nodes=3)
    assert orders(more.say("a") + more.say("b", [("fever", 3)])) == [], "training would not begin with fewer either"


def test_a_stranger_is_told_to_join_first() -> None:
    it = Gathered("a", "b")
    for effects in (it.say("unknown", [("fever", 3)]), it.say("a", [("fever", 3)], incarnation="old")):
        assert len(effects) == len(sent(effects, Introduce)) == 1
    it.join("image-only", ("image",))
    assert it.say("image-only", [("fever", 3)]) == [], "nobody asked it"
    assert it.encoder.answered == {} and it.encoder.gathered == {}


def test_where_nobody_contributes_who_asked_is_told_what_to_do() -> None:
    it = Gathered("a", "b")
    it.say("a")
    [order] = orders(it.say("b"))
    [outcome] = generated(order)
    assert isinstance(outcome.body, GenerationFailed) and "private.contribute_words = true" in outcome.body.reason
    [refusal] = sent(it.run.apply(outcome.body), Answer, "operator")
    assert not refusal.accepted and refusal.detail == outcome.body.reason and it.encoder.gathered is None


def test_who_joins_in_the_wish_is_answered_and_a_stop_ends_it() -> None:
    it = Gathered("a", "b")
    [answer] = sent(it.run.apply(Get(sender="other", encoder_type="text")), Answer)
    assert (answer.encoder, answer.status) == (it.name, "gathering")
    [again] = sent(it.run.apply(Get(sender="other", encoder_type="text")), Answer)
    assert again == answer and it.encoder.askers == ["operator", "other"]
    told = it.run.apply(Stop(sender="operator"))
    assert [each.accepted for each in sent(told, Answer)] == [False, False]
    assert it.encoder.status == "failed" and it.run.coordinator.deadline() is None
    assert it.say("a", [("fever", 3)]) == it.say("b") == []
