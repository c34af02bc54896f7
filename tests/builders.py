"""One way to say what is well formed: tests take it from here, and change what they are about."""

from __future__ import annotations

from collections.abc import Sequence

from common.wire.messages import UpdateChunk, UpdateManifest
from common.wire.transfer import update_chunk


def update_chunks(manifest: UpdateManifest, bodies: Sequence[bytes]) -> list[UpdateChunk]:
    """All chunks of an update."""
    return [update_chunk(manifest, index, body) for index, body in enumerate(bodies)]
