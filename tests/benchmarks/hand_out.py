"""How long it takes until the last of many readers has a version, beside what the broker takes for the same bytes.

Each reader is a process with a connection of its own. In one run they read as nodes do, told by the master's notice; in
the other with pika alone, consuming the stream from before the first byte: nothing is checked, told or decoded.
"""

from __future__ import annotations

import queue
import secrets
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import pika
import structlog
import torch

from common.brokers import open_broker
from common.clock import SYSTEM
from common.numbers.encodings import encode_vector
from common.numbers.layout import Layout
from common.wire.broker import Delivery
from common.wire.codec import received
from common.wire.to_node import Notice
from common.wire.topology import Topology
from master_service.decisions.effects import Publish
from master_service.wire.publisher import Publisher
from node_service.handover.reading import Reading, VersionRead
from tests.benchmarks.party import forks
from tests.benchmarks.raw import open_lean
from tests.builders import encoded
from tests.unit.scenario import DIGEST
from tests.unit.stepped import instruction

_ENCODER = "text-1"
#: Versions that are written, of which the first is not counted.
_VERSIONS = 3
_PATIENCE_SECONDS = 120.0
#: Who listens for what is published from now on is there after so many seconds.
_SETTLE_SECONDS = 0.5


def hand_out(url: str, *, parameters: int, readers: int, versions: int = _VERSIONS) -> dict[str, Any]:
    """Seconds from the first chunk to the last reader (medians), of ours and of the broker's own."""
    shape = url, parameters, readers, versions
    ours, written = _timed(_read_as_nodes, _written_by_a_master(url, parameters, readers), *shape)
    raw, _ = _timed(_read_raw, _written_raw(url, parameters), *shape)
    return {
        "readers": readers,
        "parameters": parameters,
        "seconds": statistics.median(ours[1:]),
        "raw_seconds": statistics.median(raw[1:]),
        "written_times": round(written, 3),
    }


class _Line:
    """Who writes, and what the readers are told of where to read."""

    def __init__(self, name: str, write: Callable[[int], None], close: Callable[[], float]) -> None:
        self.name = name
        self.write = write
        self.close = close


def _timed(
    read: Callable[..., None], line: _Line, url: str, parameters: int, readers: int, versions: int
) -> tuple[list[float], float]:
    """Seconds of each version; and what closing the line gives."""
    context = forks()
    ready, done = context.Semaphore(0), context.Queue()
    told = [(url, line.name, number, parameters, versions, ready, done) for number in range(readers)]
    parties: list[ForkServerProcess] = [context.Process(target=read, args=each) for each in told]
    for party in parties:
        party.start()
    try:
        for _ in parties:
            assert ready.acquire(timeout=_PATIENCE_SECONDS), "a reader does not start; its words are above"
        time.sleep(_SETTLE_SECONDS)
        lasted = []
        for version in range(versions):
            begun = time.monotonic()
            line.write(version)
            lasted.append(max(done.get(timeout=_PATIENCE_SECONDS) for _ in parties) - begun)
        for party in parties:
            party.join(_PATIENCE_SECONDS)
    finally:
        for party in parties:
            if party.exitcode is None:
                party.kill()
        written = line.close()
    return lasted, written


# --- as a master and its nodes do ------------------------------------------------------------------------------------


def _written_by_a_master(url: str, parameters: int, readers: int) -> _Line:
    """The line's `close` gives how many times the bytes of a version were published for each."""
    topology, layout = Topology(f"out-{secrets.token_hex(4)}"), Layout([("w", (parameters,))])
    broker = open_broker(url, client_name="master", dead_letters=None)
    broker.declare(topology.master())
    publisher = Publisher(
        broker,
        topology,
        "bfloat16",
        clock=SYSTEM,
        ending=threading.Event(),
        new_id=lambda: secrets.token_hex(8),
    )
    bodies = encode_vector(torch.full((parameters,), 0.5), "bfloat16")
    version_bodies = encoded(bodies)
    names, size, written = [f"r{number}" for number in range(readers)], sum(map(len, bodies)), [0]

    def write(version: int) -> None:
        publisher.version(Publish(_ENCODER, version, progress=0.0), 1, layout.digest, version_bodies)
        for name in names:
            publisher.send(name, Notice(encoder=_ENCODER, version=version, digest=DIGEST, published_at=0.0))
        written[0] += 1

    def close() -> float:
        times = broker.status().bytes_out / (size * max(1, written[0]))
        for name in topology.queue_names(names, [_ENCODER]):
            broker.delete_queue(name)
        broker.close()
        return times

    return _Line(topology.namespace, write, close)


def _read_as_nodes(url: str, name: str, number: int, parameters: int, versions: int, ready: Any, done: Any) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    topology, layout, node = Topology(name), Layout([("w", (parameters,))]), f"r{number}"
    broker = open_broker(url, client_name=node, dead_letters=None)
    notices: queue.SimpleQueue[Notice] = queue.SimpleQueue()

    def hear(delivery: Delivery) -> None:
        message = received(delivery)
        if isinstance(message, Notice):
            notices.put(message)
        broker.ack(delivery)

    broker.declare(topology.node(node, ("text",)))
    broker.consume(topology.node_inbox(node), hear, prefetch=32)
    reading = Reading(broker, topology, SYSTEM)
    ready.release()
    for _ in range(versions):
        notice = notices.get(timeout=_PATIENCE_SECONDS)
        said = {"digest": notice.stream_digest, "offset": notice.stream_offset}
        reading.read(instruction(layout=layout), notice.version, notice.published_at, exact=False, **said)  # type: ignore[arg-type]
        while not isinstance(read := reading.read_one(0.25), VersionRead):
            pass
        assert read.version is not None and read.version.version == notice.version, read.problem
        done.put(time.monotonic())
    reading.close()
    broker.close()


# --- with pika alone -------------------------------------------------------------------------------------------------


def _written_raw(url: str, parameters: int) -> _Line:
    name = f"raw-out-{secrets.token_hex(4)}"
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(name, durable=True, arguments={"x-queue-type": "stream"})
    bodies = encode_vector(torch.full((parameters,), 0.5), "bfloat16")

    def write(version: int) -> None:
        for body in bodies:
            channel.basic_publish("", name, body)
        connection.process_data_events(time_limit=0)

    def close() -> float:
        channel.queue_delete(name)
        connection.close()
        return 1.0

    return _Line(name, write, close)


def _read_raw(url: str, name: str, number: int, parameters: int, versions: int, ready: Any, done: Any) -> None:
    size = sum(map(len, encode_vector(torch.zeros(parameters), "bfloat16")))
    connection = open_lean(url)
    channel, came = connection.channel(), [0]

    def take(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        came[0] += len(body)
        channel.basic_ack(method.delivery_tag)

    channel.basic_qos(prefetch_count=16)
    channel.basic_consume(name, take, arguments={"x-stream-offset": "next"})
    ready.release()
    for version in range(1, versions + 1):
        while came[0] < version * size:
            connection.process_data_events(time_limit=1.0)
        done.put(time.monotonic())
    connection.close()
