"""Whose update is fetched next, and how many messages of a sender are taken: what holds whatever members do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from master_service.decisions.rates import KEPT_SENDERS, Rates
from master_service.decisions.turns import ALWAYS, AT_ONCE, LINE_UPDATES, STINT_SECONDS, Turns, Waiting

PATIENCE = 15.0
STEP = 0.25


@dataclass(frozen=True)
class Sent:
    """An update: its node, its size, and after how many seconds of being fetched its chunks are all here; never, if
    `takes` is None. One that `teases` has the first of them at once, each time. `counts`: it is not refused."""

    node: str
    number: int
    size: int
    takes: float | None
    counts: bool = True
    teases: bool = False


def waiting(sent: Sent, attempt: int = 0) -> Waiting[Sent]:
    return Waiting(sent, sent.node, (str(sent.number),), attempt, sent.size, 300, PATIENCE)


class Play:
    """What the master does with turns, over time."""

    def __init__(self, budget: int) -> None:
        self.turns: Turns[Sent] = Turns()
        self.now, self.budget = 0.0, budget
        self.fetched: dict[str, tuple[Waiting[Sent], float]] = {}
        self.begun: list[str] = []
        self.whole: dict[Sent, float] = {}
        self.overdue: dict[Sent, float] = {}
        self.answered: list[Sent] = []

    def step(self) -> None:
        for node, (each, since) in list(self.fetched.items()):
            takes = each.item.takes
            if takes is not None and self.now - since >= takes:
                self.turns.came(node, self.now)
                self.whole[each.item] = self.now
                self._done(node)
        while (late := self.turns.overdue(self.now)) is not None:
            self.overdue[self.fetched[late][0].item] = self.now
            self._done(late)
        while (node := self.turns.park(self.now)) is not None:
            del self.fetched[node]
        while (turn := self.turns.turn()) is not None:
            if not turn.item.counts:
                self.answered.append(self.turns.answered().item)
            elif self.turns.has_room(turn.size, self.budget):
                self.fetched[turn.node] = self.turns.begun(self.now), self.now
                self.begun.append(turn.node)
                if turn.item.teases:
                    self.turns.came(turn.node, self.now)
            else:
                break
        sizes = [each.size for each, _ in self.fetched.values()]
        assert len(sizes) <= AT_ONCE
        assert len(sizes) <= ALWAYS or sum(sizes) <= self.budget
        self.now += STEP

    def until_quiet(self, most: float) -> None:
        while list(self.turns):
            self.step()
            assert self.now < most, f"still there: {list(self.turns)}"

    def _done(self, node: str) -> None:
        del self.fetched[node]
        self.turns.done(node)


NODES = "abcdefghijkl"
UPDATES = st.lists(
    st.tuples(
        st.sampled_from(NODES),
        st.integers(1, 100),
        st.one_of(st.none(), st.floats(0.0, 40.0)),
        st.booleans(),
    ),
    max_size=60,
)


@given(UPDATES, st.integers(1, 250))
@settings(max_examples=60, deadline=None)
def test_every_update_comes_to_an_end_whatever_others_keep_back(
    plan: list[tuple[str, int, float | None, bool]], budget: int
) -> None:
    """Whole, overdue or answered, each once; those whose chunks are there are whole, also where chunks take longer than
    a stint, and however many nodes' never come."""
    play = Play(budget)
    sent = [Sent(node, number, size, takes, counts) for number, (node, size, takes, counts) in enumerate(plan)]
    for each in sent:
        assert play.turns.put(waiting(each)) is None
    play.until_quiet(most=60 * 200.0)
    ends = Counter([*play.whole, *play.overdue, *play.answered])
    assert ends == Counter(sent)
    for each in sent:
        assert (each in play.answered) is not each.counts
        if each.counts and (each.takes is None or abs(each.takes - PATIENCE) > STEP):
            assert (each in play.whole) is (each.takes is not None and each.takes < PATIENCE)


@given(st.integers(1, 30), st.integers(2, 11))
@settings(max_examples=30, deadline=None)
def test_nodes_take_turns_however_much_one_sends(flood: int, others: int) -> None:
    play = Play(budget=1)
    for number in range(flood):
        play.turns.put(waiting(Sent("a", number, 50, 0.0)))
    for number, node in enumerate(NODES[1:others]):
        play.turns.put(waiting(Sent(node, 100 + number, 50, 0.0)))
    play.until_quiet(most=1000.0)
    assert play.begun[:others] == list(NODES[:others]), "one each, in the order in which they came"


