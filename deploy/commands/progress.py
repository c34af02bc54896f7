"""How far something long has come: a bar on a terminal, a line every few seconds elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.1
_LINE_SECONDS = 5.0


@dataclass
class Counted:
    """What was counted, and how long it took."""

    done: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Per second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


@contextmanager
def counting(what: str, unit: str, total: int) -> Iterator[tuple[Counted, Callable[[], None]]]:
    """Gives the count and a function that adds one to it, which is cheap to call often."""
    screen, counted = Console(stderr=True), Counted()
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} " + unit + "/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal, auto_refresh=False) as bar:
        task = bar.add_task(what, total=total, rate=0.0)
        every = _REFRESH_SECONDS if screen.is_terminal else _LINE_SECONDS
        due = started + every

        def advance() -> None:
            nonlocal due
            counted.done += 1
            now = time.monotonic()
            if now < due:
                return
            due, counted.seconds = now + every, now - started
            if screen.is_terminal:
                bar.update(task, completed=counted.done, rate=counted.rate)
                bar.refresh()
            else:
                line = f"{what}: {counted.done:,} of {total:,} {unit}, {counted.rate:,.0f} {unit}/s"
                print(line, file=sys.stderr, flush=True)

        try:
            yield counted, advance
        finally:
            counted.seconds = time.monotonic() - started
            bar.update(task, completed=counted.done, rate=counted.rate)
