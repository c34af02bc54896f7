"""Writing a target parameter set to its stream, and reading one from it: only when needed, only the newest."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence

from common.clock import SYSTEM, Clock
from common.errors import BrokerUnavailable, Poison
from common.numbers.slicing import EncodingName
from common.wire.broker import Broker, Delivery, Publication, StreamPosition, Subscription, Timestamp
from common.wire.codec import encode, received
from common.wire.to_node import ParameterChunk
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion, VersionAssembly, checksum, payload_digest

#: Stream timestamps are exact to a second, and broker and master clocks differ a little.
HINT_MARGIN_SECONDS = 5.0
#: The slowest line on which a version still arrives, bytes a second; one chunk of 4 MiB takes it 43 s.
SLOW_LINE = 96 * 1024
#: How long to wait for a newer version once the wanted one is whole, seconds.
_NEWER_SECONDS = 0.02


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
    digest: str | None = None,
    clock: Clock = SYSTEM,
) -> float:
    """Write one version to the encoder's stream, confirmed; gives the position hint for notices (broker seconds).

    `digest`: `payload_digest(bodies)`, where it is known. `declare`: the stream may not be there yet. Raises Unroutable
    if it is not and was not declared.
    """
    hint = max(0.0, clock.now() - HINT_MARGIN_SECONDS)
    size, digest = sum(len(body) for body in bodies), digest or payload_digest(bodies)
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
    """Which version to look for, and for how long: `timeout` seconds from the last chunk that brought it nearer.

    On a slow line every chunk on the way to it does. Chunks of later versions do not, when exactly one version is
    wanted: that one may be lost.
    """

    def __init__(self, at_least: int, *, exact: bool, timeout: float, patience: float, clock: Clock) -> None:
        self.at_least = at_least
        self.exact = exact
        self.timeout = timeout
        self.patience = patience
        self._clock = clock
        self._met: set[tuple[int, int, int]] = set()
        self.from_first = False
        self._deadline = self._heard_at = clock.monotonic()
        self._deadline += timeout

    def wants(self, version: int) -> bool:
        return version == self.at_least if self.exact else version >= self.at_least

    def met(self, chunk: ParameterChunk) -> None:
        """A chunk has come. A new one gives more time, if it is part of the version or on the way to it."""
        self._heard_at = self._clock.monotonic()
        key = (chunk.epoch, chunk.version, chunk.index)
        if key not in self._met and not (self.exact and chunk.version > self.at_least):
            self._met.add(key)
            self._deadline = self._clock.monotonic() + self.timeout

    def begin_again(self) -> None:
        """Once more, from the first message; if the time is over already, as in a process that slept, for a while."""
        now = self._heard_at = self._clock.monotonic()
        self._deadline = now + self.patience if self.over else self._deadline
        self.from_first, self.patience = True, self.timeout

    @property
    def silent(self) -> bool:
        """Whether nothing has come for `patience` seconds."""
        return self._clock.monotonic() - self._heard_at >= self.patience

    @property
    def over(self) -> bool:
        return self._clock.monotonic() >= self._deadline


class VersionReader:
    """Reads the newest version at or above a wanted one from a stream; stepped by whoever owns it.

    `seek` or `look` begins, `step` goes on until it gives the version, raises, or `searching` is False. The hint may be
    wrong in either direction (clocks, retention): when nothing comes for `patience` seconds the reader starts again at
    the first message that the stream still holds, and waits longer. `slice_bytes`: the most that a chunk carries; on a
    slow line one alone takes a while.
    """

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        encoder: str,
        layout_digest: str,
        *,
        slice_bytes: int = 0,
        elements: int | None = None,
        named: Mapping[int, str] | None = None,
        takes: Callable[[Delivery], bool] = lambda delivery: True,
        clock: Clock = SYSTEM,
    ) -> None:
        """`elements`: numbers of a version. `named`: the digests of versions that the master has named; more may come
        at any time. A named version counts if it has that digest; another counts only where the wanted one was not
        named. What `takes` says no to is as if it were not on the stream."""
        self._broker = broker
        self._stream = topology.stream(encoder)
        self._encoder = encoder
        self._layout_digest = layout_digest
        self._chunk_seconds = slice_bytes / SLOW_LINE
        self._clock = clock
        self._unseen: StreamPosition = "first"
        #: The broker's time at which the last version before `_unseen` was written, and the highest number seen.
        self._seen_at, self._highest = 0.0, -1
        self._search: _Search | None = None
        self._subscription: Subscription | None = None
        self._arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._elements = elements
        self._named = {} if named is None else named
        self._takes = takes
        self._newest: CompleteVersion | None = None
        self._assembly = self._new_assembly()

    def seek(
        self,
        at_least: int,
        published_at: float = 0.0,
        *,
        exact: bool = False,
        timeout: float = 60.0,
        patience: float = 3.0,
    ) -> None:
        """Begin to read the newest complete version ≥ `at_least` (`exact`: that very one, as written last).

        `timeout`: `step` raises after so many seconds without a new chunk. Raises BrokerUnavailable.
        """
        start: StreamPosition = Timestamp(published_at) if published_at > 0 else "first"
        if self._seen_at >= published_at > 0 and at_least > self._highest:
            # the hint's margin holds versions that were read already: where many are made, most of what it points at
            start = self._unseen
        search = _Search(
            at_least,
            exact=exact,
            timeout=timeout + self._chunk_seconds,
            patience=patience + self._chunk_seconds,
            clock=self._clock,
        )
        self._begin(search, start)

    def look(self, at_least: int, *, patience: float = 1.0) -> None:
        """Begin to see whether there is a version ≥ `at_least` among those that this reader has not seen yet. Finding
        none is no failure: then `searching` is False after a `step` that gave None."""
        patience += self._chunk_seconds
        search = _Search(at_least, exact=False, timeout=float("inf"), patience=patience, clock=self._clock)
        self._begin(search, self._unseen)

    @property
    def searching(self) -> bool:
        return self._search is not None

    def step(self, wait: float = 0.0) -> CompleteVersion | None:
        """Take what has come, waiting up to `wait` seconds for more; the version, once it is here and nothing newer is
        at hand. Raises BrokerUnavailable when the time of a `seek` is over."""
        search = self._search
        if search is None:
            return None
        while True:
            try:
                delivery = self._arrived.get(timeout=wait) if wait > 0 else self._arrived.get_nowait()
            except queue.Empty:
                return self._nothing_came(search)
            self._broker.ack(delivery)
            if self._takes(delivery):
                self._take(search, delivery)
            # what is there already counts before any time that is over; what comes steadily must not keep us here
            wait = min(wait, _NEWER_SECONDS) if self._newest is not None else 0.0

    def read(
        self,
        at_least: int,
        published_at: float = 0.0,
        *,
        exact: bool = False,
        timeout: float = 60.0,
        patience: float = 3.0,
    ) -> CompleteVersion:
        """Seek, and step until the version is here. Raises BrokerUnavailable as `step` does."""
        self.seek(at_least, published_at, exact=exact, timeout=timeout, patience=patience)
        while True:
            found = self.step(wait=min(0.25, timeout, patience))
            if found is not None:
                return found

    def close(self) -> None:
        """Stop reading, and end the search."""
        self._search = self._newest = None
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def _begin(self, search: _Search, start: StreamPosition) -> None:
        self.close()
        # of this search alone: what a closed subscription still delivers goes into a queue that nobody reads
        self._arrived = queue.SimpleQueue()
        self._assembly = self._new_assembly()
        self._subscription = self._broker.read_stream(self._stream, self._arrived.put, start=start)
        self._search = search

    def _new_assembly(self) -> VersionAssembly:
        return VersionAssembly(self._encoder, self._layout_digest, elements=self._elements, counts=self._counts)

    def _counts(self, chunk: ParameterChunk) -> bool:
        """Whether the master has named the version of a chunk, or nothing can be said of it."""
        digest = self._named.get(chunk.version)
        if digest is not None:
            return chunk.digest == digest
        return self._search is None or self._search.at_least not in self._named

    def _take(self, search: _Search, delivery: Delivery) -> None:
        try:
            chunk = received(delivery)
            if not isinstance(chunk, ParameterChunk):
                return
            done = self._assembly.add(chunk)
            if done is not None or self._counts(chunk):
                search.met(chunk)
        except Poison:
            return  # a damaged version is not on the stream for this reader; the next one will be
        if done is None:
            return
        if delivery.offset is not None:
            self._unseen, self._seen_at = delivery.offset + 1, delivery.timestamp or 0.0
            self._highest = max(self._highest, done.version)
        newer = self._newest is None or (done.epoch, done.version) >= (self._newest.epoch, self._newest.version)
        if newer and search.wants(done.version):
            self._newest = done

    def _nothing_came(self, search: _Search) -> CompleteVersion | None:
        if (found := self._newest) is not None:
            self.close()
            return found
        if search.timeout == float("inf"):
            if search.silent:
                self.close()  # a look
        elif not search.from_first and (search.silent or search.over):
            # the hint was wrong, or the stream has lost what it pointed at
            search.begin_again()
            self._begin(search, "first")
        elif search.over:
            self.close()
            raise BrokerUnavailable(
                f"version {search.at_least} of {self._encoder} did not come over the stream in {search.timeout:.0f} s"
            )
        return None
