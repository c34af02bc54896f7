"""How fast a state directory grows, and how long the disk lasts: pure, over what was measured."""

from __future__ import annotations

from collections.abc import Sequence

SECONDS_A_DAY = 86_400.0
#: What is measured counts for so long, seconds.
WINDOW_SECONDS = 6 * 3600.0

#: (seconds of any one clock, bytes), the oldest first.
Measured = tuple[float, int]


def within(samples: Sequence[Measured], window: float = WINDOW_SECONDS) -> list[Measured]:
    """Those of the last so many seconds before the newest."""
    return [sample for sample in samples if sample[0] >= samples[-1][0] - window]


def bytes_a_day(samples: Sequence[Measured]) -> float | None:
    """The slope of the line that fits best (least squares): payloads that are dropped now and then make a saw of it.
    None for fewer than two moments."""
    if len(samples) < 2 or samples[0][0] == samples[-1][0]:
        return None
    count = len(samples)
    middle, mean = sum(at for at, _ in samples) / count, sum(size for _, size in samples) / count
    spread = sum((at - middle) ** 2 for at, _ in samples)
    return SECONDS_A_DAY * sum((at - middle) * (size - mean) for at, size in samples) / spread


def seconds_left(free: int, needed: int, growth: float | None) -> float | None:
    """Until no more than `needed` bytes are free, at a growth in bytes a day; infinite if it does not grow, 0 if it is
    so already, None if the growth is not known."""
    if free <= needed:
        return 0.0
    if growth is None:
        return None
    return float("inf") if growth <= 0 else (free - needed) / growth * SECONDS_A_DAY
