"""What strangers send to a master and to a node, stepped by hand: each is set aside with its reason, nobody dies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.broker import Delivery, Publication
from common.wire.codec import encode
from common.wire.messages import Introduce, Join
from tests.unit.stepped import TOPOLOGY, SteppedMaster, SteppedNode, connection


class Letters:
    """Reads the dead letters: (reason, body) of each."""

    def __init__(self, server: MemoryServer) -> None:
        self._broker = connection(server, "looker")
        self._broker.declare(TOPOLOGY.master())
        self.came: list[Delivery] = []
        self._broker.consume(TOPOLOGY.dead_letters, self.came.append, prefetch=10_000)

    def read(self) -> list[tuple[str, bytes]]:
        while self._broker.deliver():
            pass
        return [(each.routing_key, each.body) for each in self.came]


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def delivered(server: MemoryServer, queue: str, publication: Publication) -> Delivery:
    """What a consumer of the queue would be given."""
    broker = connection(server, publication.routing_key.partition(".")[0])
    broker.publish(publication)
    came: list[Delivery] = []
    broker.consume(queue, came.append, prefetch=1)
    assert broker.deliver()
    return came[0]


def test_f1_who_gets_what_has_unreadable_headers_sets_it_aside(server: MemoryServer, clock: VirtualClock) -> None:
    master, node = SteppedMaster(server, clock), SteppedNode(server, clock)
    letters = Letters(server)
    node.node.start()
    join, introduce = encode(Join(node="b", incarnation="i", types=["text"])), encode(Introduce(node="a"))
    to_master = delivered(server, TOPOLOGY.master_inbox, Publication(TOPOLOGY.request, "b.join", join))
    to_node = delivered(server, TOPOLOGY.node_inbox("a"), Publication(TOPOLOGY.receipt, "a", introduce))
    master.master.hear(replace(to_master, unreadable="the headers cannot be read: a test"))
    node.node.hear(replace(to_node, unreadable="the headers cannot be read: a test"))
    assert letters.read() == [("headers", join), ("headers", introduce)]
    assert "b" not in master.master.state.nodes
