"""For calls from somebody's own Python code: what belongs to his process is afterwards as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch

from deploy.logging import configure_logging


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, nothing of ours is printed, because what goes wrong is raised, and torch has one thread, which is the
    fastest for small matrices and leads to the same bits; outside, both are the caller's. Not for two threads at a
    time."""
    configured, threads = structlog.get_config() if structlog.is_configured() else None, torch.get_num_threads()
    configure_logging(level="critical")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if configured is None:
            structlog.reset_defaults()
        else:
            structlog.configure(**configured)
