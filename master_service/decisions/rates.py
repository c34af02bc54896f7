"""How many messages a second are taken of one sender: a token bucket each. Pure: it is told the time, in seconds of any
clock that does not go back.

A bucket holds `burst` tokens at most and gets `per_second` of them; a message takes one
(https://en.wikipedia.org/wiki/Token_bucket).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

#: Senders whose buckets are kept. One that is forgotten begins with a full bucket.
KEPT_SENDERS = 10_000


@dataclass
class _Bucket:
    tokens: float
    at: float
    warned: bool = False


class Rates:
    """The buckets of all senders."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def allows(self, sender: str, at: float) -> bool:
        """Whether there is a token for a message of this sender; then it is taken."""
        bucket = self._filled(sender, at)
        if bucket.tokens < 1.0:
            return False
        bucket.tokens -= 1.0
        return True

    def is_news(self, sender: str, at: float) -> bool:
        """Whether it was never said of this sender that it sends too much; from now on it was."""
        bucket = self._filled(sender, at)
        news, bucket.warned = not bucket.warned, True
        return news

    def __len__(self) -> int:
        return len(self._buckets)

    def _filled(self, sender: str, at: float) -> _Bucket:
        bucket = self._buckets.pop(sender, None) or _Bucket(self._burst, at)
        self._buckets[sender] = bucket  # who was heard last is forgotten last
        if len(self._buckets) > KEPT_SENDERS:
            self._buckets.popitem(last=False)
        bucket.tokens = min(self._burst, bucket.tokens + max(0.0, at - bucket.at) * self._per_second)
        bucket.at = max(bucket.at, at)
        return bucket
