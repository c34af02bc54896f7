"""Whose update is fetched next, and who has waited long enough for chunks that do not come. Pure, and stepped: it is
told what has come and when, in seconds of any clock.

Every node has a line of its own, and the nodes take turns, so that however much one sends, another waits for one turn
of it. Of a node one update is fetched at a time, because its chunks lie in one queue, in order. Together those that are
fetched stay within a budget of bytes, but for two, which may be fetched whatever their size.

Whose chunks do not come waits behind those whose do: once others wait for room, a fetch to which nothing came for a
while (a *stint*) ends, and its update is first in its node's line again; of all that this happened to one is fetched at
a time, so that others never wait for two of them. Chunks that had come are given back then, so a stint is twice what
chunks take on this line, and doubles each time: on a slow line too it is long enough in the end. An
update is overdue when nothing came for its whole patience while it was fetched without an end.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, TypeVar

T = TypeVar("T")

#: Updates that are fetched at the same time, at most: each is a consumer at the broker.
AT_ONCE = 8
#: Nodes whose updates may be fetched at the same time whatever their size.
ALWAYS = 2
#: The shortest stint, seconds.
STINT_SECONDS = 1.0
#: Updates of one node that wait here, and bytes of their announcements. Who keeps to its rule has far fewer.
LINE_UPDATES = 64
LINE_BYTES = 2 << 20

#: The gaps between chunks by which a stint is measured.
_GAPS = 9


@dataclass
class Waiting(Generic[T]):
    """One announced update. `update` names it, however often it is sent; `size` is that of its payload, `words` that of
    its announcement, in bytes; `patience` in seconds. `parked`: how often its stint was over."""

    item: T
    node: str
    update: tuple[str, ...]
    attempt: int
    size: int
    words: int
    patience: float
    parked: int = 0


@dataclass
class _Fetched(Generic[T]):
    """An update that is being fetched; something came last at `since`, or it was begun then."""

    waiting: Waiting[T]
    since: float


@dataclass
class _Line(Generic[T]):
    waiting: deque[Waiting[T]] = field(default_factory=deque)
    words: int = 0


class Turns(Generic[T]):
    """`put` what is announced; `turn` says whose is next, and then that one is `begun`, `answered` or `held`."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._fetched: dict[str, _Fetched[T]] = {}
        #: Nodes with something in their line of which nothing is fetched, in the order of their turns.
        self._ready: OrderedDict[str, None] = OrderedDict()
        #: Such nodes that are passed over until `release`.
        self._held: OrderedDict[str, None] = OrderedDict()
        self._gaps: deque[float] = deque([0.0], maxlen=_GAPS)
        #: Whose turn it is.
        self._next = ""
        #: The next in turn found no room.
        self._crowded = False

    # --- the line ----------------------------------------------------------------------------------------------------

    def put(self, new: Waiting[T]) -> Waiting[T] | None:
        """Something is announced. Gives what does not wait (any more): an older attempt of the same update, whose place
        the new one takes, or the new one itself, if its line is full or a newer attempt waits in it already."""
        line = self._lines.setdefault(new.node, _Line())
        for place, other in enumerate(line.waiting):
            if other.update == new.update:
                if new.attempt < other.attempt:
                    return new
                line.waiting[place], new.parked = new, other.parked
                line.words += new.words - other.words
                return other
        if len(line.waiting) >= LINE_UPDATES or line.words + new.words > max(LINE_BYTES, new.words):
            return new
        line.waiting.append(new)
        line.words += new.words
        if new.node not in self._fetched and new.node not in self._held:
            self._ready.setdefault(new.node)
        return None

    def waits(self, node: str, update: tuple[str, ...]) -> bool:
        """Whether an update waits in its node's line."""
        line = self._lines.get(node)
        return line is not None and any(each.update == update for each in line.waiting)

    def has_place(self, node: str) -> bool:
        """Whether a node's line takes one more."""
        line = self._lines.get(node)
        return line is None or (len(line.waiting) < LINE_UPDATES and line.words < LINE_BYTES)

    def is_idle(self, node: str) -> bool:
        """Whether nothing of a node waits, and nothing is fetched."""
        return node not in self._lines and node not in self._fetched

    def turn(self) -> Waiting[T] | None:
        """The update whose turn it is; None if nobody waits who could have one."""
        self._crowded = False
        slow = any(fetched.waiting.parked for fetched in self._fetched.values())
        for node in self._ready:
            waiting = self._lines[node].waiting[0]
            if not (slow and waiting.parked):
                self._next = node
                return waiting
        return None

    def has_room(self, size: int, budget: int) -> bool:
        """Whether an update of so many bytes can be fetched beside the others; if not, its node keeps its turn."""
        sizes = [fetched.waiting.size for fetched in self._fetched.values()]
        self._crowded = len(sizes) >= ALWAYS and (len(sizes) >= AT_ONCE or sum(sizes) + size > budget)
        return not self._crowded

    def begun(self, now: float) -> Waiting[T]:
        """The one whose turn it is is fetched from now on."""
        node = self._leave_turn()
        waiting = self._pop(node)
        self._fetched[node] = _Fetched(waiting, now)
        return waiting

    def answered(self) -> Waiting[T]:
        """The one whose turn it is needs no fetching: it is out of the line, and its node's turn is over."""
        node = self._leave_turn()
        waiting = self._pop(node)
        self._queue(node)
        return waiting

    def hold(self) -> None:
        """The one whose turn it is cannot be dealt with yet: its node is passed over until `release`."""
        node = self._leave_turn()
        self._held[node] = None

    def release(self) -> None:
        """Who was held has a turn again, after the others."""
        while self._held:
            self._ready[self._held.popitem(last=False)[0]] = None

    # --- what is fetched ---------------------------------------------------------------------------------------------

    def came(self, node: str, now: float) -> None:
        """A chunk of the update that is fetched of a node came, which was not there yet."""
        fetched = self._fetched[node]
        self._gaps.append(now - fetched.since)
        fetched.since = now

    def done(self, node: str) -> None:
        """What was fetched of a node is dealt with."""
        del self._fetched[node]
        self._queue(node)

    def pardon(self, seconds: float) -> None:
        """For so long nobody looked at what came: it counts as nobody's silence."""
        for fetched in self._fetched.values():
            fetched.since += seconds

    def overdue(self, now: float) -> str | None:
        """A node whose chunks have not come for their whole patience."""
        return next((node for node in self._fetched if self._left(node, now) <= 0), None)

    def park(self, now: float) -> str | None:
        """Ends the stint of a node that others wait for, if there is one: it is fetched no more, and its next turn is
        after theirs. To be called again until there is none."""
        if not self._crowded:
            return None
        for node, fetched in self._fetched.items():
            waiting = fetched.waiting
            if now - fetched.since < self._stint(waiting):
                continue
            waiting.parked += 1
            line = self._lines.setdefault(node, _Line())
            # a later attempt may have been announced meanwhile: then this one is of no use any more, but harmless
            line.waiting.appendleft(waiting)
            line.words += waiting.words
            del self._fetched[node]
            self._queue(node)
            self._crowded = False
            return node
        return None

    def seconds_left(self, now: float) -> float:
        """Until somebody may be overdue, or parked; infinite while nothing is fetched."""
        left = [self._left(node, now) for node in self._fetched]
        if self._crowded:
            left += [self._stint(each.waiting) - (now - each.since) for each in self._fetched.values()]
        return max(0.0, min(left, default=float("inf")))

    def __iter__(self) -> Iterator[Waiting[T]]:
        """All that waits or is fetched."""
        yield from (fetched.waiting for fetched in self._fetched.values())
        for line in self._lines.values():
            yield from line.waiting

    def _leave_turn(self) -> str:
        del self._ready[self._next]
        return self._next

    def _left(self, node: str, now: float) -> float:
        fetched = self._fetched[node]
        return fetched.waiting.patience - (now - fetched.since)

    def _stint(self, waiting: Waiting[T]) -> float:
        return max(STINT_SECONDS, 2 * median(self._gaps)) * float(2 ** min(waiting.parked, 16))

    def _pop(self, node: str) -> Waiting[T]:
        line = self._lines[node]
        waiting = line.waiting.popleft()
        line.words -= waiting.words
        return waiting

    def _queue(self, node: str) -> None:
        """A node's next turn is after those of the others; nothing is kept of one that has nothing waiting."""
        if self._lines[node].waiting:
            self._ready[node] = None
        else:
            del self._lines[node]
