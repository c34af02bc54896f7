"""A master, aggregator or node with the command that users give, in a process forked from one that has all libraries
loaded, that also writes down what it used. Nothing of the command is changed; what it calls is looked at on the way.

Written at its end, as JSON: `before`: bytes resident before its encoder was built (of a node), made (of a master) or
begun (of an aggregator); `peak`: the most that were, ever; `stream_bytes`, `stream_messages`, `stream_repeated`: of
what came from streams, and how many of those messages had come before. While it runs, how many bytes of message bodies
it has sent and been given are to be read: see `moved_bytes`.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import struct
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from common.brokers.amqp.rabbitmq import RabbitMQBroker
from common.wire.broker import Delivery, Publication
from deploy.cli import main
from master_service.shards.holding import Holding
from tests.benchmarks.constant import ConstantType
from tests.benchmarks.processes import peak_bytes, resident_bytes

#: Where the entry point of the constant lies.
PLUGIN = str(Path(__file__).parent / "plugin")

#: What all processes have loaded. `torch._dynamo`: what an optimiser loads when it is made.
_LOADED = [
    "tests.benchmarks.party",
    "transformers",
    "torch._dynamo",
    "master_service.service",
    "master_service.shards.service",
    "node_service.service",
]

#: Of the file of bytes: sent, and given by the broker.
_MOVED = struct.Struct("<qq")


class Notes:
    """What is written down at the end, and the bytes that were moved so far in this file."""

    def __init__(self, moved: Path) -> None:
        self.figures = {"before": 0, "peak": 0, "stream_bytes": 0, "stream_messages": 0, "stream_repeated": 0}
        self._seen: set[tuple[str, int | None]] = set()
        moved.write_bytes(bytes(_MOVED.size))
        with moved.open("r+b") as file:
            self._moved = mmap.mmap(file.fileno(), _MOVED.size)
        self._sent = self._given = 0

    def begins(self, made: Callable[..., Any]) -> Callable[..., Any]:
        """`made`, but what is resident before its first call is noted."""

        def noted(*arguments: Any, **named: Any) -> Any:
            self.figures["before"] = self.figures["before"] or resident_bytes(os.getpid())
            return made(*arguments, **named)

        return noted

    def came(self, delivery: Delivery) -> None:
        key = (delivery.queue, delivery.offset)
        self.figures["stream_bytes"] += len(delivery.body)
        self.figures["stream_messages"] += 1
        self.figures["stream_repeated"] += key in self._seen
        self._seen.add(key)

    def given(self, delivery: Delivery) -> None:
        self._given += len(delivery.body)
        self._moved[:] = _MOVED.pack(self._sent, self._given)

    def listening(self, listen: Callable[..., Any], *, is_stream: bool = False) -> Callable[..., Any]:
        """`consume` or `read_stream` of a broker, but what comes is counted."""

        def counted(broker: Any, queue: str, on_delivery: Callable[[Delivery], None], **named: Any) -> Any:
            def delivered(delivery: Delivery) -> None:
                self.given(delivery)
                if is_stream:
                    self.came(delivery)
                on_delivery(delivery)

            return listen(broker, queue, delivered, **named)

        return counted

    def sending(self, publish: Callable[..., Any]) -> Callable[..., Any]:
        """`publish` of a broker, but what goes is counted."""

        def counted(broker: Any, *publications: Publication, **named: Any) -> Any:
            self._sent += sum(len(each.body) for each in publications)
            self._moved[:] = _MOVED.pack(self._sent, self._given)
            return publish(broker, *publications, **named)

        return counted


def moved_bytes(directory: Path, name: str) -> tuple[int, int]:
    """The bytes of message bodies that a party in this directory has (sent, been given) so far."""
    try:
        sent, given = _MOVED.unpack((directory / f"{name}.moved").read_bytes())
    except (FileNotFoundError, struct.error):
        return 0, 0  # not yet
    return sent, given


def forks() -> ForkServerContext:
    """Where processes are forked from: Python, torch and the command are loaded once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    return context


def started(name: str, directory: Path, arguments: list[str]) -> ForkServerProcess:
    """Run the command in `directory`: its words go into `NAME.log`, its notes into `NAME.json`."""
    process = forks().Process(target=_run, args=(name, directory, arguments), name=name)
    process.start()
    return process


def _run(name: str, directory: Path, arguments: list[str]) -> None:
    with (directory / f"{name}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(directory)
    sys.argv = ["shared-encoder", *arguments]
    sys.path.insert(0, PLUGIN)
    notes = Notes(directory / f"{name}.moved")
    ConstantType.initial = notes.begins(ConstantType.initial)  # type: ignore[method-assign]
    ConstantType.build = notes.begins(ConstantType.build)  # type: ignore[method-assign]
    Holding.begin = notes.begins(Holding.begin)  # type: ignore[method-assign]
    RabbitMQBroker.consume = notes.listening(RabbitMQBroker.consume)  # type: ignore[method-assign]
    listening = notes.listening(RabbitMQBroker.read_stream, is_stream=True)
    RabbitMQBroker.read_stream = listening  # type: ignore[method-assign]
    RabbitMQBroker.publish = notes.sending(RabbitMQBroker.publish)  # type: ignore[method-assign]
    try:
        main()
    finally:
        notes.figures["peak"] = peak_bytes(os.getpid())
        (directory / f"{name}.json").write_text(json.dumps(notes.figures))
