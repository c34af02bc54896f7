"""What happens in a federation, as structured events: for machines that read the log, not for the lines on a terminal.

Each bears what it is about: node, encoder, update, version. `deploy.logging` shows them in JSON logs.
"""

from __future__ import annotations

from typing import Any

import structlog

#: The key that marks an event; taken out before anybody sees it.
MARK = "happened"

_log = structlog.get_logger()


def happened(what: str, **facts: Any) -> None:
    """Tell that something happened: `what` in a few fixed words, and the facts by name. Numbers carry their unit in the
    name (`seconds`, `bytes`) unless they are counts."""
    _log.info(what, **{MARK: True}, **facts)
