"""What a node receives of an encoder's stream, over RabbitMQ: the versions that it adopts, and hardly a byte beside."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from common.brokers import open_broker
from common.clock import SYSTEM
from common.numbers.encodings import encode_vector
from common.numbers.layout import Layout
from common.numbers.slicing import SLICE
from common.wire.codec import received
from common.wire.to_node import Notice
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion
from master_service.decisions.effects import Publish
from master_service.wire.publisher import Publisher
from node_service.handover.reading import Reading, VersionRead
from tests.builders import encoded
from tests.integration.harness import eventually
from tests.unit.scenario import DIGEST
from tests.unit.stepped import instruction


class Line:
    """A master that writes versions and tells of them, and a node that reads: each over a connection of its own."""

    def __init__(self, url: str, size: int) -> None:
        self.layout = Layout([("w", (size,))])
        self.topology = Topology(f"bytes-{secrets.token_hex(4)}")
        self.brokers = [open_broker(url, client_name=name, dead_letters=None) for name in ("master", "node", "reader")]
        master, node, reader = self.brokers
        master.declare(self.topology.master())
        node.declare(self.topology.node("n", ("text",)))
        self.publisher = Publisher(
            master,
            self.topology,
            "float32",
            clock=SYSTEM,
            ending=threading.Event(),
            new_id=lambda: secrets.token_hex(8),
        )
        self.notices: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        self._node = node
        node.consume(self.topology.node_inbox("n"), self._hear, prefetch=100)
        self.reading = Reading(reader, self.topology, SYSTEM)
        self.version_bytes = 4 * size
        self.offsets: list[int | None] = []

    def _hear(self, delivery) -> None:  # type: ignore[no-untyped-def]
        notice = received(delivery)
        if isinstance(notice, Notice):
            self.notices.put(notice)
        self._node.ack(delivery)

    @property
    def came(self) -> int:
        """Bytes that have come for the reader."""
        return self.brokers[2].status().bytes_in

    def write(self, version: int) -> None:
        bodies = encode_vector(torch.full((self.layout.size,), float(version)), "float32")
        self.publisher.version(Publish("text-1", version, progress=0.0), 1, self.layout.digest, encoded(bodies))
        self.publisher.send("n", Notice(encoder="text-1", version=version, digest=DIGEST, published_at=0.0))

    def told(self, version: int) -> Notice:
        """The notice of a version; those before it have come then."""
        while (notice := self.notices.get(timeout=30.0)).version < version:
            self.offsets.append(notice.stream_offset)
        self.offsets.append(notice.stream_offset)
        return notice

    def read(self, notice: Notice) -> CompleteVersion:
        """Read what a notice tells of, as a node does."""
        said = {"digest": notice.stream_digest, "offset": notice.stream_offset}
        self.reading.read(instruction(layout=self.layout), notice.version, notice.published_at, exact=False, **said)
        found: list[VersionRead] = []

        def is_read() -> bool:
            read = self.reading.read_one(0.05)
            found.extend([read] if isinstance(read, VersionRead) else [])
            return bool(found)

        eventually(is_read, 60.0)
        version = found[0].version
        assert version is not None, found[0].problem
        return version

    def close(self) -> None:
        self.reading.close()
        for name in self.topology.queue_names(["n"], ["text-1"]):
            self.brokers[0].delete_queue(name)
        for broker in self.brokers:
            broker.close()


@pytest.fixture
def lines(amqp_url: str) -> Iterator[list[Line]]:
    made: list[Line] = []
    yield made
    for line in made:
        line.close()


def test_of_many_versions_a_slow_reader_receives_those_that_it_adopts(amqp_url: str, lines: list[Line]) -> None:
    lines.append(line := Line(amqp_url, 20_000))  # larger than what it is worth to read past
    versions = 300
    writing = threading.Thread(target=lambda: [line.write(version) for version in range(versions)], daemon=True)
    writing.start()
    adopted = [line.read(line.told(0)).version]
    while adopted[-1] < versions - 1:
        notice = line.told(adopted[-1] + 1)
        time.sleep(0.03)  # a step
        while not line.notices.empty():
            notice = line.told(0)
        adopted.append(line.read(notice).version)
    writing.join(30.0)
    assert len(adopted) < versions / 2, "it is slow"
    assert line.came < 1.3 * len(adopted) * (line.version_bytes + 500), f"{len(adopted)} adopted"
    assert None not in line.offsets[1:]


def test_versions_that_were_written_while_a_node_was_busy_are_not_sent_to_it(amqp_url: str, lines: list[Line]) -> None:
    lines.append(line := Line(amqp_url, 2 * SLICE + 5))
    line.write(0)
    assert line.read(line.told(0)).version == 0
    for version in range(1, 5):
        line.write(version)
    before = line.came
    assert line.read(line.told(4)).version == 4
    assert line.came - before < 1.3 * line.version_bytes
    assert None not in line.offsets[1:]
    for version in (5, 6):
        line.write(version)
    notices = [line.told(version) for version in (5, 6)]
    assert [line.read(notice).version for notice in notices] == [5, 6]  # the first is whole while the other is there
    assert line.came - before < 1.3 * 3 * line.version_bytes
    newcomer = Reading(line.brokers[2], line.topology, SYSTEM)
    line.reading, before = newcomer, line.came
    assert line.read(notices[1]).version == 6
    assert line.came - before < 1.3 * line.version_bytes


def test_a_stream_that_has_lost_its_end_is_read_from_its_beginning(amqp_url: str, lines: list[Line]) -> None:
    """A broker that was killed: then the offsets that a reader knows, and those that it was told, are too high."""
    lines.append(line := Line(amqp_url, 100))
    for version in range(5):
        line.write(version)
    assert line.read(line.told(4)).version == 4
    line.brokers[0].delete_queue(line.topology.stream("text-1"))
    line.write(5)
    notice = line.told(5)
    assert line.read(notice.model_copy(update={"stream_offset": 1000})).version == 5
    line.write(6)
    assert line.read(line.told(6)).version == 6


def test_the_end_of_a_stream_is_looked_at_anew_after_a_reconnect(amqp_url: str, lines: list[Line]) -> None:
    lines.append(line := Line(amqp_url, 100))
    for version in range(3):
        line.write(version)
    master = line.brokers[0]
    link = master._publisher.link  # type: ignore[attr-defined]  # private: no public verb loses one connection
    link.post(lambda: link.connection.close())
    eventually(lambda: master.status().connected and master.status().reconnects > 0, 30.0)
    for version in range(3, 5):
        line.write(version)
    notice = line.told(4)
    assert line.offsets == [None, 1, 2, None, 4]
    assert line.read(notice).version == 4
