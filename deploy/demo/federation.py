"""A master and nodes of one configuration, started and ended one by one from here, and watched over the broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.wire.broker import Broker
from common.wire.topology import Topology
from deploy.commands.observe import Observer
from deploy.commands.run import connect
from deploy.config import Config
from deploy.demo.parties import Party, ProcessParty

#: No master or node takes longer than this to end after it was asked, seconds.
_END_SECONDS = 60.0


class Federation:
    """`start` makes a running Party of "master" or a node's name; `observer` asks the master over the broker."""

    def __init__(self, config: Config, observer: Observer, start: Callable[[str], Party]) -> None:
        self.config = config
        self.observer = observer
        self.master: Party | None = None
        self.nodes: dict[str, Party] = {}
        self._start = start

    def start_master(self) -> None:
        self.master = self._start("master")

    def start_node(self, name: str) -> None:
        self.nodes[name] = self._start(name)

    def check(self) -> None:
        """Raises what ended the master or a node before its time."""
        for party in self._parties():
            party.wait(0.0)

    def wait_for_nodes(self) -> None:
        """Nodes that are so configured end by themselves once they have the final version. Raises UserError."""
        for party in self.nodes.values():
            if not party.wait(_END_SECONDS):
                raise UserError(f"node {party.name} did not end within {_END_SECONDS:.0f} s of the final version")

    def close(self) -> None:
        """End everybody."""
        for party in self._parties():
            party.stop()
        for party in self._parties():
            if not party.wait(_END_SECONDS):
                party.kill()

    def _parties(self) -> list[Party]:
        return [*self.nodes.values(), *([self.master] if self.master else [])]


@contextmanager
def over_rabbitmq(config: Config, file: Path, logs: Path) -> Iterator[Federation]:
    """Processes over the RabbitMQ of the configuration. What an earlier run left of this namespace is removed first,
    and everything of this one at the end."""
    topology = Topology(config.broker.namespace, replicas=config.broker.replicas)

    def start(name: str) -> Party:
        arguments = ["master"] if name == "master" else ["node", name]
        return ProcessParty(name, [*arguments, "--config", str(file)], logs / f"{name}.log")

    broker = connect(config, topology, "observer")
    try:
        _remove(broker, topology, config, encoders=[])
        broker.declare(topology.master())
        with _closing(Federation(config, Observer(broker, topology), start)) as federation:
            yield federation
            encoders = list(federation.observer.status(10.0).encoders)
        _remove(broker, topology, config, encoders)
    finally:
        broker.close()


@contextmanager
def _closing(federation: Federation) -> Iterator[Federation]:
    try:
        yield federation
    finally:
        federation.close()
        federation.observer.close()


def _remove(broker: Broker, topology: Topology, config: Config, encoders: list[str]) -> None:
    for queue in topology.queue_names(config.nodes, encoders):
        broker.delete_queue(queue)
