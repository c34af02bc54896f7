"""Logging with structlog, always to stderr: plain lines for people, JSON lines for machines."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from common.events import MARK, no_events


def configure_logging(*, json: bool = False, level: str = "info") -> None:
    """Set up structlog for this process. `level`: debug, info, warning, error or critical.

    What happens in the federation (`common.events`) stands in JSON logs, and in plain ones at level debug.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            _all_events if json or level.lower() == "debug" else no_events,  # people see what needs them
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
