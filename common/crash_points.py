"""The labelled steps of handling: moments at which a process may die, and must leave nothing lost or doubled."""

from __future__ import annotations

import sys

#: The name of the audit event; its one argument is the label.
EVENT = "shared_encoder.step"


def reached(label: str) -> None:
    """Say that a labelled step is reached, as an audit event (`sys.audit`): costs nothing while nobody listens.

    `tests/faults` listens, and kills the process there.
    """
    sys.audit(EVENT, label)
