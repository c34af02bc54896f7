"""A real master in a process of its own over a RabbitMQ, and nodes whose messages are made by hand, all of them in one
process: what an update costs it beside its bytes, how many small messages it logs, and how much memory it takes.

To see it at its fastest, it is stopped (SIGSTOP) while its queues are filled, and goes on with all of it at hand.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import structlog
import torch

from common.brokers import open_broker
from common.numbers.encodings import encode_vector
from common.wire.base import Message
from common.wire.broker import Broker, Publication
from common.wire.codec import encode
from common.wire.fields import INLINE_BYTES
from common.wire.to_master import Fetch, InstructionAck, Join
from common.wire.to_node import Instruction, Receipt
from master_service.config import MasterConfig
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import StopRule
from master_service.log.message_log import open_log
from master_service.service import MasterService
from tests.benchmarks.party import PLUGIN, forks
from tests.benchmarks.processes import cpu_seconds, peak_bytes, resident_bytes
from tests.builders import update_chunks
from tests.integration.harness import TOPOLOGY, HandNode, decided, eventually

#: Messages that are published and confirmed together.
_AT_ONCE = 64
_PATIENCE_SECONDS = 240.0


class FedMaster:
    """The master's process. `start_bytes`: resident before it had an encoder."""

    def __init__(self, process: ForkServerProcess, directory: Path, start_bytes: int) -> None:
        self.pid = process.pid or 0
        self.directory = directory
        self.start_bytes = start_bytes
        self._process = process

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It does nothing meanwhile, and its heartbeats are not missed if that is not long."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def rows(self, kind: str) -> list[float]:
        """When each row of a kind was written, seconds since 1970."""
        with contextlib.closing(open_log(self.directory, read_only=True)) as log:
            return [row.at for row in log.rows() if row.kind == kind]

    def count(self, kind: str) -> int:
        assert self._process.exitcode is None, "the master has died; its own words stand above"
        with contextlib.closing(open_log(self.directory, read_only=True)) as log:
            return log.count(kind)


@contextmanager
def fed_master(url: str, directory: Path, parameters: int, rule: str, **changes: Any) -> Iterator[FedMaster]:
    """A master that trains the constant; `changes` are of its rule."""
    context = forks()
    ready, stop, start = context.Event(), context.Event(), context.Value("q", 0)
    told = (url, directory, parameters, rule, changes, start, ready, stop)
    process = context.Process(target=_serve, args=told, name="fed-master")
    process.start()
    try:
        assert ready.wait(120.0), "the master does not start; its own words stand above"
        yield FedMaster(process, directory, start.value)
    finally:
        stop.set()
        process.join(30.0)
        if process.exitcode is None:
            process.kill()


def _serve(
    url: str,
    directory: Path,
    parameters: int,
    rule: str,
    changes: dict[str, Any],
    start: Any,
    ready: Event,
    stop: Event,
) -> None:
    sys.path.insert(0, PLUGIN)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    guards = {"max_staleness": 10**6, "norm_clip": None}
    settings = decided(
        rule=aggregation_rule(rule, {"guards": guards, **changes}),
        stop=StopRule(versions=10**6),
        architecture={"parameters": parameters},
    )
    broker = open_broker(url, client_name="master", dead_letters=TOPOLOGY.dead_letters)
    # what one sender may send a second is not what is measured
    config = MasterConfig(state_dir=directory, messages_per_second=1e6)
    service = MasterService(config, settings, broker, TOPOLOGY, get="constant")
    start.value = resident_bytes(os.getpid())
    ending = threading.Event()
    threading.Thread(target=_pass_on, args=(stop, ending), daemon=True).start()
    threading.Thread(target=_tell, args=(service, ready), daemon=True).start()
    service.run(ending)
    broker.close()


def _pass_on(stop: Event, ending: threading.Event) -> None:
    stop.wait()
    ending.set()


def _tell(service: MasterService, ready: Event) -> None:
    encoders = service.master.state.encoders
    eventually(lambda: any(each.status == "running" for each in list(encoders.values())), 110.0)
    ready.set()


class Feeder:
    """Nodes over one connection. Closed once the master is, with all that is left of its queues."""

    instruction: Instruction

    def __init__(self, url: str, nodes: int) -> None:
        self.broker: Broker = open_broker(url, client_name="feeder", dead_letters=TOPOLOGY.dead_letters)
        names = [f"hand-{number}" for number in range(nodes)]
        self.nodes = [HandNode(None, name, broker=self.broker, encoder_type="constant") for name in names]

    def __enter__(self) -> Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        for name in TOPOLOGY.queue_names([node.name for node in self.nodes], [self.instruction.encoder]):
            self.broker.delete_queue(name)
        self.broker.close()

    def enter(self) -> None:
        """All of them join and accept."""
        for node in self.nodes:
            self.instruction = node.enter()

    def send(self, *publications: Publication) -> None:
        for first in range(0, len(publications), _AT_ONCE):
            self.broker.publish(*publications[first : first + _AT_ONCE])

    def update(self, node: HandNode, sequence: int, bodies: list[bytes], **changes: Any) -> list[Publication]:
        """Chunks and manifest, or a small update as one message, as a node sends them."""
        plain = {"order": sequence + 1, "encoding": "int8", **changes}
        manifest = node.manifest(self.instruction, sequence, bodies, **plain)
        if manifest.size <= INLINE_BYTES:
            whole = manifest.model_copy(update={"data": b"".join(bodies)})
            return [self.letter(node, ".ready", whole, TOPOLOGY.update)]
        chunks = update_chunks(manifest, bodies)
        return [
            *(Publication(TOPOLOGY.update, f"{node.name}.chunk", encode(each), persistent=False) for each in chunks),
            self.letter(node, ".ready", manifest, TOPOLOGY.update),
        ]

    def letter(self, node: HandNode, key: str, message: Message, exchange: str = TOPOLOGY.request) -> Publication:
        return Publication(exchange, f"{node.name}{key}", encode(message), message_id=uuid.uuid4().hex)

    def answered(self, updates: int) -> None:
        """Wait until each node has so many receipts more, none of which refuses."""
        for node in self.nodes:
            for _ in range(updates):
                receipt = node.hear(Receipt, _PATIENCE_SECONDS)
                assert receipt.accepted, receipt


