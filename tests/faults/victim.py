"""A real master, aggregator or node in a process of its own, over a real RabbitMQ; SIGKILL ends it at a labelled step.

Forked from a server that has torch loaded, so that a restart takes a moment. What is not here is the command line:
configuration is made in place, the services are those that the command runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import crash_points
from common.broker_url import Access
from common.brokers import open_broker
from common.errors import EXIT_BROKER, EXIT_FAILED, BrokerUnavailable, SharedEncoderError
from common.wire.topology import Topology
from common.wire.update_rule import FinishRule, InnerOptimizer, ReturnWhen, UpdateRule
from deploy.logging import configure_logging
from deploy.signals import stop_on_signals
from master_service.config import MasterConfig
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.service import MasterService
from master_service.shards.service import ShardService
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.service import NodeService
from tests.faults.tiny import WIDE, samples, sends_whole

_PLUGIN = str(Path(__file__).parent / "plugin")


@dataclass(frozen=True)
class Victim:
    """What a process is told. `kill`: die at the n-th time that this label is reached."""

    role: str
    urls: tuple[str, ...]
    topology: Topology
    directory: Path
    log: Path
    kill: tuple[str, int] | None = None
    preset: str = "return-count"
    steps_per_second: float = 40.0
    exit_when_finished: bool = False
    master: dict[str, Any] = field(default_factory=dict)
    shards: int = 1


def live(victim: Victim) -> None:
    """The process: serve until SIGTERM, the end of the encoder, or the labelled step."""
    with victim.log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if victim.kill is not None:
        _die_at(*victim.kill)
    sys.path.insert(0, _PLUGIN)
    configure_logging(level="info")
    torch.set_num_threads(1)
    topology, stop = victim.topology, threading.Event()
    with stop_on_signals(stop):
        try:
            broker = open_broker(
                Access(victim.urls),
                client_name=victim.role,
                dead_letters=topology.dead_letters,
                notes=topology.lock,
                connect_timeout=60.0,
            )
            try:
                serve = _master if victim.role == "master" else _node
                if victim.role.startswith("aggregator-"):
                    serve = _aggregator
                serve(victim, broker, topology, stop)
            except BrokerUnavailable:
                if not stop.is_set():
                    raise
            finally:
                broker.close()
        except SharedEncoderError as error:
            print(f"ended: {type(error).__name__}: {error}", flush=True)
            sys.exit(EXIT_BROKER if isinstance(error, BrokerUnavailable) else EXIT_FAILED)


def _master(victim: Victim, broker: Any, topology: Topology, stop: threading.Event) -> None:
    config = MasterConfig(
        state_dir=victim.directory,
        presence_timeout_seconds=4.0,
        chunk_timeout_seconds=2.0,
        snapshot_every_seconds=0.7,
        **victim.master,
    )
    settings = Settings(
        rule=aggregation_rule(victim.preset, {"buffer": {"grace_seconds": 3.0}}),
        update_rule=UpdateRule(
            when=ReturnWhen(steps=2),
            max_unanswered=3,
            inner=InnerOptimizer(batch_size=4),
            finish=FinishRule(steps=40 if victim.shards == 1 else 10, look_every=5),
        ),
        stop=StopRule(versions=1_000_000),
        publish_every_seconds=5.0,
        shards=victim.shards,
        architecture={"width": WIDE} if victim.shards > 1 else {},
    )
    MasterService(config, settings, broker, topology, get="tiny" if _first(victim.directory) else None).run(stop)


def _first(directory: Path) -> bool:
    """Whether there is no encoder yet: asked for once, by the first master that gets as far as its log."""
    return not list((directory / "payloads").glob("??/*"))


def _aggregator(victim: Victim, broker: Any, topology: Topology, stop: threading.Event) -> None:
    number = int(victim.role.removeprefix("aggregator-")) - 1
    ShardService(number, victim.shards, victim.directory, broker, topology, snapshot_every_seconds=0.7).run(stop)


def _node(victim: Victim, broker: Any, topology: Topology, stop: threading.Event) -> None:
    config = NodeConfig(
        state_dir=victim.directory,
        max_steps_per_second=victim.steps_per_second,
        alive_every_seconds=0.5,
        ask_after_seconds=2.0,
        resend_after_seconds=4.0,
        checkpoint_every_seconds=0.3,
        inline_bytes=NodeConfig().inline_bytes if sends_whole(victim.role) else 0,
        exit_when_finished=victim.exit_when_finished,
    )
    seed = sum(victim.role.encode())
    corpus = Corpus("tiny", samples(seed), None, [], None, samples(seed)[::10])
    NodeService(victim.role, config, {"tiny": corpus}, broker, topology).run(stop)


def _die_at(label: str, count: int) -> None:
    left = [count]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == crash_points.EVENT and arguments[0] == label:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
