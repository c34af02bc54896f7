"""What the parties of a simulation share: time, a broker, and where events are ordered; and what each of them has."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from common.brokers.memory import MemoryBroker, MemoryServer
from common.clock import Clock
from common.wire.broker import Publication
from common.wire.topology import Topology


class World(Protocol):
    """What the parties share."""

    @property
    def seed(self) -> int:
        """Of the ids."""

    @property
    def link(self) -> float:
        """Bytes a second of each node's line, each way."""

    @property
    def clock(self) -> Clock: ...

    @property
    def server(self) -> MemoryServer: ...

    @property
    def topology(self) -> Topology: ...

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Let something happen at a moment that has not passed yet, after all that was ordered for it before."""

    def master_has_mail(self) -> None:
        """Somebody has published to the master."""


class Ids:
    """Ids that nothing else has, the same for the same seed. They outlive the party, which must not give one twice."""

    def __init__(self, seed: int, party: str) -> None:
        self._random = random.Random(f"{seed}/ids/{party}")

    def message(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    def incarnation(self) -> str:
        return f"{self._random.getrandbits(48):012x}"


class Connection(MemoryBroker):
    """A party's connection, whose deliveries come when it asks; counts what it publishes to streams, in chunks."""

    def __init__(self, world: World, user: str) -> None:
        super().__init__(world.server, user=user, dead_letters=world.topology.dead_letters, threaded=False)
        self._parameter = world.topology.parameter
        self.stream_chunks = 0

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        super().publish(*publications, timeout=timeout)
        self.stream_chunks += sum(each.exchange == self._parameter for each in publications)

    @property
    def bytes_out(self) -> int:
        return self._bytes_out

    @property
    def bytes_in(self) -> int:
        return self._bytes_in
