"""Updates on their way to the master: manifests wait in `decisions/turns`, a line for every node, and of several nodes
at a time the chunks are fetched.

What to do with one is decided by whoever asks here: this only says whose turn it is, and what has come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from common.clock import Clock
from common.numbers.slicing import slice_bytes
from common.wire.broker import Broker, Delivery, OnDelivery
from common.wire.to_master import UpdateManifest
from common.wire.topology import Topology
from common.wire.versions import SLOW_LINE
from master_service.decisions.turns import LINE_UPDATES, Turns, Waiting
from master_service.wire import orders
from master_service.wire.arriving import Arrived
from master_service.wire.intake import CompleteUpdate, Discard, Fetching, Intake
from master_service.wire.parts import PartsIntake
from master_service.wire.shards import Shards

#: After refused updates' chunks were thrown away for some time, for so many times as long none are: what one node
#: sends in vain takes a small share of the line.
_DISCARD_PAUSE = 4.0

_Announced = tuple[UpdateManifest, Delivery]


class Updates:
    """The manifests that wait, and what is fetched. All in one thread, but for `on_delivery`, which the broker calls in
    one of its own.

    A manifest that is not kept here (an older attempt, or one too many of its node) is acked. One too many is asked for
    again by `later`, once there is a place; of these too a node has a bounded number, and who has more open than that
    has long broken its rule.
    """

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        *,
        patience: float,
        current: Callable[[str], str | None],
        clock: Clock,
        on_delivery: OnDelivery,
        discard: Callable[[UpdateManifest], None] | None = None,
    ) -> None:
        """`patience`: seconds without a further chunk after which a node is asked to send its update again. `current`
        gives a node's incarnation, None for one that has not joined. `discard`: somebody else throws away the chunks of
        a refused update."""
        self._broker = broker
        self._topology = topology
        self._patience = patience
        self._current = current
        self._clock = clock
        self._on_delivery = on_delivery
        self._discard_elsewhere = discard
        self._turns: Turns[_Announced] = Turns()
        #: By chunk queue.
        self._intakes: dict[str, Fetching] = {}
        #: By node: updates that are to be asked for again, each by its name.
        self._later: dict[str, OrderedDict[tuple[str, ...], UpdateManifest]] = {}
        #: Nodes of which something was dropped that is not asked for by name.
        self._dropped: set[str] = set()
        #: By node: the newest refused update, whose chunks are to be thrown away with those before.
        self._refused: OrderedDict[str, UpdateManifest] = OrderedDict()
        self._discard: Discard | None = None
        self._discard_at = 0.0

    # --- manifests ---------------------------------------------------------------------------------------------------

    def announced(self, manifest: UpdateManifest, delivery: Delivery) -> None:
        """A manifest has come; its turn comes after those of its node before it. Whoever has not joined and sends too
        many is not asked for them: it sends again what it owes once it has."""
        # on a slow line one chunk alone takes a while
        chunk_seconds = min(manifest.size, slice_bytes(manifest.encoding)) / SLOW_LINE
        update = (manifest.encoder, manifest.incarnation, str(manifest.sequence))
        waiting = Waiting(
            (manifest, replace(delivery, body=b"")),
            manifest.node,
            update,
            manifest.attempt,
            manifest.size,
            len(delivery.body),
            self._patience + chunk_seconds,
        )
        out = self._turns.put(waiting)
        if out is None:
            return
        known = self._current(manifest.node) is not None
        if known and out is waiting and not self._turns.waits(manifest.node, update):
            later = self._later.setdefault(manifest.node, OrderedDict())
            later.pop(update, None)
            later[update] = manifest.bare()
            if len(later) > LINE_UPDATES:
                later.popitem(last=False)
                self._dropped.add(manifest.node)
        self._broker.ack(out.item[1])

    @property
    def waiting(self) -> int:
        """How many wait for their turn or are fetched."""
        return sum(1 for _ in self._turns)

    def is_beyond_all(self, node: str) -> bool:
        """Whether a node's line is full, and so many are asked for later that one more would push one out: then it is
        not worth reading what else it announces."""
        beyond = len(self._later.get(node, ())) >= LINE_UPDATES and not self._turns.has_place(node)
        if beyond:
            self._dropped.add(node)
        return beyond

    def idle(self) -> list[str]:
        """Nodes of which all is dealt with but what found no place here."""
        return [node for node in {*self._later, *self._dropped} if self._turns.is_idle(node)]

    def owes_more(self, node: str) -> bool:
        """Whether something of a node was dropped unread, and all else of it is dealt with: then it is to send again
        what it owes. Said once."""
        if node not in self._dropped or node in self._later or not self._turns.has_place(node):
            return False
        self._dropped.discard(node)
        return True

    def turn(self) -> UpdateManifest | None:
        """The manifest whose turn it is; then it is for whoever asks to `fetch`, `answered`, or `hold` it."""
        waiting = self._turns.turn()
        return waiting.item[0] if waiting is not None else None

    def has_room(self, size: int, budget: int) -> bool:
        """Whether so many bytes can be fetched beside what is fetched now, within a budget of bytes."""
        return self._turns.has_room(size, budget)

    def hold(self) -> None:
        """The node whose turn it is is passed over until `release`."""
        self._turns.hold()

    def release(self) -> None:
        """Whoever was passed over has a turn again."""
        self._turns.release()

    def answered(self) -> Delivery:
        """The update whose turn it is does not count: its chunks are thrown away when there is time for it. Gives its
        manifest's delivery, which is still to be acked."""
        manifest, delivery = self._turns.answered().item
        if self._discard_elsewhere is not None:
            self._discard_elsewhere(manifest)
        elif manifest.data is None:
            self._refused.pop(manifest.node, None)
            self._refused[manifest.node] = manifest.bare()
        return delivery

    def carried(self, arriving: Arrived) -> CompleteUpdate:
        """The update whose turn it is carries its payload: it is here, and goes into `arriving`."""
        manifest, delivery = self._turns.answered().item
        assert manifest.data is not None, "it is to be fetched"
        length = slice_bytes(manifest.encoding)
        for start in range(0, len(manifest.data), length):
            arriving.add(manifest.data[start : start + length])
        return CompleteUpdate(manifest.model_copy(update={"data": None}), arriving, (delivery,))

    def later(self, node: str) -> UpdateManifest | None:
        """An update that found no place in its node's line, if there is one now: it is to be asked for again."""
        if node not in self._later or not self._turns.has_place(node):
            return None
        _, manifest = self._later[node].popitem(last=False)
        if not self._later[node]:
            del self._later[node]
        return manifest

    # --- what is fetched ---------------------------------------------------------------------------------------------

    def fetch(self, arriving: Arrived) -> None:
        """Begin to fetch the update whose turn it is; its slices go into `arriving`."""
        broker, topology, hear = self._broker, self._topology, self._on_delivery
        self._begin(lambda manifest, delivery: Intake(broker, topology, manifest, delivery, hear, arriving))

    def fetch_parts(self, shards: Shards, keep: Callable[[bytes], str]) -> None:
        """Have it fetched by these; `keep` as of a PartsIntake."""
        self._begin(lambda manifest, delivery: PartsIntake(shards, manifest, delivery, keep))

    def _begin(self, begin: Callable[[UpdateManifest, Delivery], Fetching]) -> None:
        manifest, delivery = self._turns.begun(self._clock.monotonic()).item
        if self._discard is not None and self._discard.manifest.node == manifest.node:
            self._end_discard()
        # an intake throws away what was sent before its own
        self._refused.pop(manifest.node, None)
        queue = self._topology.chunk_queue(manifest.node)
        self._intakes[queue] = begin(manifest, delivery)

    def intake(self, node: str) -> Fetching:
        """What is fetched of a node. Raises KeyError if nothing is."""
        return self._intakes[self._topology.chunk_queue(node)]

    def is_chunk(self, delivery: Delivery) -> bool:
        """Whether a delivery is a chunk of a node of which something is fetched now."""
        return delivery.queue in self._intakes or self._is_discarded(delivery)

    def add(self, delivery: Delivery) -> CompleteUpdate | None:
        """Take such a chunk; the update, once it is whole. Raises Poison."""
        if self._is_discarded(delivery) and self._discard is not None:
            self._discard.add(delivery)
            return None
        intake = self._intakes[delivery.queue]
        return self._came(intake, lambda: intake.add(delivery)) if isinstance(intake, Intake) else None

    def reported(self, report: orders.Arriving) -> CompleteUpdate | None:
        """What an aggregator fetches of a node has come further; the update, once all of its parts are whole."""
        intake = self._intakes.get(self._topology.chunk_queue(report.node))
        return self._came(intake, lambda: intake.add(report)) if isinstance(intake, PartsIntake) else None

    def greeted(self, shard: int) -> None:
        """An aggregator is here again, and may have lost what it was to fetch."""
        for intake in self._intakes.values():
            if isinstance(intake, PartsIntake):
                intake.take(shard)

    def _came(self, intake: Fetching, add: Callable[[], CompleteUpdate | None]) -> CompleteUpdate | None:
        here = intake.here
        update = add()
        if intake.here > here:
            self._turns.came(intake.manifest.node, self._clock.monotonic())
        return update

    def in_vain(self) -> Fetching | None:
        """An intake that it is no use to wait for: its chunks are overdue, or overtaken; None if there is none."""
        overtaken = next((intake for intake in self._intakes.values() if intake.overtaken), None)
        if overtaken is not None:
            return overtaken
        node = self._turns.overdue(self._clock.monotonic())
        return self.intake(node) if node is not None else None

    def taken(self, node: str) -> Callable[[], None] | None:
        """What was fetched of a node has come: its next one may be fetched. What this gives is to be called once the
        update's deliveries are acked; None if nothing was fetched for it."""
        if (intake := self._intakes.pop(self._topology.chunk_queue(node), None)) is None:
            return None
        intake.stop()
        self._turns.done(node)
        return intake.close

    def done(self, node: str) -> None:
        """What was fetched of a node, if anything was, is of no use."""
        if (intake := self._intakes.pop(self._topology.chunk_queue(node), None)) is not None:
            intake.close()
            self._turns.done(node)

    def look(self) -> None:
        """Do what time has made due: who keeps others waiting in vain goes behind them, and chunks of refused updates
        are thrown away."""
        while (node := self._turns.park(self._clock.monotonic())) is not None:
            self._intakes.pop(self._topology.chunk_queue(node)).close()
        if self._discard is not None and self._discard.seconds_left() <= 0:
            self._end_discard()
        node = self._next_refused()
        if node is not None and self._clock.monotonic() >= self._discard_at:
            self._begin_discard(node)

    def pardon(self, seconds: float) -> None:
        """For so long nobody looked at what came."""
        self._turns.pardon(seconds)

    def seconds_left(self) -> float:
        """Seconds until `look` or `in_vain` may have something; infinite while nothing is fetched."""
        left = self._turns.seconds_left(self._clock.monotonic())
        if self._discard is not None:
            left = min(left, self._discard.seconds_left())
        elif self._next_refused() is not None:
            left = min(left, max(0.0, self._discard_at - self._clock.monotonic()))
        return left

    def close(self) -> None:
        """Give back what was fetched."""
        for intake in self._intakes.values():
            intake.close()
        if self._discard is not None:
            self._discard.close()
        self._intakes, self._discard = {}, None

    # --- chunks of refused updates -----------------------------------------------------------------------------------

    def _is_discarded(self, delivery: Delivery) -> bool:
        discard = self._discard
        return discard is not None and delivery.queue == self._topology.chunk_queue(discard.manifest.node)

    def _next_refused(self) -> str | None:
        """Whose chunks are to be thrown away next, if none are now: who has waited longest, and of whom nothing else is
        fetched."""
        if self._discard is not None:
            return None
        return next((node for node in self._refused if self._topology.chunk_queue(node) not in self._intakes), None)

    def _begin_discard(self, node: str) -> None:
        manifest, broker, topology = self._refused.pop(node), self._broker, self._topology
        self._discard = Discard(broker, topology, manifest, self._current, self._clock, self._on_delivery)

    def _end_discard(self) -> None:
        discard, self._discard = self._discard, None
        if discard is None:
            return
        discard.close()
        self._discard_at = self._clock.monotonic() + _DISCARD_PAUSE * discard.seconds
        if discard.is_cut_short:  # there is more, for its next turn
            self._refused.setdefault(discard.manifest.node, discard.manifest)
