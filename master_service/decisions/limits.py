"""What a request for an encoder may cost, before it is a row: pure functions of the state. Who is refused is told why;
nothing else happens."""

from __future__ import annotations

import json
from collections.abc import Collection

from common.wire.to_master import Continue, Get
from master_service.decisions.requests import alike
from master_service.decisions.state import State

#: Bytes of a requested architecture, as JSON.
MAX_ARCHITECTURE_BYTES = 64 << 10
#: Failed encoders that are remembered.
KEPT_FAILED = 16


def refused(state: State, request: Get | Continue, *, types: Collection[str], most: int) -> str:
    """Why a request is not even noted; empty if it is. `types`: the encoder types that can be made here; `most`: how
    many encoders may be made or trained at the same time."""
    if isinstance(request, Get):
        if request.encoder_type not in types and all(
            each.encoder_type != request.encoder_type for each in state.encoders.values()
        ):
            return f"no encoder type {request.encoder_type} here; there are: {', '.join(sorted(types))}"
        size = len(json.dumps(request.architecture))
        if size > MAX_ARCHITECTURE_BYTES:
            return f"an architecture of {size} bytes, at most {MAX_ARCHITECTURE_BYTES} are read"
    busy = sum(each.status not in ("finished", "failed") for each in state.encoders.values())
    if busy >= most and _begins(state, request):
        return f"{busy} encoders are being made or trained, which is all that may be at a time; ask later, or stop one"
    return ""


def _begins(state: State, request: Get | Continue) -> bool:
    """Whether a request would begin something, where nothing hinders it."""
    if isinstance(request, Continue):
        encoder = state.encoders.get(request.encoder)
        return encoder is not None and encoder.status == "finished"
    same = alike(state, request)
    return all(each.status == "finished" for each in same) and (request.fresh or not same)
