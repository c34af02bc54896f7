"""No sender fills the master's inbox for the others: what comes faster than its rate is dropped, or waits.

Requests and signs of life are dropped: who sent them says them again when it has to. The answer to an instruction and a
leave are said once, so they wait, a bounded number of them, of which the newest count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import structlog

from common.clock import Clock
from common.wire.accounts import operator_of, party_of
from common.wire.bounds import CONTROL
from common.wire.broker import Delivery
from common.wire.topology import Topology
from master_service.decisions.rates import Rates

log = structlog.get_logger()

#: Bytes of a message that carries no tensor, and a little more.
_LONGEST = CONTROL.words + 1024
#: Answers and leaves of one sender that wait. Who keeps to its rate has none.
_WAITING = 32


class Pace:
    """Told apart without reading, so that what is dropped costs nothing: the routing key names sender and kind."""

    def __init__(self, rates: Rates, topology: Topology, clock: Clock) -> None:
        self._rates = rates
        self._topology = topology
        self._clock = clock
        self._waiting: dict[str, deque[Delivery]] = {}

    def admits(self, delivery: Delivery) -> bool:
        """Whether a delivery may be looked at now. If not, it is for `too_many`."""
        sender = self.payer(delivery)
        return sender not in self._waiting and self._rates.allows(sender, self._clock.monotonic())

    def too_many(self, delivery: Delivery) -> Delivery | None:
        """What is to be acked and forgotten: this delivery, or an older one that it is the successor of, if any."""
        sender, now = self.payer(delivery), self._clock.monotonic()
        if self._rates.is_news(sender, now):
            log.warning(
                "a sender sends more than it may: its requests and signs of life beyond that are dropped",
                sender=sender,
                setting="master.messages_per_second",
            )
        if delivery.exchange != self._topology.ack and not delivery.routing_key.endswith(".leave"):
            return delivery
        waiting = self._waiting.setdefault(sender, deque())
        waiting.append(delivery)
        return waiting.popleft() if len(waiting) > _WAITING else None

    def payer(self, delivery: Delivery) -> str:
        """Whose rate a delivery uses up: that of the sender in its key; but where parties have accounts, and it came
        from another's, that account's, by a name that no sender has."""
        sender = sender_of(delivery)
        if not self._topology.own_accounts:
            return sender
        party = party_of(self._topology, delivery.user_id)
        return sender if party in (sender, operator_of(sender)) and party else f"account {delivery.user_id}"

    def ready(self) -> Iterator[Delivery]:
        """Those that waited and may be looked at now, in order."""
        for sender, waiting in list(self._waiting.items()):
            while waiting and self._rates.allows(sender, self._clock.monotonic()):
                yield waiting.popleft()
            if not waiting:
                del self._waiting[sender]


def bounded(delivery: Delivery) -> Delivery:
    """A delivery to one of the master's two queues as it may wait: what is longer than any message there is set aside
    for that, and its beginning is enough."""
    return delivery if len(delivery.body) <= _LONGEST else replace(delivery, body=delivery.body[: _LONGEST + 1])


def sender_of(delivery: Delivery) -> str:
    """Who a delivery says it is from: the routing key's first word, to which the broker binds an account."""
    return delivery.routing_key.partition(".")[0]
