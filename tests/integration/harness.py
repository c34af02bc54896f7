"""A real master in a thread over the embedded broker, and a node spoken by hand, to send what no real one would."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from common.brokers.memory import MemoryBroker, MemoryServer
from common.numbers.encodings import encode_vector
from common.wire.base import Message
from common.wire.broker import Broker, Delivery, Publication
from common.wire.codec import decode, encode
from common.wire.to_master import InstructionAck, Join, UpdateManifest
from common.wire.to_node import Instruction, Rule
from common.wire.topology import Topology
from common.wire.transfer import payload_digest
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.config import MasterConfig
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.service import MasterService
from tests.builders import update_chunks

M = TypeVar("M", bound=Message)
TOPOLOGY = Topology("test")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


def eventually(condition: Callable[[], Any], seconds: float = 20.0, what: str = "it") -> Any:
    """Wait until `condition` is true; gives its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)
    return value


def decided(**changes: Any) -> Settings:
    """Small and quick; every arrival makes a version unless told otherwise."""
    plain: dict[str, Any] = {
        "rule": aggregation_rule("fedasync"),
        "update_rule": UpdateRule(when=ReturnWhen(steps=2)),
        "stop": StopRule(versions=1000),
        "architecture": SMALL,
    }
    return Settings(**{**plain, **changes})


def connection(server: MemoryServer, user: str) -> MemoryBroker:
    return MemoryBroker(server, user=user, dead_letters=TOPOLOGY.dead_letters)


class ThreadParty:
    """A service in a thread of this process."""

    def __init__(self, name: str, serve: Callable[[threading.Event], None]) -> None:
        self.name = name
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(serve,), name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def wait(self, timeout: float) -> bool:
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def kill(self) -> None:
        """A thread cannot be killed; it is a daemon and ends with this process."""

    def _run(self, serve: Callable[[threading.Event], None]) -> None:
        try:
            serve(self._stop)
        except BaseException as error:
            self._error = error  # raised again in the thread that waits


class Master:
    """The service in a thread; `service` is for looking, `party` to stop it."""

    def __init__(
        self, server: MemoryServer, directory: Path, settings: Settings, *, get: str = "text", **config: Any
    ) -> None:
        self.broker = connection(server, "master")
        master_config = MasterConfig(state_dir=directory, **config)
        self.service = MasterService(master_config, settings, self.broker, TOPOLOGY, get=get)
        self.party = ThreadParty("master", self.service.run)
        # nobody can be heard before its queues are there
        eventually(lambda: server.find(TOPOLOGY.master_inbox) or self._has_ended())

    def stop(self) -> None:
        self.party.stop()
        assert self.party.wait(20.0)
        self.broker.close()

    def _has_ended(self) -> bool:
        try:
            return self.party.wait(0.0)
        except BaseException:  # raised again for the test, when that waits for the party
            return True


@contextmanager
def running_master(
    server: MemoryServer, directory: Path, settings: Settings | None = None, **config: Any
) -> Iterator[Master]:
    master = Master(server, directory, settings or decided(), **config)
    try:
        yield master
    finally:
        master.stop()


class HandNode:
    """Speaks a node's protocol, one message at a time."""

    def __init__(
        self,
        server: MemoryServer | None,
        name: str,
        incarnation: str = "first",
        *,
        broker: Broker | None = None,
        encoder_type: str = "text",
    ) -> None:
        """`broker`: its connection, if that is not to be one to `server`."""
        self.name = name
        self.incarnation = incarnation
        self.encoder_type = encoder_type
        self.broker = broker or connection(server or MemoryServer(), name)
        self.inbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.broker.declare(TOPOLOGY.node(name, (encoder_type,)))
        self.broker.consume(TOPOLOGY.node_inbox(name), self.inbox.put, prefetch=100)

    def say(self, key: str, message: Message | bytes, exchange: str = TOPOLOGY.request) -> None:
        body = message if isinstance(message, bytes) else encode(message)
        self.broker.publish(Publication(exchange, f"{self.name}{key}", body, message_id=uuid.uuid4().hex))

    def hear(self, kind: type[M], seconds: float = 20.0) -> M:
        """The next message of this kind; others are dropped."""
        deadline = time.monotonic() + seconds
        while True:
            delivery = self.inbox.get(timeout=max(0.01, deadline - time.monotonic()))
            self.broker.ack(delivery)
            message = decode(delivery.body)
            if isinstance(message, kind):
                return message

    def enter(self) -> Instruction:
        """Join, accept, and wait for the rule."""
        self.say(".join", Join(node=self.name, incarnation=self.incarnation, types=[self.encoder_type]))
        instruction = self.hear(Instruction)
        ack = InstructionAck(
            node=self.name, incarnation=self.incarnation, encoder=instruction.encoder, accepted=True, samples=10
        )
        self.say("", ack, TOPOLOGY.ack)
        self.hear(Rule)
        return instruction

    def manifest(self, instruction: Instruction, sequence: int, bodies: list[bytes], **changes: Any) -> UpdateManifest:
        plain: dict[str, Any] = {
            "node": self.name,
            "incarnation": self.incarnation,
            "encoder": instruction.encoder,
            "sequence": sequence,
            "base_version": 0,
            "steps": 1,
            "samples": 1,
            "seconds": 1.0,
            "loss": 1.0,
            "encoding": "float32",
            "layout_digest": instruction.layout_digest,
            "size": sum(map(len, bodies)),
            "chunks": len(bodies),
            "digest": payload_digest(bodies),
        }
        return UpdateManifest(**{**plain, **changes})

    def send(self, manifest: UpdateManifest, bodies: list[bytes]) -> None:
        """Chunks, then the manifest."""
        for chunk in update_chunks(manifest, bodies):
            self.say(".chunk", chunk, TOPOLOGY.update)
        self.say(".ready", manifest, TOPOLOGY.update)


def numbers(instruction: Instruction, value: float = 0.001) -> list[bytes]:
    """An update in which every number is `value`."""
    size = sum(torch.Size(shape).numel() for _, shape in instruction.layout)
    return encode_vector(torch.full((size,), value), "float32")


def drained(server: MemoryServer, queue_name: str) -> list[Delivery]:
    """Everything that waits in a queue now."""
    found: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    broker = connection(server, "looker")
    broker.consume(queue_name, found.put, prefetch=1000)
    time.sleep(0.2)
    deliveries = []
    while not found.empty():
        deliveries.append(found.get())
    broker.close()
    return deliveries
