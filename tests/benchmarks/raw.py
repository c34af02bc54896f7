"""The limit that a federation is measured against: the same bytes through the same queues, with pika and nothing else.

Nodes publish chunks, each into a classic queue of its own; a master takes them all and writes a version's chunks to a
stream, which every node reads; then the next round. Nothing is encoded, hashed, logged or confirmed. `plain` is pika as
it is, with persistent messages; `lean` reads the socket 256 KiB at a time and sends transient chunks up.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import statistics
import time
import uuid
from typing import Any

import pika
from pika.adapters.utils import io_services_utils

from common.numbers.slicing import EncodingName, encoded_size, slice_count, slice_length
from tests.benchmarks.processes import cpu_seconds

_SPAWN = multiprocessing.get_context("spawn")
_LEAN_READ = 256 * 1024


def chunks(parameters: int, encoding: EncodingName) -> list[int]:
    """The bytes of every chunk of an encoded vector."""
    return [encoded_size(slice_length(parameters, index), encoding) for index in range(slice_count(parameters))]


def rounds(
    url: str, nodes: int, parameters: int, up: EncodingName, down: EncodingName, *, lean: bool, versions: int = 6
) -> dict[str, Any]:
    """Seconds of a round, the median without the first, and of the processor of all parties but the broker a round."""
    name = f"raw-{uuid.uuid4().hex[:8]}"
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.queue_declare(f"{name}.down", durable=True, arguments={"x-queue-type": "stream"})
        for node in range(nodes):
            channel.queue_declare(f"{name}.up.{node}", durable=True)
            channel.queue_declare(f"{name}.ready.{node}", durable=True)
        given: Any = _SPAWN.Queue()
        sizes = chunks(parameters, up), chunks(parameters, down)
        parties = [_SPAWN.Process(target=_master, args=(url, name, nodes, sizes, versions, lean, given))]
        parties += [
            _SPAWN.Process(target=_node, args=(url, name, node, sizes, versions, lean, given)) for node in range(nodes)
        ]
        for party in parties:
            party.start()
        times: list[float] = []
        spent = 0.0
        for _ in parties:
            seconds, cpu = _said(given, parties)
            times, spent = seconds or times, spent + cpu
        for party in parties:
            party.join()
        channel.queue_delete(f"{name}.down")
        for node in range(nodes):
            channel.queue_delete(f"{name}.up.{node}")
            channel.queue_delete(f"{name}.ready.{node}")
    lasted = [after - before for before, after in itertools.pairwise(times)]
    return {"round_seconds": statistics.median(lasted[1:]), "cpu_seconds_a_version": spent / versions}


def _said(given: Any, parties: list[Any]) -> tuple[list[float], float]:
    """What a party gives at its end. Raises RuntimeError if one died."""
    while True:
        with contextlib.suppress(queue.Empty):
            seconds, cpu = given.get(timeout=1.0)
            return seconds, cpu
        if any(party.exitcode for party in parties):
            raise RuntimeError("a process that moves raw bytes failed; its words are above")


def open_lean(url: str) -> Any:
    """A connection of pika's that reads its socket in large pieces."""
    # private: the driver has no setting for it
    io_services_utils._AsyncTransportBase._MAX_RECV_BYTES = _LEAN_READ
    # private: as above
    io_services_utils._AsyncTransportBase._MAX_CONSUME_BYTES = 4 * _LEAN_READ
    return pika.BlockingConnection(pika.URLParameters(url))


def _open(url: str, lean: bool) -> Any:
    return open_lean(url) if lean else pika.BlockingConnection(pika.URLParameters(url))


def _publish(channel: Any, queue: str, sizes: list[int], body: bytes, *, lasting: bool) -> None:
    properties = pika.BasicProperties(delivery_mode=2 if lasting else 1)
    for size in sizes:
        channel.basic_publish("", queue, body if len(body) == size else body[:size], properties)


def _master(
    url: str, name: str, nodes: int, sizes: tuple[list[int], list[int]], versions: int, lean: bool, given: Any
) -> None:
    up, down = sizes
    connection, body = _open(url, lean), os.urandom(max(down))
    channel, times, left = connection.channel(), [], [len(up) * nodes]

    def came(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        left[0] -= 1
        channel.basic_ack(method.delivery_tag)

    channel.basic_qos(prefetch_count=len(up))
    for node in range(nodes):
        channel.basic_consume(f"{name}.ready.{node}", lambda *_: None, auto_ack=True)
        channel.basic_consume(f"{name}.up.{node}", came)
    begun = cpu_seconds(os.getpid())
    for _ in range(versions):
        while left[0] > 0:
            connection.process_data_events(time_limit=1.0)
        left[0] += len(up) * nodes
        _publish(channel, f"{name}.down", down, body, lasting=True)
        connection.process_data_events(time_limit=0)
        times.append(time.monotonic())
    given.put((times, cpu_seconds(os.getpid()) - begun))
    connection.close()


def _node(
    url: str, name: str, node: int, sizes: tuple[list[int], list[int]], versions: int, lean: bool, given: Any
) -> None:
    up, down = sizes
    connection, body = _open(url, lean), os.urandom(max(up))
    channel, left = connection.channel(), [len(down)]

    def came(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        left[0] -= 1
        channel.basic_ack(method.delivery_tag)

    channel.basic_qos(prefetch_count=16)
    channel.basic_consume(f"{name}.down", came, arguments={"x-stream-offset": "first"})
    begun = cpu_seconds(os.getpid())
    for _ in range(versions):
        _publish(channel, f"{name}.up.{node}", up, body, lasting=not lean)
        _publish(channel, f"{name}.ready.{node}", [256], body, lasting=True)
        while left[0] > 0:
            connection.process_data_events(time_limit=1.0)
        left[0] += len(down)
    given.put(([], cpu_seconds(os.getpid()) - begun))
    connection.close()
