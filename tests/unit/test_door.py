"""What strangers send to a master and to a node, stepped by hand: each is set aside with its reason, nobody dies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.numbers.encodings import encode_vector
from common.wire.base import Message
from common.wire.broker import Delivery, Publication
from common.wire.codec import encode
from common.wire.to_master import Fetch, InstructionAck, Join, Stop
from common.wire.to_node import Introduce, Notice
from common.wire.transfer import payload_digest
from common.wire.versions import publish_version
from tests.unit.stepped import DIGEST, LAYOUT, TOPOLOGY, HandMaster, SteppedMaster, SteppedNode, connection


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
    clock.wait(1.0)
    master.master.look()
    node.node.hear(replace(to_node, unreadable="the headers cannot be read: a test"))
    assert letters.read() == [("headers", join), ("headers", introduce)]
    assert "b" not in master.master.state.nodes


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("a.alive", Stop(sender="a", encoder="text-1")),
        ("a.status", Join(node="a", incarnation="i", types=["text"])),
        ("a.join", InstructionAck(node="a", incarnation="i", encoder="text-1", accepted=True, samples=1)),
        ("a.join.stop", Join(node="a", incarnation="i", types=["text"])),
    ],
)
def test_a_message_under_the_key_of_another_kind_is_set_aside(
    server: MemoryServer, clock: VirtualClock, key: str, message: Message
) -> None:
    """The broker's permissions are for keys: who may say that it lives must not end a training with that."""
    master, letters = SteppedMaster(server, clock).start(), Letters(server)
    connection(server, "a").declare(TOPOLOGY.node("a", ("text",)))
    came = delivered(server, TOPOLOGY.master_inbox, Publication(TOPOLOGY.request, "a.join", encode(message)))
    before = master.journal.log.last_offset
    master.master.hear(replace(came, routing_key=key, body=encode(message)))
    master.run(0.5)
    assert ("sender", encode(message)) in letters.read()
    assert master.journal.log.last_offset == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_f1_a_version_with_numbers_that_are_none_is_not_adopted_and_the_master_is_asked(
    server: MemoryServer, clock: VirtualClock, value: float
) -> None:
    master, node = HandMaster(server, clock), SteppedNode(server, clock).start()
    master.let_in()
    node.run(1.0)
    bodies = encode_vector(torch.full((LAYOUT.size,), value), "float32")
    publish(master, 1, bodies)
    master.say(Notice(encoder="text-1", version=1, digest=payload_digest(bodies), published_at=0.0))
    node.run(2.0)
    assert node.training.version == 0
    assert [fetch.sought for fetch in master.heard(Fetch)] == [1]


def test_f1_a_version_that_the_master_did_not_name_is_not_adopted_whatever_its_number(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master, node = HandMaster(server, clock), SteppedNode(server, clock).start()
    master.let_in()
    node.run(1.0)
    forged = encode_vector(torch.full((LAYOUT.size,), 7.0), "float32")
    publish(master, 1, forged, epoch=1 << 50)
    publish(master, 1 << 50, forged, epoch=1 << 50)
    master.publish(1)
    master.say(Notice(encoder="text-1", version=1, digest=DIGEST, stream_digest=DIGEST, published_at=0.0))
    node.run(2.0)
    assert node.training.version == 1 and master.heard(Fetch) == []


def publish(master: HandMaster, version: int, bodies: list[bytes], epoch: int = 1) -> None:
    """As anybody can who may write to the stream."""
    publish_version(
        master.broker,
        TOPOLOGY,
        encoder="text-1",
        epoch=epoch,
        version=version,
        encoding="float32",
        layout_digest=LAYOUT.digest,
        bodies=bodies,
        progress=0.0,
        clock=master.clock,
    )
