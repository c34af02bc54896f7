"""Writing a target parameter set to its stream, and reading one from it: only when needed, only the newest."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence

from common.broker import Broker, Delivery, Publication, StreamPosition, Timestamp
from common.codec import decode, encode
from common.errors import BrokerUnavailable, Poison
from common.messages import EncodingName, ParameterChunk
from common.topology import Topology
from common.transfer import CompleteVersion, VersionAssembly, checksum, payload_digest

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


class VersionReader:
    """Reads the newest version at or above a wanted one from a stream.

    The hint may be wrong in either direction (clocks, retention): when nothing comes for `patience` seconds the reader
    starts again at the first message that the stream still holds, and waits longer for each chunk.
    """

    def __init__(self, broker: Broker, topology: Topology, encoder: str, layout_digest: str) -> None:
        self._broker = broker
        self._stream = topology.stream(encoder)
        self._encoder = encoder
        self._layout_digest = layout_digest
        self._unseen: StreamPosition = "first"
        self._furthest = -1

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

        Raises BrokerUnavailable after `timeout` seconds in which it got no further than before.
        """
        start: StreamPosition = Timestamp(published_at) if published_at > 0 else "first"
        deadline, furthest = time.monotonic() + timeout, self._furthest
        while (left := deadline - time.monotonic()) > 0:
            found = self._scan(start, at_least, exact, min(patience, left))
            if found is not None:
                return found
            if self._furthest > furthest:
                furthest, deadline = self._furthest, time.monotonic() + timeout
            start, patience = "first", 2 * patience
        raise BrokerUnavailable(
            f"version {at_least} of {self._encoder} did not come over the stream in {timeout:.0f} s"
        )

    def look(self, at_least: int, *, patience: float = 1.0) -> CompleteVersion | None:
        """The newest version ≥ `at_least` among those that this reader has not seen yet; None is no failure."""
        return self._scan(self._unseen, at_least, False, patience)

    def _scan(self, start: StreamPosition, at_least: int, exact: bool, patience: float) -> CompleteVersion | None:
        """Read on until the wanted version is there and nothing newer is at hand, or until silence."""
        arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        assembly = VersionAssembly(self._encoder, self._layout_digest)
        newest: CompleteVersion | None = None
        subscription = self._broker.read_stream(self._stream, arrived.put, start=start)
        try:
            while True:
                try:
                    # once the wanted version is whole, take only what follows at once
                    delivery = arrived.get(timeout=0.02 if newest else patience)
                except queue.Empty:
                    return newest
                self._broker.ack(delivery)
                self._furthest = max(self._furthest, delivery.offset or 0)
                try:
                    chunk = decode(delivery.body)
                    done = assembly.add(chunk) if isinstance(chunk, ParameterChunk) else None
                except Poison:
                    continue  # a damaged version is not on the stream for this reader; the next one will be
                if done is None:
                    continue
                if delivery.offset is not None:
                    self._unseen = delivery.offset + 1
                wanted = done.version == at_least if exact else done.version >= at_least
                if wanted and (newest is None or (done.epoch, done.version) >= (newest.epoch, newest.version)):
                    newest = done
        finally:
            subscription.close()
