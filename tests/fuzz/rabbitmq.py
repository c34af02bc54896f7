"""The same over a private RabbitMQ: the services with their threads, the smallest encoder, all in this process."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from pathlib import Path

from common.brokers import open_broker
from common.errors import PublishRejected, Unpublishable
from common.wire.broker import Broker, Delivery, Publication
from common.wire.codec import encode
from common.wire.to_master import Get
from common.wire.topology import Topology
from common.wire.update_rule import InnerOptimizer, ReturnWhen, UpdateRule
from deploy.local_rabbitmq import LocalRabbitMQ
from master_service.config import MasterConfig
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.service import MasterService
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.service import NodeService
from tests.faults import tiny
from tests.fuzz.__main__ import MOST_MEMORY, shown
from tests.fuzz.grammar import Grammar
from tests.fuzz.world import resident_bytes
from tests.integration.harness import ThreadParty, eventually

#: Where the entry point of the encoder type stands.
_PLUGIN = str(Path(tiny.__file__).with_name("plugin"))
_AT_ONCE = 100
#: Messages after which memory is counted from.
_WARM = 5_000


def over_rabbitmq(directory: Path, seed: int, messages: int) -> bool:
    """So many messages; prints the line. Whether all is well. Raises whatever ended a service."""
    sys.path.insert(0, _PLUGIN)
    topology, started = Topology("fuzz"), time.monotonic()
    (directory / "rabbitmq").mkdir()
    with LocalRabbitMQ(directory / "rabbitmq") as server:
        connections: list[Broker] = []

        def connect(name: str) -> Broker:
            connections.append(
                open_broker(server.url, client_name=name, dead_letters=topology.dead_letters, notes=topology.lock)
            )
            return connections[-1]

        master, nodes = _master(directory, connect("master"), topology), ["a", "b"]
        parties = [ThreadParty("master", master.run)]
        parties += [ThreadParty(node, _node(directory, node, connect(node), topology).run) for node in nodes]
        stranger, set_aside = connect("stranger"), Counter[str]()
        grammar = Grammar(topology, seed, "tiny")

        def letter(delivery: Delivery) -> None:
            set_aside[delivery.routing_key] += 1
            stranger.ack(delivery)

        def counted() -> int:
            for party in parties:
                assert not party.wait(0.0), f"{party.name} has ended"
            return sum(encoder.updates for encoder in list(master.master.state.encoders.values()))

        def ask() -> None:
            """As an operator does, where strangers have stopped what was trained."""
            encoders = list(master.master.state.encoders.values())
            if not any(each.encoder_type == "tiny" and each.status == "running" for each in encoders):
                get = encode(Get(sender="operator", encoder_type="tiny", fresh=True))
                stranger.publish(Publication(topology.request, "operator.get", get))

        eventually(lambda: counted() >= 5, 120.0, "a training")
        stranger.consume(topology.dead_letters, letter, prefetch=500)
        before = 0
        for sent in range(0, messages, _AT_ONCE):
            grammar.encoders = ["tiny-1", *list(master.master.state.encoders)[-3:]]
            batch = [grammar.next() for _ in range(_AT_ONCE)]
            try:
                stranger.publish(*batch)
            except (PublishRejected, Unpublishable):
                for publication in batch:  # those that arrived with it come twice, which is nobody's trouble
                    with contextlib.suppress(PublishRejected, Unpublishable):
                        stranger.publish(publication)
            counted()
            if not before and sent >= _WARM:
                before = resident_bytes()
            if sent % 5000 == 0:
                ask()
        grown = resident_bytes() - before if before else 0
        ask()
        meanwhile = counted()
        eventually(lambda: counted() > meanwhile, 240.0, "an update after it")
        rows, log_bytes = master.report().log.entries, (directory / "master" / "ledger.sqlite").stat().st_size
        for party in parties:
            party.stop()
        ended = all(party.wait(60.0) for party in parties)
        for connection in connections:
            connection.close()
    print(
        f"RabbitMQ: seed={seed} messages={messages} deaths=0 set_aside={set_aside.total()} ({shown(set_aside)}) "
        f"rows={rows} ledger={log_bytes / messages:.0f} bytes a message memory={grown / 2**20:+.1f} MiB after the "
        f"first {_WARM}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return ended and grown <= MOST_MEMORY


def _master(directory: Path, broker: Broker, topology: Topology) -> MasterService:
    settings = Settings(
        rule=aggregation_rule("fedasync"),
        update_rule=UpdateRule(when=ReturnWhen(steps=2), inner=InnerOptimizer(batch_size=4)),
        stop=StopRule(versions=1 << 40),
    )
    config = MasterConfig(state_dir=directory / "master", chunk_timeout_seconds=2.0)
    return MasterService(config, settings, broker, topology, get="tiny")


def _node(directory: Path, name: str, broker: Broker, topology: Topology) -> NodeService:
    config = NodeConfig(state_dir=directory / name, max_steps_per_second=20.0, alive_every_seconds=0.5)
    seed = sum(name.encode())
    return NodeService(name, config, {"tiny": Corpus("tiny", tiny.samples(seed), None, [], None)}, broker, topology)