def fixed_cost(
    url: str, directory: Path, *, parameters: int = 3_000, nodes: int = 16, each: int = 40
) -> dict[str, Any]:
    """Milliseconds of the master for one small update, from the first to the last of many that wait for it."""
    bodies = encode_vector(torch.full((parameters,), 0.001), "int8")
    with Feeder(url, nodes) as feeder, fed_master(url, directory, parameters, "return-count") as master:
        feeder.enter()
        feeder.send(*(one for node in feeder.nodes for one in feeder.update(node, 0, bodies, wants_version=False)))
        eventually(lambda: master.count("update") == nodes, _PATIENCE_SECONDS)
        with master.stopped():
            for sequence in range(1, each + 1):
                for node in feeder.nodes:
                    feeder.send(*feeder.update(node, sequence, bodies, wants_version=False))
        begun = cpu_seconds(master.pid)
        eventually(lambda: master.count("update") == nodes * (each + 1), _PATIENCE_SECONDS)
        spent = cpu_seconds(master.pid) - begun
        at = master.rows("update")[nodes:]
    return {
        "parameters": parameters,
        "updates": len(at),
        "milliseconds": 1000.0 * (at[-1] - at[0]) / (len(at) - 1),
        "cpu_milliseconds": 1000.0 * spent / len(at),
    }


def small_messages(url: str, directory: Path, *, nodes: int = 16, each: int = 150) -> dict[str, Any]:
    """Rows a second of messages without tensors, of three kinds, that wait for the master all at once."""
    rates: dict[str, float] = {}
    with Feeder(url, nodes) as feeder, fed_master(url, directory, 3_000, "return-count") as master:
        feeder.enter()
        encoder = feeder.instruction.encoder

        def message(kind: str, node: HandNode) -> Publication:
            about: dict[str, Any] = {"node": node.name, "incarnation": node.incarnation}
            if kind == "ack":
                accepted = InstructionAck(**about, encoder=encoder, accepted=True, samples=10)
                return feeder.letter(node, "", accepted, TOPOLOGY.ack)
            if kind == "request.join":
                return feeder.letter(node, ".join", Join(**about, types=[node.encoder_type]))
            return feeder.letter(node, ".fetch", Fetch(**about, encoder=encoder, have_version=0))

        for kind in ("ack", "request.join", "request.fetch"):
            before = master.count(kind)
            with master.stopped():
                for _ in range(each):
                    feeder.send(*(message(kind, node) for node in feeder.nodes))
            eventually(lambda: master.count(kind) == before + nodes * each, _PATIENCE_SECONDS)  # noqa: B023
            at = master.rows(kind)[before:]
            seconds = max(at[-1] - at[0], 1e-6)
            rates[kind] = (len(at) - 1) / seconds
    return {"messages": nodes * each, "per_second": rates}


def master_peak(url: str, directory: Path, *, parameters: int, nodes: int, updates: int = 128) -> dict[str, Any]:
    """The most memory of a master whose nodes hand in all at once, again and again, and want every version."""
    bodies = [bytearray(body) for body in encode_vector(torch.full((parameters,), 0.001), "int8")]
    with Feeder(url, nodes) as feeder, fed_master(url, directory, parameters, "return-count") as master:
        feeder.enter()
        begun = time.monotonic()
        for sequence in range(updates // nodes):
            for number, node in enumerate(feeder.nodes):
                bodies[0][-2:] = (nodes * sequence + number).to_bytes(2, "big")  # no payload is another's
                feeder.send(*feeder.update(node, sequence, list(map(bytes, bodies)), base_version=0))
            feeder.answered(1)
        seconds = time.monotonic() - begun
        peak = peak_bytes(master.pid)
        versions = [after - before for before, after in pairwise(master.rows("versioned"))]
    above = peak - master.start_bytes
    return {
        "nodes": nodes,
        "parameters": parameters,
        "updates": updates,
        "versions": len(versions) + 1,
        "updates_per_second": updates / seconds,
        "above_mib": round(above / 2**20),
        "sets_above": round(above / (4.0 * parameters), 2),
    }