def test_who_keeps_its_chunks_back_is_waited_for_no_longer_than_a_stint_and_then_goes_behind() -> None:
    play = Play(budget=1)
    for number, silent in enumerate("ab"):
        play.turns.put(waiting(Sent(silent, number, 50, None)))
    for number in range(40):
        play.turns.put(waiting(Sent("c", 100 + number, 50, 0.0)))
        play.turns.put(waiting(Sent("d", 200 + number, 50, 0.0)))
    play.step()
    assert set(play.fetched) == {"a", "b"}
    while not play.whole:
        play.step()
    assert play.now <= STINT_SECONDS + 3 * STEP
    play.until_quiet(most=200.0)
    assert len(play.whole) == 80 and len(play.overdue) == 2


def test_nobody_is_parked_whom_nobody_waits_for() -> None:
    play = Play(budget=1)
    play.turns.put(waiting(Sent("a", 0, 50, None)))
    play.turns.put(waiting(Sent("b", 0, 50, 12.0)))
    play.until_quiet(most=100.0)
    assert play.begun == ["a", "b"]
    assert list(play.overdue.values()) == [PATIENCE]


def test_who_is_slow_gets_through_while_others_always_wait() -> None:
    play = Play(budget=1)
    slow = Sent("a", 0, 50, 10.0)
    play.turns.put(waiting(slow))
    while slow not in play.whole:
        for node in "bcd":
            play.turns.put(waiting(Sent(node, int(4 * play.now), 50, 0.3)))
        play.step()
        assert slow not in play.overdue and play.now < 10 * PATIENCE


def test_who_gives_one_chunk_again_and_again_is_overdue_like_who_gives_none() -> None:
    play = Play(budget=1)
    play.turns.put(waiting(Sent("a", 0, 50, None, teases=True)))
    play.turns.put(waiting(Sent("b", 0, 50, None, teases=True)))
    last = 0.0
    while len(play.overdue) < 2:
        play.turns.put(waiting(Sent("c", int(4 * play.now), 50, 0.0)))
        before = len(play.whole)
        play.step()
        last = play.now if len(play.whole) > before else last
        assert play.now - last <= 2 * PATIENCE and play.now < 20 * PATIENCE
    assert len(play.whole) > 20


def test_a_later_attempt_takes_the_place_of_an_earlier_one_and_a_full_line_takes_no_more() -> None:
    turns: Turns[Sent] = Turns()
    first, again = waiting(Sent("a", 0, 1, 0.0)), waiting(Sent("a", 0, 1, 0.0), attempt=1)
    assert turns.put(first) is None
    assert turns.put(again) is first and turns.put(first) is first
    assert list(turns) == [again]
    for number in range(1, LINE_UPDATES):
        assert turns.put(waiting(Sent("a", number, 1, 0.0))) is None
    over = waiting(Sent("a", LINE_UPDATES, 1, 0.0))
    assert turns.put(over) is over and not turns.has_place("a")
    assert turns.put(waiting(Sent("b", 0, 1, 0.0))) is None, "another's line is its own"
    assert turns.turn() is again and turns.answered() is again
    assert turns.has_place("a") and turns.put(over) is None


# --- rates -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 2.0), max_size=200), st.floats(0.5, 50.0), st.floats(1.0, 100.0))
@settings(max_examples=100, deadline=None)
def test_no_sender_is_allowed_more_than_its_rate_and_who_waits_is_allowed(
    gaps: list[float], per_second: float, burst: float
) -> None:
    rates, now, taken = Rates(per_second, burst), 0.0, 0
    for gap in gaps:
        now += gap
        taken += rates.allows("a", now)
        assert taken <= burst + per_second * now + 1e-6
    assert rates.allows("a", now + 1.0 / per_second + 1e-6), "a token has come"
    assert rates.allows("b", now), "of another sender nothing is taken"


def test_rates_know_a_bounded_number_of_senders_and_say_it_once() -> None:
    rates = Rates(1.0, 1.0)
    for number in range(KEPT_SENDERS + 50):
        rates.allows(f"made-up-{number}", 0.0)
    assert len(rates) == KEPT_SENDERS
    assert [rates.is_news("a", 0.0), rates.is_news("a", 5.0), rates.is_news("b", 5.0)] == [True, False, True]
