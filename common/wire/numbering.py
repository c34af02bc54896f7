"""Numbers on what the master sends, so that a node can tell that something never came, as where its full inbox drops
the oldest. They stand in the headers, beside the messages: a master that does not number is heard as ever.

They hold for one epoch, which is one start of a master. A number counts what was sent to the same before: to one node,
or to all of an encoder type. What is for one node also says how many messages went to all, of each type.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from common.wire.broker import Delivery

_EPOCH, _NUMBER, _BROADCASTS = "x-epoch", "x-number", "x-broadcasts"
#: Between two times that a node which misses something asks for everything again, seconds.
MISSED_SECONDS = 5.0
#: Nodes whose numbers are kept; one that was sent nothing for the longest time begins anew, and misses nothing by that.
_KEPT = 10_000
#: The most that is read of a header, characters.
_LONGEST = 4096
_LARGEST = 1 << 53


class Numbers:
    """The master's side: what was sent in this epoch."""

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._sent: OrderedDict[str, int] = OrderedDict()
        self._broadcasts: dict[str, int] = {}

    def begin(self, epoch: int) -> None:
        """From now on there are numbers; what left before, on the way to the beginning of an epoch, has none."""
        self._epoch = epoch

    def to_one(self, node: str) -> dict[str, str | int]:
        """The headers of the next message to a node."""
        if self._epoch is None:
            return {}
        number = self._sent.pop(node, 0)
        self._sent[node] = number + 1
        if len(self._sent) > _KEPT:
            self._sent.popitem(last=False)
        told = " ".join(f"{each}={count}" for each, count in self._broadcasts.items())
        return {_EPOCH: self._epoch, _NUMBER: number, _BROADCASTS: told}

    def to_all(self, encoder_type: str) -> dict[str, str | int]:
        """The headers of the next message to every node of a type."""
        if self._epoch is None:
            return {}
        number = self._broadcasts.get(encoder_type, 0)
        self._broadcasts[encoder_type] = number + 1
        return {_EPOCH: self._epoch, _NUMBER: number}


class Hearing:
    """A node's side: whether something was sent to it that it has not heard. What came before the first number that a
    process hears is not missed: it has just joined."""

    def __init__(self, types: Iterable[str]) -> None:
        self._types = tuple(types)
        self._epoch: int | None = None
        #: How many messages of this epoch it knows of: of each type, and of its own, which have no type.
        self._known: dict[str, int] = {}
        self._misses = False
        self._asked_at = -math.inf

    def hear(self, delivery: Delivery) -> None:
        """Take note of a delivery. A new epoch counts as something missed: what the master sent last before it may be
        gone with nothing to tell by."""
        headers = delivery.headers
        epoch, number = _count(headers.get(_EPOCH)), _count(headers.get(_NUMBER))
        if epoch is None or number is None or (self._epoch is not None and epoch < self._epoch):
            return
        if epoch != self._epoch:
            self._misses |= self._epoch is not None
            self._epoch, self._known = epoch, {}
        of = "" if _BROADCASTS in headers else delivery.routing_key
        for each, before in {of: number, **self._broadcasts(headers)}.items():
            known = self._known.get(each, before)
            self._misses |= before > known
            self._known[each] = max(known, before + (each == of))

    def asks(self, now: float) -> bool:
        """Whether everything is to be asked for again, now (seconds of a monotonic clock). Said once, and not again for
        a while: whoever misses much is not helped by more of the same."""
        if not self._misses or now - self._asked_at < MISSED_SECONDS:
            return False
        self._misses, self._asked_at = False, now
        return True

    def _broadcasts(self, headers: Mapping[str, Any]) -> dict[str, int]:
        """How many messages all nodes of this one's types were sent, as far as a header says."""
        told = headers.get(_BROADCASTS)
        if not isinstance(told, str) or len(told) > _LONGEST:
            return {}
        counts = dict(word.split("=", 1) for word in told.split() if "=" in word)
        found = {each: counts.get(each, "0") for each in self._types}
        return {each: int(count) for each, count in found.items() if _is_number(count)}


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= _LARGEST else None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 15
