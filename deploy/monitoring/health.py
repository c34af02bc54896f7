"""Alive, and ready: pure functions of what a service is seen as."""

from __future__ import annotations

from dataclasses import dataclass

from common.wire.broker import BrokerStatus

#: A loop that has not come round for so long hangs, unless one of its turns has taken a tenth of that before: a step of
#: a large model, the measurement of a version and an export may take minutes. Seconds, and times.
HUNG_SECONDS, HUNG_TURNS = 600.0, 10.0

#: By part: "ok", or what is wrong in words.
Parts = dict[str, str]
OK = "ok"


@dataclass(frozen=True, slots=True)
class Heart:
    """How the loop of the thread that decides has turned. `beat_at`: when it last did, by a monotonic clock; None
    before the first time. `longest`: the longest time that one turn has taken, seconds."""

    beat_at: float | None = None
    longest: float = 0.0

    def beaten(self, now: float) -> Heart:
        """The loop has come round."""
        turn = 0.0 if self.beat_at is None else now - self.beat_at
        return Heart(now, max(self.longest, turn))


def hung(heart: Heart, now: float, broker: BrokerStatus | None, missing: str = "") -> str:
    """Why a process is to be killed; empty if it is not. `missing`: the aggregators that it waits for.

    Who has not begun to serve is alive: it waits for a broker, reads a long log or a large corpus, and each of these
    ends by itself or is mended elsewhere. So is one whose broker is away or blocked, or whose aggregators are: there is
    nothing that a restart would mend.
    """
    if heart.beat_at is None or missing or (broker is not None and (broker.blocked or not broker.connected)):
        return ""
    # a turn may have waited for hours for a broker that took nothing, which says nothing of the next
    longest = min(heart.longest, HUNG_SECONDS)
    silent, most = now - heart.beat_at, max(HUNG_SECONDS, HUNG_TURNS * longest)
    return f"the loop has not come round for {silent:.0f} s, at most {most:.0f} s are usual" if silent > most else ""


def broker_part(status: BrokerStatus | None, waiting: str) -> str:
    """The connection to the broker. `waiting`: why there is none yet."""
    if status is None:
        return f"waiting for it: {waiting}" if waiting else "not connected yet"
    if status.blocked:
        return f"blocked: {status.blocked}"
    if not status.connected:
        return f"away: {status.problem}" if status.problem else "away"
    return status.problem or OK


def lock_part(status: BrokerStatus | None, has_lock: bool) -> str:
    """The name at the broker, which one process has."""
    if not has_lock:
        return "not taken yet"
    return OK if status is not None and status.connected else "not known while the broker is away"


def disk_part(free: int | None, needed: int, short: bool = False, held: int = 0) -> str:
    """The disk of the state directory. `free`: None if it cannot be read; `held`: what waits for room."""
    if free is None:
        return "the state directory cannot be read"
    if short or free < needed:
        return f"{free} bytes are free, {needed} are wanted"
    return f"{held} orders wait for room" if held else OK


def log_part(serving: bool, missing: str, blocked: str) -> str:
    """The message log: read, and can be written. `missing`: the aggregators without which nothing goes on."""
    if missing:
        return f"waiting for {missing}"
    return (blocked or OK) if serving else "not read yet"
