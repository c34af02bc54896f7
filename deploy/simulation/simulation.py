"""The run itself: a heap of (time, sequence, what happens), and a clock that jumps from one to the next."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from pathlib import Path

from common.brokers.memory import MemoryBroker, MemoryServer
from common.clock import VirtualClock
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.messages import Stop
from common.wire.topology import Topology
from deploy.simulation.master import SimulatedMaster
from deploy.simulation.node import SimulatedNode
from deploy.simulation.plan import Absence, Plan, fates, master_fate

#: How long nodes have for the last version and the last answers once the training has ended, virtual seconds; who is
#: away then comes back first.
_AFTERWARDS = 3600.0
#: A run that takes so many times as long as it would if no node ever waited comes to no end by itself.
_PATIENCE = 50.0


class Simulation:
    """One federation under a virtual clock, in one thread. The same plan gives the same log, bit for bit."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        """`directory` becomes the master's state directory."""
        self.plan = plan
        self.clock = VirtualClock()
        self.server = MemoryServer(clock=self.clock.now)
        self.topology = Topology("simulation")
        #: Whether the training was ended because it made no headway.
        self.given_up = False
        #: When the training had ended; None while it has not.
        self.ended_at: float | None = None
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._fates = fates(plan)
        self._estimated = plan.estimated_seconds
        on_time = sum(fate.joins == 0.0 for fate in self._fates)
        self.nodes = [SimulatedNode(self, index) for index in range(plan.nodes)]
        self.master = SimulatedMaster(self, directory, plan.settings(on_time))

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.clock.time), next(self._sequence), what))

    def master_has_mail(self) -> None:
        self.master.has_mail()

    def run(self, on_progress: Callable[[int], None] = lambda updates: None) -> None:
        """From the first node to the last answer; `on_progress` is given the number of counted updates, often."""
        self.at(0.0, self.master.start)
        for node, fate in zip(self.nodes, self._fates, strict=True):
            self.at(fate.joins, lambda node=node: self._join(node))  # type: ignore[misc]
            if fate.absence is not None:
                self._order(fate.absence, node.kill if fate.absence.killed else node.leave, node.start)
        if (absence := master_fate(self.plan)) is not None:
            self._order(absence, self.master.kill, self.master.start)
        self.at(self._estimated * _PATIENCE + _AFTERWARDS, self._give_up)
        try:
            while self._heap and not self._is_over():
                self.clock.time, _, what = heapq.heappop(self._heap)
                what()
                if (encoder := self.master.encoder) is not None:
                    on_progress(encoder.updates)
                    if self.ended_at is None and encoder.status in ("finished", "failed"):
                        self.ended_at = self.clock.time
        finally:
            for node in self.nodes:
                node.stop()
            self.master.stop()

    def _order(self, absence: Absence, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Somebody goes, and is back later; nobody goes once the training has ended."""

        def go() -> None:
            if self.ended_at is None:
                begin()
                self.at(absence.ends, end)

        self.at(absence.begins, go)

    def _join(self, node: SimulatedNode) -> None:
        if self.ended_at is None:
            node.start()

    def _give_up(self) -> None:
        """Ask the master, as an operator would, to end the training."""
        if self.ended_at is None:
            self.given_up = True
            stop = Publication(self.topology.request, "operator.stop", encode(Stop(sender="operator")))
            MemoryBroker(self.server, user="operator", dead_letters=self.topology.dead_letters, threaded=False).publish(
                stop
            )
            self.master_has_mail()

    def _is_over(self) -> bool:
        if self.ended_at is None:
            return False
        if self.clock.time > self.ended_at + _AFTERWARDS + self._estimated:
            return True
        return all(node.at_rest for node in self.nodes)
