"""A federation under a virtual clock: a heap of (time, sequence, what happens), and a clock that jumps from one to the
next. Who its parties are, and what their training is, its user says.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

from common.brokers.memory import MemoryBroker, MemoryServer
from common.clock import VirtualClock
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.to_master import Stop
from common.wire.topology import Topology
from deploy.simulation.master import SimulatedMaster
from deploy.simulation.node import SimulatedNode

#: How long nodes have for the last version and the last answers once the training has ended, virtual seconds; who is
#: away then comes back first.
_AFTERWARDS = 3600.0
#: A run that takes so many times as long as it would if no node ever waited comes to no end by itself.
_PATIENCE = 50.0


class SteppedFederation:
    """One federation in one thread, the World of its parties. Whoever makes one sets `master` and `nodes`, orders what
    is to happen with `at`, and then runs it. The same parties and the same order give the same log, bit for bit.

    `seed` makes the ids, `link` is the bytes a second of each node's line, each way, and `estimated` the virtual
    seconds of the run if no node ever waited.
    """

    master: SimulatedMaster
    nodes: Sequence[SimulatedNode]

    def __init__(self, *, seed: int, link: float, estimated: float) -> None:
        self.seed = seed
        self.link = link
        self.clock = VirtualClock()
        self.server = MemoryServer(clock=self.clock.now)
        self.topology = Topology("simulation")
        #: Whether the training was ended because it made no headway.
        self.given_up = False
        #: When the training had ended; None while it has not.
        self.ended_at: float | None = None
        self._estimated = estimated
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.clock.time), next(self._sequence), what))

    def master_has_mail(self) -> None:
        self.master.has_mail()

    def run(self, on_progress: Callable[[int], None] = lambda updates: None) -> None:
        """From what was ordered first to the last answer; `on_progress` is given the number of counted updates, after
        every turn of the master."""
        turns = 0
        self.at(self._estimated * _PATIENCE + _AFTERWARDS, self._give_up)
        try:
            while self._heap and not self._is_over():
                self.clock.time, _, what = heapq.heappop(self._heap)
                what()
                if turns == self.master.turns:
                    continue  # nothing else changes what the log has led to
                turns = self.master.turns
                if (encoder := self.master.encoder) is not None:
                    on_progress(encoder.updates)
                    if self.ended_at is None and encoder.status in ("finished", "failed"):
                        self.ended_at = self.clock.time
        finally:
            for node in self.nodes:
                node.stop()
            self.master.stop()

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
