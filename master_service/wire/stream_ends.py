"""Where the streams of versions end, so that a notice can say where a version begins and a node skips what it will not
adopt.

A broker tells a publisher no offsets. But nobody writes to these streams but the master, and who does it for it (see
`shards`), one version after the other: once it has looked where one ends, it counts what is written there. What is told
may be too low, which costs a reader a few messages: RabbitMQ gives an offset to what it notes at the beginning of a
segment, and what was published again after a reconnect counts twice. So it is looked at again once a quarter of a
segment may have been written, which a look of some milliseconds is small beside. It must not be too high, for then a
reader waits in vain for some seconds: a broker that was killed may have lost a stream's end, so after a reconnect, and
while a connection is away, nothing is told until it was looked at anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.wire.broker import Broker
from common.wire.topology import MIB

#: It is looked at again after so many versions, or this part of a segment, whichever comes first.
_VERSIONS = 64
_PART = 4
#: Bytes of the smallest segment; that of larger versions is about one of them. See `Topology.parameters`.
_SEGMENT_BYTES = 16 * MIB


@dataclass
class _End:
    """`offset`: None if the broker did not say. `reconnects`: of the connection, when it was looked at. `bytes` and
    `versions`: what was written since."""

    offset: int | None
    reconnects: int
    bytes: int = 0
    versions: int = 0


class StreamEnds:
    """Where each stream ends, as far as is known. Used by the thread that writes to them."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._ends: dict[str, _End] = {}

    def of(self, stream: str) -> int | None:
        """An offset that is not above that of what is written next; None if none is known."""
        end = self._ends.get(stream)
        return end.offset if end is not None and self._holds(end) else None

    def wrote(self, stream: str, messages: int, size: int) -> bool:
        """A version of so many messages and bytes was written and confirmed; whether what `of` said before still
        holds."""
        end = self._ends.get(stream)
        held = end is not None and self._holds(end)
        if end is not None and held:
            end.offset = None if end.offset is None else end.offset + messages
            end.bytes, end.versions = end.bytes + size, end.versions + 1
            if end.versions < _VERSIONS and (end.offset is None or _PART * end.bytes < max(_SEGMENT_BYTES, size)):
                return True
        self._look(stream)
        return held

    def forget(self, stream: str) -> None:
        """The stream is gone."""
        self._ends.pop(stream, None)

    def _holds(self, end: _End) -> bool:
        status = self._broker.status()
        return status.connected and status.reconnects == end.reconnects

    def _look(self, stream: str) -> None:
        self._ends.pop(stream, None)
        before = self._broker.status()
        if before.connected:
            self._ends[stream] = _End(self._broker.stream_end(stream), before.reconnects)
