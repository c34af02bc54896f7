"""Writing a target parameter set to its stream, and reading one from it: only when needed, only the newest, and never a
byte twice.

Where a reader begins, in this order:

- What it has read it does not take again: it goes on behind the last version that it read.
- If the notice says from which offset on the version lies, it begins there, and so skips versions that it was too busy
  for. The offset may be too low, by a few messages: those come for nothing. It is never too high as long as the stream
  is what it was; a broker that was killed may have lost a stream's end, and one with a new disk begins at 0.
- A new reader, told no offset, begins at the notice's timestamp, which is some seconds early.
- When nothing comes, whatever it was told was wrong: it begins again at the first message that the stream holds.

What the broker may send ahead is bounded by what is not acked, and that by what the version still lacks: with its last
chunk nothing more is on its way but what the broker stores in one piece with that.

To begin to read a stream costs the broker about 4 ms of a processor, and to hand over one message of a few KiB a tenth
of that. So a reader to which nothing more can come rests: its consumer stays, what it has read last stays
unacked, and the next version is asked for by acking that. It begins anew where much lies in between.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from common.clock import SYSTEM, Clock
from common.errors import BrokerUnavailable, Poison
from common.numbers.slicing import EncodingName, encoded_size, slice_count, slice_length
from common.wire.broker import Broker, Delivery, Publication, StreamPosition, Subscription, Timestamp
from common.wire.codec import encode, received
from common.wire.to_node import ParameterChunk
from common.wire.topology import MIB, Topology
from common.wire.transfer import CompleteVersion, VersionAssembly, checksum, payload_digest

#: Stream timestamps are exact to a second, and broker and master clocks differ a little.
HINT_MARGIN_SECONDS = 5.0
#: The slowest line on which a version still arrives, bytes a second; one chunk of 4 MiB takes it 43 s.
SLOW_LINE = 96 * 1024
#: How long to wait for a newer version once the wanted one is whole, seconds; one that the master has named is not.
_NEWER_SECONDS = 0.02
#: Payload that is encoded and unconfirmed at a time while a version is written.
_WINDOW_BYTES = 16 * MIB
#: What the broker may send ahead of what was looked at, in messages, where the length of a version is not known; else
#: in bytes of float32, so that a distant broker is not asked for each chunk by itself.
_AHEAD = 16
_AHEAD_BYTES = 16 * MIB
#: What a reader that rests reads to get past it, bytes of float32; for more than that it begins anew.
_PASSED_BYTES = 64 * 1024
#: How long a reader rests, seconds: a broker takes a consumer that leaves something unacked for half an hour for dead.
REST_SECONDS = 60.0


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
    part: range | None = None,
    whole: tuple[int, int] | None = None,
    clock: Clock = SYSTEM,
) -> float:
    """Write one version to the encoder's stream, confirmed; gives the position hint for notices (broker seconds).

    Chunks are encoded a window at a time. The last one is confirmed by itself, so that the broker stores it apart:
    `stream_end` is exact then. `digest`: `payload_digest(bodies)`, where it is known. `declare`: the stream may not be
    there yet. `part`: these chunks alone are written, of a version of `whole` chunks and bytes; others write the rest.
    Raises Unroutable if the stream is not there and was not declared.
    """
    hint = max(0.0, clock.now() - HINT_MARGIN_SECONDS)
    chunks, size = whole or (len(bodies), sum(len(body) for body in bodies))
    digest = digest or payload_digest(bodies)
    first = part.start if part is not None else 0
    if not bodies:
        return hint
    if declare:
        broker.declare(topology.parameters(encoder, size))

    def publication(index: int) -> Publication:
        body = bodies[index]
        chunk = ParameterChunk(
            encoder=encoder,
            epoch=epoch,
            version=version,
            index=first + index,
            chunks=chunks,
            encoding=encoding,
            layout_digest=layout_digest,
            size=size,
            digest=digest,
            progress=progress,
            checksum=checksum(body),
            data=body,
        )
        return Publication(topology.parameter, encoder, encode(chunk))

    last = len(bodies) - 1
    window = max(1, _WINDOW_BYTES // max(1, len(bodies[0])))
    for start in range(0, last, window):
        broker.publish(*map(publication, range(start, min(start + window, last))))
    broker.publish(publication(last))
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
        shards: int = 1,
        clock: Clock = SYSTEM,
    ) -> None:
        """`elements`: numbers of a version. `shards`: as of a VersionAssembly. `named`: the digests of versions that
        the master has named; more may come at any time. A named version counts if it has that digest; another counts
        only where the wanted one was not named. What `takes` says no to is as if it were not on the stream."""
        self._broker = broker
        self._stream = topology.stream(encoder)
        self._encoder = encoder
        self._layout_digest = layout_digest
        self._chunk_seconds = slice_bytes / SLOW_LINE
        self._clock = clock
        #: Behind the last version that was read, and the highest number of one.
        self._unseen: StreamPosition = "first"
        self._highest = -1
        self._search: _Search | None = None
        self._subscription: Subscription | None = None
        self._arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._elements, self._shards = elements, shards
        #: How many messages the broker may send ahead, and what has come of it and is not acked.
        self._ahead, self._held = _AHEAD, deque[Delivery]()
        #: Behind the last message that came, and since when the reader rests.
        self._at = -1
        self._rests_since: float | None = None
        self._named = {} if named is None else named
        self._takes = takes
        self._newest: CompleteVersion | None = None
        self._assembly = self._new_assembly()

    def seek(
        self,
        at_least: int,
        published_at: float = 0.0,
        *,
        offset: int | None = None,
        exact: bool = False,
        timeout: float = 60.0,
        patience: float = 3.0,
    ) -> None:
        """Begin to read the newest complete version ≥ `at_least` (`exact`: that very one, as written last).

        `published_at`, `offset`: the hints of a notice of `at_least`. `timeout`: `step` raises after so many seconds
        without a new chunk. Raises BrokerUnavailable.
        """
        start: StreamPosition
        is_there = offset is not None or at_least == self._highest + 1
        if isinstance(self._unseen, int) and at_least > self._highest:
            start = max(self._unseen, offset or 0)
        elif offset is not None:
            start = offset
        else:
            start = Timestamp(published_at) if published_at > 0 else "first"
        search = _Search(
            at_least,
            exact=exact,
            timeout=timeout + self._chunk_seconds,
            patience=patience + self._chunk_seconds,
            clock=self._clock,
        )
        self._begin(search, start, is_there=is_there)

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
            self._held.append(delivery)
            self._at = -1 if delivery.offset is None else int(delivery.offset) + 1
            wanted = self._take(search, delivery) if self._takes(delivery) else self._ahead
            # what is there already counts before any time that is over; what comes steadily must not keep us here
            if self._newest is None:
                wait = 0.0
            elif self._named.get(self._newest.version) == self._newest.digest:
                wait, wanted = 0.0, 0  # of what nobody has named, a newer one may be from an older master
            else:
                wait = min(wait, _NEWER_SECONDS)
            self._let_come(wanted)

    def read(
        self,
        at_least: int,
        published_at: float = 0.0,
        *,
        offset: int | None = None,
        exact: bool = False,
        timeout: float = 60.0,
        patience: float = 3.0,
    ) -> CompleteVersion:
        """Seek, and step until the version is here. Raises BrokerUnavailable as `step` does."""
        self.seek(at_least, published_at, offset=offset, exact=exact, timeout=timeout, patience=patience)
        while True:
            found = self.step(wait=min(0.25, timeout, patience))
            if found is not None:
                return found

    def close(self) -> None:
        """Stop reading, and end the search."""
        self._search = self._newest = self._rests_since = None
        self._held.clear()
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def tire(self) -> None:
        """Stop reading if nobody has wanted a version for a while."""
        if self._rests_since is not None and self._clock.monotonic() - self._rests_since >= REST_SECONDS:
            self.close()

    def _rest(self) -> None:
        """End the search, but keep the consumer if nothing more can come to it."""
        if self._arrived.empty() and len(self._held) >= self._ahead:
            self._search = self._newest = None
            self._rests_since = self._clock.monotonic()
        else:
            self.close()

    def _goes_on(self, start: StreamPosition, elements: int) -> bool:
        """Whether a reader that rests goes on to a position that lies before it, and little in between."""
        if self._rests_since is None or not isinstance(start, int) or start < self._at:
            return False
        return (start - self._at) * encoded_size(slice_length(elements, 0), "float32") <= _PASSED_BYTES

    def _begin(self, search: _Search, start: StreamPosition, *, is_there: bool = False) -> None:
        """`is_there`: the version is said to begin there, so that nothing need be sent ahead but the version."""
        self.tire()
        elements = self._elements
        if elements is not None and self._goes_on(start, elements):
            self._rests_since = None
            self._assembly = self._new_assembly()
            self._search = search
            self._let_come(slice_count(elements))
            return
        self.close()
        self._ahead = _AHEAD
        if elements is not None:
            longest = encoded_size(slice_length(elements, 0), "float32")
            self._ahead = min(_AHEAD, max(2, _AHEAD_BYTES // max(1, longest)))
            self._ahead = min(self._ahead, slice_count(elements)) if is_there else self._ahead
        # of this search alone: what a closed subscription still delivers goes into a queue that nobody reads
        self._arrived = queue.SimpleQueue()
        self._assembly = self._new_assembly()
        self._subscription = self._broker.read_stream(
            self._stream, self._arrived.put, start=start, prefetch=self._ahead
        )
        self._search = search

    def _new_assembly(self) -> VersionAssembly:
        return VersionAssembly(
            self._encoder, self._layout_digest, elements=self._elements, counts=self._counts, shards=self._shards
        )

    def _counts(self, chunk: ParameterChunk) -> bool:
        """Whether the master has named the version of a chunk, or nothing can be said of it."""
        digest = self._named.get(chunk.version)
        if digest is not None:
            return chunk.digest == digest
        return self._search is None or self._search.at_least not in self._named

    def _let_come(self, wanted: int) -> None:
        """Ack so many that the broker may send `wanted` messages from now on, or as many as it may at most."""
        free = self._ahead - len(self._held)
        acked = [self._held.popleft() for _ in range(min(max(0, min(wanted, self._ahead) - free), len(self._held)))]
        if acked:
            self._broker.ack(*acked)

    def _take(self, search: _Search, delivery: Delivery) -> int:
        """Take a message; how many more are wanted, as far as it tells."""
        try:
            chunk = received(delivery)
            if not isinstance(chunk, ParameterChunk):
                return self._ahead
            done = self._assembly.add(chunk)
            if done is not None or self._counts(chunk):
                search.met(chunk)
        except Poison:
            return self._ahead  # a damaged version is not on the stream for this reader; the next one will be
        if done is None:
            return (search.wants(chunk.version) and self._assembly.lacks(chunk)) or self._ahead
        if delivery.offset is not None:
            self._unseen = max(int(delivery.offset) + 1, self._unseen if isinstance(self._unseen, int) else 0)
            self._highest = max(self._highest, done.version)
        newer = self._newest is None or (done.epoch, done.version) >= (self._newest.epoch, self._newest.version)
        if newer and search.wants(done.version):
            self._newest = done
        return self._ahead

    def _nothing_came(self, search: _Search) -> CompleteVersion | None:
        if (found := self._newest) is not None:
            self._rest()
            return found
        if search.timeout == float("inf"):
            if search.silent:
                self.close()  # a look
        elif not search.from_first and (search.silent or search.over):
            # the hint was wrong, or the stream has lost what it pointed at
            search.begin_again()
            self._unseen, self._highest = "first", -1
            self._begin(search, "first")
        elif search.over:
            self.close()
            raise BrokerUnavailable(
                f"version {search.at_least} of {self._encoder} did not come over the stream in {search.timeout:.0f} s"
            )
        return None
