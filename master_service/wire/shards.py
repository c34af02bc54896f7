"""The master's side of its aggregators: orders go out, what comes back is handed to whoever waits for it.

Used by the thread that decides, by the one that serves the outbox, and by the one that drops what nobody needs. An
order is given again to whom has not answered for some seconds, or says hello meanwhile.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import structlog

from common.clock import Clock, Signal
from common.errors import BrokerUnavailable, Damaged, Poison, PublishRejected, ShardsAway, Unroutable
from common.wire.broker import Broker, Delivery, OnDelivery, Publication
from common.wire.codec import encode
from common.wire.topology import Topology
from master_service.wire.orders import AnyReport, Done, Hello, Order, report

log = structlog.get_logger()

Kind = TypeVar("Kind", bound=Order)

#: Reports that are at hand, at most.
_PREFETCH = 1024
#: What is not answered after so long is said again, seconds.
_AGAIN_SECONDS = 10.0
#: Between two lines about who is waited for, seconds.
_SAY_SECONDS = 10.0
#: How often somebody who waits looks whether it is to end, seconds.
_LOOK_SECONDS = 0.2


class Asked:
    """An order to all shards, or some of them, and what has come of it."""

    def __init__(self, orders: dict[int, Publication]) -> None:
        self.orders = orders
        self.answers: dict[int, Done] = {}
        self.sent_at = 0.0

    @property
    def missing(self) -> list[int]:
        return [shard for shard in self.orders if shard not in self.answers]


class Shards:
    """The aggregators of one master; `count` of them."""

    def __init__(
        self,
        count: int,
        broker: Broker,
        topology: Topology,
        *,
        clock: Clock,
        ending: Signal,
        new_id: Callable[[], str],
        on_report: OnDelivery,
    ) -> None:
        """`on_report` is called by the broker with what is for the thread that decides: see `told`."""
        self.count = count
        #: Whether whoever decides waits for a version, however long it takes: at a start there is nothing else to do.
        self.patient = True
        #: Whom it has waited for a while now, in words; empty if for nobody.
        self.missing = ""
        self._broker = broker
        self._topology = topology
        self._clock = clock
        self._ending = ending
        self._new_id, self._numbers = new_id, itertools.count()
        self._on_report = on_report
        self._changed = threading.Condition()
        self._asked: dict[str, Asked] = {}
        self._declared: set[str] = set()

    def start(self) -> None:
        """Declare what orders and reports travel by, and hear."""
        self._broker.declare(self._topology.shards(self.count))
        self._broker.consume(self._topology.master_shards, self._arrived, prefetch=_PREFETCH)

    def receives(self, node: str) -> None:
        """A node will send updates: its chunk queues are there."""
        if node not in self._declared:
            self._broker.declare(self._topology.shard_chunks(node, self.count))
            self._declared.add(node)

    def told(self, delivery: Delivery) -> AnyReport:
        """What a delivery says that `on_report` was given. Raises Poison."""
        return report(delivery, self._topology)

    # --- orders ------------------------------------------------------------------------------------------------------

    def tell(self, kind: type[Kind], shard: int | None = None, **fields: Any) -> None:
        """An order without an answer, to one or all. It may be lost."""
        _, asked = self._made(kind, [shard] if shard is not None else range(self.count), lambda _: fields)
        self._send(asked)

    def ask(
        self, kind: type[Kind], fields: Callable[[int], dict[str, Any] | None], shards: Sequence[int] | None = None
    ) -> Asked:
        """An order whose fields each shard's number leads to; None: it is not for that one. See `answers`."""
        name, asked = self._made(kind, range(self.count) if shards is None else shards, fields)
        with self._changed:
            self._asked[name] = asked  # before an answer can come
        self._send(asked)
        return asked

    def answers(self, asked: Asked, patience: float | None = None) -> dict[int, Done]:
        """What came of it, by shard, once all have answered. Raises ShardsAway after `patience` seconds (None: says
        whom it waits for, as long as it takes), BrokerUnavailable once the service is to end, Damaged for a shard that
        is behind, or has another version."""
        begun = said = self._clock.monotonic()
        while not self._all_here(asked):
            self.missing = self._names(asked.missing)
            now = self._clock.monotonic()
            if self._ending.is_set():
                raise BrokerUnavailable(f"ended while it waited for {self._names(asked.missing)}")
            if now - asked.sent_at >= _AGAIN_SECONDS:
                self._send(asked)
            if patience is not None and now - begun >= patience:
                raise ShardsAway(f"waiting for {self._names(asked.missing)}")
            if patience is None and now - said >= _SAY_SECONDS:
                said = now
                log.warning(f"waiting for {self._names(asked.missing)}", start=self._command(asked.missing[0]))
        self.missing = ""
        if behind := [shard for shard, answer in asked.answers.items() if answer.behind]:
            raise Damaged(
                f"{self._names(behind)} has not computed what the message log says was published: its state directory "
                "is older than the master's; restore it from a backup that is not"
            )
        if differing := [shard for shard, answer in asked.answers.items() if answer.differs]:
            raise Damaged(
                f"{self._names(differing)} has computed a version otherwise than the message log says: one of the two "
                "state directories is from a backup, or of another log"
            )
        return dict(sorted(asked.answers.items()))

    def forget(self, asked: Asked) -> None:
        """Nobody waits for it any more."""
        with self._changed:
            self._asked = {name: each for name, each in self._asked.items() if each is not asked}

    def _all_here(self, asked: Asked) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(lambda: not asked.missing, _LOOK_SECONDS))

    def _made(
        self, kind: type[Kind], shards: Sequence[int], fields: Callable[[int], dict[str, Any] | None]
    ) -> tuple[str, Asked]:
        name, orders = f"{self._new_id()[:16]}-{next(self._numbers)}", {}
        for shard in shards:
            if (given := fields(shard)) is not None:
                body = encode(kind(request=name, shards=self.count, **given))
                key = self._topology.shard_key(shard)
                # what a restart of the broker loses is said again
                orders[shard] = Publication(self._topology.shard, key, body, message_id=name, persistent=False)
        return name, Asked(orders)

    def _send(self, asked: Asked) -> None:
        asked.sent_at = self._clock.monotonic()
        orders = [asked.orders[shard] for shard in asked.missing]
        while orders:
            try:
                return self._broker.publish(*orders)
            except (BrokerUnavailable, PublishRejected, Unroutable) as error:
                log.warning("the broker does not take orders for aggregators, trying again", problem=str(error))
                if self._clock.wait(1.0, self._ending):
                    raise BrokerUnavailable(str(error)) from None

    # --- reports -----------------------------------------------------------------------------------------------------

    def _arrived(self, delivery: Delivery) -> None:
        """In the broker's thread."""
        try:
            said = report(delivery, self._topology)
        except Poison as poison:
            log.warning("what an aggregator is said to have sent cannot be read", why=poison.detail)
            self._broker.ack(delivery)
            return
        if isinstance(said, Done):
            with self._changed:
                if (asked := self._asked.get(said.request)) is not None and said.shard in asked.orders:
                    asked.answers[said.shard] = said
                    if not asked.missing:
                        del self._asked[said.request]
                self._changed.notify_all()
            self._broker.ack(delivery)
            return
        if isinstance(said, Hello):
            self._greeted(said)
        self._on_report(delivery)

    def _greeted(self, hello: Hello) -> None:
        if hello.shards != self.count:
            log.error(
                f"an aggregator of {hello.shards} shards is here, and this log is of {self.count}; it gets nothing to "
                "do",
                start=self._command(min(hello.shard, self.count - 1)),
            )
        with self._changed:
            for asked in self._asked.values():
                if hello.shard in asked.missing:
                    asked.sent_at = -_AGAIN_SECONDS  # whoever waits for it says it again

    def _names(self, shards: Sequence[int]) -> str:
        return ", ".join(f"aggregator {shard + 1}/{self.count}" for shard in shards)

    def _command(self, shard: int) -> str:
        return f"shared-encoder aggregator --shard {shard + 1}/{self.count}"
