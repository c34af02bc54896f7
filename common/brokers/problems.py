"""What does not work right now: warned of once, shown in the status, and given up after a while of refusals.

One for each party's connection, whatever the broker. What is away is waited for, for ever; what is refused is tried
again for `patience` seconds, because permissions may be on their way, and then the party is told that it is final.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import structlog

from common.clock import SYSTEM, Clock
from common.errors import AccessRefused, InternalError

log = structlog.get_logger()

#: Refusals that are further apart are not one refusal that lasts: in between there was no broker to ask. Seconds.
_APART_SECONDS = 15.0
#: A problem that was over for less than this is the same one, and not warned of again in the same words. Seconds.
_SAME_SECONDS = 60.0
#: Of each problem so many different wordings are warned of: a broker that numbers its refusals must not fill the log.
_WORDINGS = 20


@dataclass
class _Problem:
    """One thing that does not work. Times are of the monotonic clock, in seconds.

    `since`: when the present row of refusals began; None if it is no refusal. `told`: a warning of it was written.
    """

    words: str = ""
    begun: float = 0.0
    last: float = 0.0
    since: float | None = None
    final: bool = False
    told: bool = False
    said: set[str] = field(default_factory=set)


class Problems:
    """What hinders one party, by what it concerns ("queue x", "lock y"). May be used from any thread."""

    def __init__(self, patience: float, clock: Clock = SYSTEM) -> None:
        """`patience`: seconds of refusals in a row after which waiting will not help."""
        self._patience = patience
        self._clock = clock
        self._guard = threading.Lock()
        self._now: dict[str, _Problem] = {}
        self._over: dict[str, _Problem] = {}
        self._failed = ""
        self._alone: set[str] = set()

    def note(
        self, what: str, words: str, *, refusal: bool = False, quiet: float = 0.0, trace: BaseException | None = None
    ) -> None:
        """`what` did not work. Warned of in the broker's own words, once for each wording.

        `refusal`: the broker knows what is wanted and says no. `quiet`: seconds that it may last without a warning,
        for what often comes right by itself. `trace`: an error whose stack the log is to have.
        """
        with self._guard:
            now = self._clock.monotonic()
            problem = self._now.get(what)
            if problem is None:
                problem = _Problem(begun=now)
                if (past := self._over.pop(what, None)) is not None and now - past.last < _SAME_SECONDS:
                    problem.said = past.said
                self._now[what] = problem
            if not refusal:
                problem.since, problem.final = None, False
            else:
                if problem.since is None or now - problem.last > _APART_SECONDS:
                    problem.since = now
                problem.final = now - problem.since >= self._patience
            problem.words, problem.last = words, now
            known = any(words in each.said for each in self._now.values())  # by this, or by another for the same reason
            warn = now - problem.begun >= quiet and not known and len(problem.said) < _WORDINGS
            if warn:
                problem.said.add(words)
                problem.told = True
        if warn:
            log.warning("refused by the broker" if refusal else "not working", what=what, problem=words, exc_info=trace)

    def tell(self, what: str, words: str) -> None:
        """A refusal that is its caller's alone: warned of once for each wording, and nothing that lasts."""
        with self._guard:
            known = words in self._alone or len(self._alone) >= _WORDINGS
            self._alone.add(words)
        if not known:
            log.warning("refused by the broker", what=what, problem=words)

    def over(self, what: str) -> None:
        """`what` works again, or is no longer wanted."""
        if what not in self._now:
            return
        with self._guard:
            problem = self._now.pop(what, None)
            if problem is None:
                return
            problem.last = self._clock.monotonic()
            self._over[what] = problem
        if problem.told:
            log.info("no longer a problem", what=what)

    def fail(self, what: str, error: BaseException) -> None:
        """A bug in this program has ended `what`: the log gets the trace, and the party must end."""
        text = f"{what} failed unexpectedly, which is a bug: {error!r}"
        log.error(text, exc_info=error)
        with self._guard:
            self._failed = self._failed or text

    @property
    def exist(self) -> bool:
        """Whether something does not work, or a bug has ended something."""
        return bool(self._now or self._failed)

    @property
    def problem(self) -> str:
        """All that does not work, in the broker's words; empty when all is well."""
        with self._guard:
            words = [each.words for each in self._now.values()]
            return "; ".join(dict.fromkeys([self._failed, *words] if self._failed else words))

    @property
    def refused(self) -> str:
        """What has been refused for so long that waiting will not help; empty as long as it may."""
        with self._guard:
            return "; ".join(dict.fromkeys(each.words for each in self._now.values() if each.final))

    @property
    def failed(self) -> str:
        """What a bug has ended; stays."""
        with self._guard:
            return self._failed

    def check(self) -> None:
        """Raises InternalError after a bug: whoever goes on to publish would believe that it still hears."""
        if failed := self._failed:
            raise InternalError(failed)

    def check_waiting(self) -> None:
        """For who waits for a connection: raises InternalError, or AccessRefused if waiting will not help."""
        self.check()
        if refused := self.refused:
            raise AccessRefused(refused)
