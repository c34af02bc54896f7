"""A connection that is kept open, in a thread of its own, and reopened with backoff for ever. Knows no driver.

What the driver's connections must have: `ioloop` (start, stop, close, call_later, add_callback_threadsafe), `is_open`,
`close`, and callbacks for being blocked and unblocked.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import structlog

from common.brokers.problems import Problems
from common.clock import SYSTEM
from common.errors import BrokerUnavailable, InternalError, SharedEncoderError, UserError

log = structlog.get_logger()
T = TypeVar("T")

#: The first and the longest wait between two attempts to connect, seconds.
BACKOFF_SECONDS = (0.2, 5.0)
#: How long the broker may take to answer.
ANSWER_SECONDS = 10.0
#: How often a caller that waits for an answer checks whether waiting still makes sense, seconds.
_LOOK_SECONDS = 0.5
#: A connection that was open for this long resets the wait to the shortest, and what ended the one before is over,
#: seconds.
_HELD_SECONDS = 1.0

#: Begin to connect: called with what is to be called when the connection is open, and when it is gone.
Connect = Callable[[Callable[[Any], None], Callable[[Any, BaseException], None]], Any]
#: What ended a connection as an error of ours, and whether it had been open: UserError if the broker refuses it.
Explain = Callable[[BaseException, bool], SharedEncoderError]


class Link:
    """One connection in a thread of its own: opened, kept, reopened. `on_open` runs in that thread at every opening."""

    def __init__(
        self,
        name: str,
        connect: Connect,
        failures: tuple[type[Exception], ...],
        on_open: Callable[[], None],
        problems: Problems,
        explain: Explain,
    ) -> None:
        self.generation = 0
        self.problems = problems
        self.blocked: str | None = None
        self.connection: Any = None
        self._connect = connect
        self._failures = failures
        self._on_open = on_open
        self._explain = explain
        self._name = f"the connection that has to {name}"
        self._ended: BaseException | None = None
        self.closing = threading.Event()
        self._opened = threading.Event()
        self._guard = threading.Lock()
        self._loop: Any = None
        self._open_since = 0.0
        self._short_lived = False
        self._thread = threading.Thread(target=self._run, name=f"amqp-{name}", daemon=True)

    def start(self) -> None:
        """Begin to connect. Not done by `__init__`: `on_open` needs the link where its owner keeps it."""
        self._thread.start()

    @property
    def connected(self) -> bool:
        return self._opened.is_set()

    def reopened_within(self, seconds: float) -> bool:
        """Whether the connection was lost and has been open again for no longer than this."""
        return self.generation > 1 and SYSTEM.monotonic() - self._open_since < seconds

    def post(self, action: Callable[[], None]) -> bool:
        """Run `action` in the link's thread; False if there is no connection now."""
        with self._guard:
            if self._loop is None:
                return False
            self._loop.add_callback_threadsafe(action)
            return True

    def call(self, action: Callable[[Future[T]], None], timeout: float = ANSWER_SECONDS) -> T:
        """Run `action` in the link's thread and wait for the future that it is given.

        Raises what the future does, AccessRefused if the broker lets us in no more, InternalError, BrokerUnavailable.
        """
        future: Future[T] = Future()
        deadline = SYSTEM.monotonic() + timeout
        while not self.post(lambda: self.attempt(future, lambda: action(future))):
            self.problems.check_waiting()
            left = deadline - SYSTEM.monotonic()
            if not self._opened.wait(min(max(0.0, left), _LOOK_SECONDS)) and left <= 0:
                raise BrokerUnavailable(f"the connection to the broker is away{self.why()}")
        while True:
            left = deadline - SYSTEM.monotonic()
            try:
                return future.result(min(max(0.0, left), _LOOK_SECONDS))
            except TimeoutError:
                if left <= 0:
                    raise BrokerUnavailable(f"the broker did not answer within {timeout:.0f} s{self.why()}") from None
            if not self.connected:
                self.problems.check_waiting()

    def attempt(self, future: Future[T], action: Callable[[], None]) -> None:
        """In the link's thread: run `action`. An error it raises is set on the future, so that nobody waits in vain."""
        try:
            action()
        except Exception as error:  # whatever it is, the caller waits for the future, and all others for this thread
            lost = isinstance(error, self._failures) and not self.connection.is_open
            if not future.done():
                future.set_exception(
                    BrokerUnavailable(f"the connection to the broker is away{self.why()}")
                    if lost
                    else InternalError(f"the broker was asked for what cannot be asked: {error!r}")
                )

    def after(self, future: Future[T], action: Callable[[Future[T]], None]) -> None:
        """Run `action` in the link's thread once the future is set there; what it raises opens the connection anew.

        A future itself would swallow the error, and leave a connection on which nothing more happens.
        """

        def guarded(done: Future[T]) -> None:
            try:
                action(done)
            except Exception as slip:  # handed on to the thread's own loop, whatever it is
                error = slip

                def again() -> None:
                    raise error

                self.post(again)

        future.add_done_callback(guarded)

    def why(self) -> str:
        """The present problem in brackets, to be appended to an error's text."""
        problem = self.problems.problem
        return f" ({problem})" if problem else ""

    def close(self) -> None:
        self.closing.set()
        self.post(self._close_connection)
        if threading.current_thread() is not self._thread:
            self._thread.join(10.0)

    def _close_connection(self) -> None:
        if self.connection is not None and self.connection.is_open:
            self.connection.close()

    def _run(self) -> None:
        wait = BACKOFF_SECONDS[0]
        while not self.closing.is_set():
            before, self._ended = self.generation, None
            try:
                self._serve()
            except Exception as error:
                # a failure of the connection, or a slip of the driver's or of a callback (`_tell` knows which); without
                # this thread the party would be cut off for ever
                self._ended = error
            if self.closing.is_set():
                return
            self._tell(was_open=self.generation > before)
            if self.generation > before:
                self._short_lived = SYSTEM.monotonic() - self._open_since <= _HELD_SECONDS
                wait = wait if self._short_lived else BACKOFF_SECONDS[0]
            self.closing.wait(wait * random.uniform(0.8, 1.2))
            wait = min(wait * 2, BACKOFF_SECONDS[1])

    def _tell(self, was_open: bool) -> None:
        """Say why the connection is away. Without a trace while it opens: the driver fails on whatever a stranger
        sends."""
        ended = self._ended or ConnectionError("it ended without a reason")
        error = self._explain(ended, was_open)
        slip = was_open and not isinstance(ended, (*self._failures, ConnectionError))
        self.problems.note(self._name, str(error), refusal=isinstance(error, UserError), trace=ended if slip else None)

    def _serve(self) -> None:
        """Open a connection and run its loop until it is gone."""

        def opened(connection: Any) -> None:
            connection.add_on_connection_blocked_callback(blocked)
            connection.add_on_connection_unblocked_callback(unblocked)
            self.generation += 1
            self._open_since = SYSTEM.monotonic()
            with self._guard:
                self._loop = connection.ioloop
            self._on_open()
            self._opened.set()
            if self._short_lived:  # what ended the one before may end this one too: not over before it has held
                connection.ioloop.call_later(_HELD_SECONDS, lambda: held(connection))
            else:
                held(connection)
            if self.closing.is_set():
                connection.close()

        def held(connection: Any) -> None:
            if connection.is_open:
                self.problems.over(self._name)

        def gone(connection: Any, error: BaseException) -> None:
            with self._guard:
                self._loop = None
            self._ended = error
            self._opened.clear()
            self.blocked = None
            connection.ioloop.stop()

        def blocked(connection: Any, frame: Any) -> None:
            self.blocked = str(frame.method.reason) or "resource alarm"
            log.warning("the broker takes no messages for now", reason=self.blocked)

        def unblocked(connection: Any, frame: Any) -> None:
            self.blocked = None
            log.info("the broker takes messages again")

        self.connection = self._connect(opened, gone)
        try:
            self.connection.ioloop.start()
        finally:
            with self._guard:
                self._loop = None
            self._opened.clear()
            self.blocked = None
            self.connection.ioloop.close()
