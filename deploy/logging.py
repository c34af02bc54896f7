"""Logging with structlog, always to stderr: plain lines for people, JSON lines for machines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import structlog

from common.events import MARK, no_events
from deploy.log_file import LogFile

#: Characters of an error that are remembered.
_WORDS = 200


class Noticed:
    """Counts the lines that are warnings and errors, and remembers the last error: its fixed words, because the rest of
    a line may be for this machine alone. `error_at`: seconds since 1970; None before there was one."""

    def __init__(self) -> None:
        self.lines = {"warning": 0, "error": 0}
        self.error = ""
        self.error_at: float | None = None

    def __call__(self, logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A processor of structlog, which leaves the line as it is."""
        level = "error" if method in ("error", "critical", "exception") else method
        if level in self.lines:
            self.lines[level] += 1
        if level == "error":
            self.error, self.error_at = str(line.get("event", ""))[:_WORDS], time.time()
        return line


def configure_logging(
    *, json: bool = False, level: str = "info", noticed: Noticed | None = None, file: LogFile | None = None
) -> None:
    """Set up structlog for this process. `level`: debug, info, warning, error or critical. `noticed` sees every line;
    `file` gets them all, events included.

    What happens in the federation (`common.events`) stands in JSON logs, and in plain ones at level debug.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            *([file] if file is not None else []),
            _all_events if json or level.lower() == "debug" else no_events,  # people see what needs them
            *([noticed] if noticed is not None else []),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if json else "%H:%M:%S", utc=json),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # looked up for every line: while a live display draws, rich puts a stand-in there that prints above it
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _all_events(logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Events are lines like others: the mark goes."""
    line.pop(MARK, None)
    return line
