"""What shared-encoder offers to Python code: nothing else of it is public.

    from shared_encoder import Log, attach, federation, load_encoder

A finished encoder is opened with `load_encoder` and fitted to texts with `attach`; the message log of a run is read,
proved and decided anew with `Log`; `federation` trains a small encoder in this process, for notebooks and tests. Tests
have the pytest fixture `message_log`. Whatever goes wrong is a SharedEncoderError; what its reader can mend is a
UserError, whose text is one line that says how.

Importing this loads nothing: torch and transformers come with the first call that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "shared_encoder":
    # in a checkout its folder lies within `deploy`, and under two names every class would be there twice
    raise ImportError("this package is called shared_encoder: import that")

if TYPE_CHECKING:
    from common.errors import SharedEncoderError, UserError

    from ._encoder import Encoder, attach, load_encoder
    from ._federation import Federated, federation
    from ._found import Refolded, Replayed, Row, VersionCheck
    from ._log import Log

__all__ = [
    "Encoder",
    "Federated",
    "Log",
    "Refolded",
    "Replayed",
    "Row",
    "SharedEncoderError",
    "UserError",
    "VersionCheck",
    "attach",
    "federation",
    "load_encoder",
]

#: Where each name is made. Imports of this package's own are relative, so that tools find them in a checkout too.
_MADE_IN = {
    "Encoder": "._encoder",
    "Federated": "._federation",
    "Log": "._log",
    "Refolded": "._found",
    "Replayed": "._found",
    "Row": "._found",
    "SharedEncoderError": "common.errors",
    "UserError": "common.errors",
    "VersionCheck": "._found",
    "attach": "._encoder",
    "federation": "._federation",
    "load_encoder": "._encoder",
}


def __getattr__(name: str) -> Any:
    if name not in _MADE_IN:
        raise AttributeError(f"module 'shared_encoder' has no attribute {name!r}; it has: {', '.join(__all__)}")
    found = globals()[name] = getattr(import_module(_MADE_IN[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return __all__
