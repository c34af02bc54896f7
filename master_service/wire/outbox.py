"""What waits to leave the master, in the order in which it was decided. Filled by the thread that decides, emptied by
whoever calls `flush`, which may be a thread of its own: then nobody decides later for want of a confirm.

Messages that follow each other leave together, with one confirm for all of them; a message is encoded as it leaves,
because what it says of a stream is known only once the version before it is there. A mark says how far the log's
effects have left.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.wire.broker import Publication

#: Messages that leave together, at most.
_TOGETHER = 256
#: Who decides waits while so much is to leave: a broker that takes nothing must not fill the memory.
MOST_WAITING = 20_000

#: A message, made as it leaves.
Letter = Callable[[], Publication]


@dataclass(frozen=True, slots=True)
class _Action:
    """Anything else that is done at the broker. `large`: it holds a version or an asset meanwhile."""

    act: Callable[[], None]
    large: bool


@dataclass(frozen=True, slots=True)
class _Mark:
    offset: int


class Outbox:
    """`publish` sends messages that are one batch.

    Alone, whatever is put leaves at once, in the thread that puts it. Once there is a thread that calls `serve`
    (`beside`), it waits for that.
    """

    def __init__(self, publish: Callable[[Sequence[Publication]], None]) -> None:
        #: What follows from the log's rows up to this one has left; -1 as long as nothing was marked.
        self.left = -1
        self._publish = publish
        self._items: deque[Letter | _Action | _Mark] = deque()
        self._changed = threading.Condition()
        self._beside = False
        self._busy = self._closing = False
        self._large = 0
        self._failure: BaseException | None = None

    @property
    def waiting(self) -> int:
        """How many things are to leave."""
        return len(self._items)

    def letter(self, made: Letter) -> None:
        """A message is to leave."""
        self._put(made)

    def action(self, act: Callable[[], None], *, large: bool = False) -> None:
        """Something is to be done after what was put before, and before what is put later. Of large ones two wait, the
        one that is leaving included."""
        self._put(_Action(act, large))

    def mark(self, offset: int) -> None:
        """All effects of the log's rows up to this one were put."""
        if self._beside or self._items:
            self._put(_Mark(offset))
        else:
            self.left = offset  # they have left

    def beside(self) -> None:
        """From now on another thread serves."""
        self._beside = True

    def serve(self) -> None:
        """Send what is put, until `close`. Raises what makes it impossible; whoever puts or drains gets the same."""
        try:
            while True:
                with self._changed:
                    while not self._items and not self._closing:
                        self._changed.wait()
                    if not self._items:
                        return
                self.flush()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            raise

    def close(self) -> None:
        """Nothing more is sent: what was to leave leaves at the next start."""
        with self._changed:
            self._closing = True
            self._items.clear()
            self._changed.notify_all()

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all has left, so long at most; whether it has. Raises what ended the thread that serves."""
        if not self._beside:
            self.flush()
            return True
        with self._changed:
            left = self._changed.wait_for(lambda: self._failure or not (self._items or self._busy), seconds)
            self._check()
        return bool(left)

    def flush(self) -> None:
        """Send all that is here, in this thread."""
        while True:
            with self._changed:
                items = self._next()
                self._busy = bool(items)
            if not items:
                return
            letters = [item() for item in items if not isinstance(item, _Action | _Mark)]
            if letters:
                self._publish(letters)
            for item in items:
                if isinstance(item, _Action):
                    item.act()
                elif isinstance(item, _Mark):
                    self.left = item.offset
            with self._changed:
                self._large -= sum(isinstance(item, _Action) and item.large for item in items)
                self._busy = False
                self._changed.notify_all()
                if not self._items:
                    return

    def _next(self) -> list[Letter | _Action | _Mark]:
        """What leaves next: messages that follow each other, with the marks between and behind them; or an action."""
        taken: list[Letter | _Action | _Mark] = []
        while self._items and len(taken) < _TOGETHER:
            if isinstance(self._items[0], _Action):
                return taken or [self._items.popleft()]
            taken.append(self._items.popleft())
        return taken

    def _put(self, item: Letter | _Action | _Mark) -> None:
        large = isinstance(item, _Action) and item.large
        with self._changed:
            while self._beside and (len(self._items) >= MOST_WAITING or (large and self._large > 1)):
                self._check()
                self._changed.wait()
            self._check()
            self._large += large
            self._items.append(item)
            self._changed.notify_all()
        if not self._beside:
            self.flush()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
