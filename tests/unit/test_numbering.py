"""What never came is noticed by the numbers on what did, and then a node asks for everything again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.bounds import REPORT
from common.wire.broker import Delivery, Publication
from common.wire.codec import encode, received
from common.wire.numbering import MISSED_SECONDS, Hearing, Numbers
from common.wire.to_master import Alive, AskStatus, Get, Join
from common.wire.to_node import Answer, Introduce, StatusReport
from master_service.log.payloads import MemoryPayloads
from tests.unit.stepped import TOPOLOGY, SteppedMaster, SteppedNode, connection, together

#: What a master sends: to the node a or b, or to all of a type; and what becomes of it on the way to a.
SENT = st.lists(
    st.tuples(st.sampled_from(["a", "b", "text", "image"]), st.sampled_from(["heard", "heard", "lost", "twice"])),
    max_size=8,
)


def delivery(key: str, headers: dict[str, Any]) -> Delivery:
    return Delivery("q", "x", key, b"", headers, None, None, False, None, None, None)


@example([("a", "heard"), ("text", "lost"), ("a", "heard")])
@example([("a", "heard"), ("image", "lost"), ("a", "heard")])
@example([("text", "heard"), ("a", "lost"), ("text", "heard")])
@given(SENT)
def test_it_is_noticed_that_something_never_came_once_there_is_something_to_tell_by(
    sent: list[tuple[str, str]],
) -> None:
    numbers, hearing = Numbers(), Hearing(["text"])
    numbers.begin(7)
    relevant = []
    for key, fate in sent:
        headers = numbers.to_one(key) if key in ("a", "b") else numbers.to_all(key)
        if key not in ("a", "text"):
            continue
        relevant.append((key, fate))
        for _ in range({"heard": 1, "lost": 0, "twice": 2}[fate]):
            hearing.hear(delivery(key, headers))

    def tells_of(key: str, part: list[tuple[str, str]]) -> bool:
        """What is for a alone says how many were for all, but not the other way round."""
        return any(fate != "lost" and (of == key or of == "a") for of, fate in part)

    missed = any(
        fate == "lost" and tells_of(key, relevant[:index]) and tells_of(key, relevant[index:])
        for index, (key, fate) in enumerate(relevant)
    )
    assert hearing.asks(0.0) is missed


def test_what_is_missed_is_asked_for_once_and_not_again_for_a_while() -> None:
    numbers, hearing = Numbers(), Hearing(["text"])
    numbers.begin(7)
    sent = [delivery("a", numbers.to_one("a")) for _ in range(9)]
    for each in sent[0], sent[2]:
        hearing.hear(each)
    assert hearing.asks(10.0) and not hearing.asks(10.0)
    hearing.hear(sent[3])
    hearing.hear(sent[1])  # comes again
    assert not hearing.asks(1000.0), "nothing was missed since"
    hearing.hear(sent[5])
    assert hearing.asks(2000.0)
    hearing.hear(sent[8])
    assert not hearing.asks(2000.0 + MISSED_SECONDS - 0.1) and hearing.asks(2000.0 + MISSED_SECONDS)


def test_a_new_epoch_may_have_followed_on_something_and_an_old_one_says_nothing() -> None:
    hearing, of = Hearing(["text"]), {}
    for epoch in 7, 8:
        numbers = Numbers()
        numbers.begin(epoch)
        of[epoch] = [delivery("a", numbers.to_one("a")) for _ in range(4)]
    hearing.hear(of[7][0])
    assert not hearing.asks(0.0), "what came before it was there is not missed"
    hearing.hear(of[8][0])
    assert hearing.asks(0.0)
    for each in of[7][3], of[8][1]:
        hearing.hear(each)
    assert not hearing.asks(100.0)


def test_before_an_epoch_has_begun_nothing_is_numbered() -> None:
    numbers = Numbers()
    assert numbers.to_one("a") == {} == numbers.to_all("text")


def test_names_that_strangers_make_up_do_not_fill_the_memory() -> None:
    numbers = Numbers()
    numbers.begin(1)
    for number in range(10_050):
        numbers.to_one(f"n{number}")
    assert numbers.to_one("n10049")["x-number"] == 1 and numbers.to_one("n0")["x-number"] == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"x-epoch": "7", "x-number": 9},
        {"x-epoch": 7, "x-number": "9"},
        {"x-epoch": 7, "x-number": -1},
        {"x-epoch": True, "x-number": 9},
        {"x-epoch": 1 << 60, "x-number": 9},
        {"x-epoch": 7, "x-number": None},
        {"x-epoch": [7], "x-number": {}},
        {"x-epoch": 7, "x-number": 1, "x-broadcasts": 9},
        {"x-epoch": 7, "x-number": 1, "x-broadcasts": "text=" + "9" * 5000},
        {"x-epoch": 7, "x-number": 1, "x-broadcasts": "text=9999999999999999"},
        {"x-epoch": 7, "x-number": 1, "x-broadcasts": "text=-9 text= =9 text 9"},
        {"x-epoch": 7, "x-number": 1, "x-broadcasts": "text=\u0663"},
        {},
    ],
)
def test_headers_that_no_master_of_ours_sends_say_nothing(headers: dict[str, Any]) -> None:
    numbers, hearing = Numbers(), Hearing(["text"])
    numbers.begin(7)
    numbers.to_all("text")
    hearing.hear(delivery("a", numbers.to_one("a")))
    hearing.hear(delivery("a", headers))
    assert not hearing.asks(0.0)


# --- stepped ---------------------------------------------------------------------------------------------------------

#: A node that asks for nothing of itself.
QUIET = {"ask_after_seconds": 1e9, "resend_after_seconds": 1e9}


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def joins(served: SteppedMaster) -> int:
    return sum(isinstance(entry.body, Join) for entry in served.journal.log.entries())


def drop_head(server: MemoryServer, node: str, count: int) -> int:
    """As a full inbox does: the oldest messages go. Gives how many went."""
    broker, gone = connection(server, "drops"), list[Delivery]()
    broker.consume(TOPOLOGY.node_inbox(node), gone.append, prefetch=count)
    broker.deliver()
    while len(gone) < count and broker.deliver():
        pass
    broker.ack(*gone)
    broker.close()
    return len(gone)


def test_a_node_whose_inbox_has_dropped_something_joins_and_is_told_everything_again(
    server: MemoryServer, clock: VirtualClock
) -> None:
    served, node = SteppedMaster(server, clock).start(), SteppedNode(server, clock, **QUIET).start()
    together(20.0, served, node)
    assert joins(served) == 1, "nothing was lost"
    counted = node.node.figures.accepted
    while not drop_head(server, "a", 1):
        node.turn()
        served.turn()
        clock.wait(0.5)
    together(30.0, served, node)
    assert joins(served) == 2 and node.node.figures.accepted > counted


def test_a_node_is_told_everything_again_by_a_master_that_has_started_anew(
    server: MemoryServer, clock: VirtualClock
) -> None:
    payloads = MemoryPayloads()
    served, node = SteppedMaster(server, clock, payloads=payloads).start(), SteppedNode(server, clock, **QUIET).start()
    together(10.0, served, node)
    served.broker.close()
    served = SteppedMaster(server, clock, payloads=payloads, db=served.db).start()
    together(20.0, served, node)
    assert joins(served) == 2 and len(node.built) == 1


def test_who_only_asks_is_answered_without_a_number(server: MemoryServer, clock: VirtualClock) -> None:
    served, broker, came = SteppedMaster(server, clock).start(), connection(server, "a"), list[Delivery]()
    broker.declare(TOPOLOGY.node("a", ("text",)))
    broker.consume(TOPOLOGY.node_inbox("a"), came.append, prefetch=10)
    for message in AskStatus(sender="a"), Get(sender="a", encoder_type="text"), Alive(node="a", incarnation="i"):
        broker.publish(Publication(TOPOLOGY.request, f"a.{message.kind.partition('.')[2]}", encode(message)))
    served.turn()
    while broker.deliver():
        pass
    numbered = {type(received(each, REPORT)): "x-number" in each.headers for each in came}
    assert numbered == {StatusReport: False, Answer: False, Introduce: True}
