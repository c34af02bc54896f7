"""Writing a target parameter set to its stream, and reading one from it: only when needed, only the newest."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence

from common.errors import BrokerUnavailable, Poison
from common.numbers.slicing import EncodingName
from common.wire.broker import Broker, Delivery, Publication, StreamPosition, Timestamp
from common.wire.codec import decode, encode
from common.wire.messages import ParameterChunk
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion, VersionAssembly, checksum, payload_digest

#: Stream timestamps are exact to a second, and broker and master clocks differ a little.
HINT_MARGIN_SECONDS = 5.0


def publish_version(
    broker: Broker,
    topology: Topology,
    *,
    encoder: str,
    epoch: int,
    version: int,
    encoding: EncodingName,
    layout_digest: str,
    bodies: Sequence[bytes],
    progress: float,
    declare: bool = True,
) -> float:
    """Write one version to the encoder's stream, confirmed; gives the position hint for notices (broker seconds).

    `declare`: the stream may not be there yet. Raises Unroutable if it is not and was not declared.
    """
    hint = max(0.0, time.time() - HINT_MARGIN_SECONDS)
    size, digest = sum(len(body) for body in bodies), payload_digest(bodies)
    if declare:
        broker.declare(topology.parameters(encoder, size))
    broker.publish(
        *(
            Publication(
                topology.parameter,
                encoder,
                encode(
                    ParameterChunk(
                        encoder=encoder,
                        epoch=epoch,
                        version=version,
                        index=index,
                        chunks=len(bodies),
                        encoding=encoding,
                        layout_digest=layout_digest,
                        size=size,
                        digest=digest,
                        progress=progress,
                        checksum=checksum(body),
                        data=body,
                    )
                ),
            )
            for index, body in enumerate(bodies)
        )
    )
    return hint


class _Search:
    """What is looked for, and how long yet: `timeout` seconds from the last chunk that brought it nearer.

    On a slow line those on the way to it do; but not those that are published behind a very version that is lost.
    """

    def __init__(self, at_least: int, exact: bool, timeout: float) -> None:
        self._at_least = at_least
        self._exact = exact
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._met: set[tuple[int, int, int]] = set()

    def wants(self, version: int) -> bool:
        return version == self._at_least if self._exact else version >= self._at_least

    def met(self, chunk: ParameterChunk) -> None:
        key = (chunk.epoch, chunk.version, chunk.index)
        if key not in self._met and (not self._exact or chunk.version <= self._at_least):
            self._met.add(key)
            self._deadline = time.monotonic() + self._timeout

    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()


class VersionReader:
    """Reads the newest version at or above a wanted one from a stream.

    The hint may be wrong in either direction (clocks, retention): when nothing comes for `patience` seconds the reader
    starts again at the first message that the stream still holds, and waits longer.
    """

    def __init__(self, broker: Broker, topology: Topology, encoder: str, layout_digest: str) -> None:
        self._broker = broker
        self._stream = topology.stream(encoder)
        self._encoder = encoder
        self._layout_digest = layout_digest
        self._unseen: StreamPosition = "first"

    def read(
        self,
        at_least: int,
        published_at: float,
        *,
        exact: bool = False,
        timeout: float = 60.0,
        patience: float = 3.0,
    ) -> CompleteVersion:
        """The newest complete version ≥ `at_least` on the stream now; `exact`: that very one, as written last.

        Raises BrokerUnavailable after `timeout` seconds without a chunk that it had not met yet.
        """
        start: StreamPosition = Timestamp(published_at) if published_at > 0 else "first"
        search = _Search(at_least, exact, timeout)
        while search.seconds_left() > 0:
            found = self._scan(start, search, patience)
            if found is not None:
                return found
            start, patience = "first", timeout
        raise BrokerUnavailable(
            f"version {at_least} of {self._encoder} did not come over the stream in {timeout:.0f} s"
        )

    def look(self, at_least: int, *, patience: float = 1.0) -> CompleteVersion | None:
        """The newest version ≥ `at_least` among those that this reader has not seen yet; None is no failure."""
        return self._scan(self._unseen, _Search(at_least, False, float("inf")), patience)

    def _scan(self, start: StreamPosition, search: _Search, patience: float) -> CompleteVersion | None:
        """Read on until the wanted version is there and nothing newer is at hand, or until silence."""
        arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        assembly = VersionAssembly(self._encoder, self._layout_digest)
        newest: CompleteVersion | None = None
        subscription = self._broker.read_stream(self._stream, arrived.put, start=start)
        try:
            while True:
                try:
                    # once the wanted version is whole, take only what follows at once
                    wait = 0.02 if newest else max(0.0, min(patience, search.seconds_left()))
                    delivery = arrived.get(timeout=wait)
                except queue.Empty:
                    return newest
                self._broker.ack(delivery)
                try:
                    chunk = decode(delivery.body)
                    if not isinstance(chunk, ParameterChunk):
                        continue
                    done = assembly.add(chunk)
                    search.met(chunk)
                except Poison:
                    continue  # a damaged version is not on the stream for this reader; the next one will be
                if done is None:
                    continue
                if delivery.offset is not None:
                    self._unseen = delivery.offset + 1
                newer = newest is None or (done.epoch, done.version) >= (newest.epoch, newest.version)
                if newer and search.wants(done.version):
                    newest = done
        finally:
            subscription.close()
