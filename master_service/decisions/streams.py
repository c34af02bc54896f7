"""The end of an encoder's streams: they are deleted once everybody who needs the last version has read it.

Nodes say when they have the last version (`Finished`); observers do not, so for them the stream is kept for an hour.
For whoever comes later the last version is published again, over a new stream with a new hour; the assets too.
"""

from __future__ import annotations

from common.wire.to_master import Finished
from master_service.decisions.effects import DeleteStream, Effect, Send
from master_service.decisions.messages_out import PUBLISH_AGAIN_SECONDS, finish, publish, publish_again
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState, State

#: Seconds after the last publication for which a stream is kept for those who do not say that they have read it.
STREAM_SECONDS = 3600.0


def ended(encoder: EncoderState) -> None:
    """The training has ended: its active nodes read the last version. If there are none, observers may."""
    encoder.readers = dict.fromkeys(encoder.active()) if encoder.started else {}
    encoder.observed = not encoder.readers


def last_version(
    settings: Settings, encoder: EncoderState, node: str, at: float, sought: int | None = None
) -> list[Effect]:
    """Tell a node of the end of a finished encoder, whose last version is published (again) if the stream lacks it.

    `sought`: the version that the node did not find on the stream; None if it has not looked.
    """
    if node in encoder.members:
        encoder.readers[node] = None
    else:
        encoder.observed = True
    again = publish_again(settings, encoder, sought, at) if encoder.has_stream else [publish(settings, encoder, at)]
    return [*again, Send(node, finish(encoder))]


def finished(state: State, body: Finished, at: float) -> list[Effect]:
    """A node has read the last version."""
    encoder = state.encoders.get(body.encoder)
    if encoder is None or body.version < encoder.version:
        return []
    return gone(encoder, body.node, at)


def gone(encoder: EncoderState, node: str, at: float) -> list[Effect]:
    """A node reads no more of the stream: it has the last version, or it has gone."""
    encoder.readers.pop(node, None)
    return release(encoder, at)


def release(encoder: EncoderState, at: float) -> list[Effect]:
    """Delete the stream if it is time."""
    due = release_at(encoder)
    if due is None or at < due:
        return []
    assets = encoder.has_assets
    encoder.has_stream, encoder.has_assets, encoder.observed, encoder.readers = False, False, False, {}
    return [DeleteStream(encoder.encoder, assets)]


def release_at(encoder: EncoderState) -> float | None:
    """When the streams of a finished encoder are to be deleted, in `at` seconds; None if it has none.

    Not sooner after a publication than it may be published again: however nodes come, ask and go, the last version is
    not written more often than that.
    """
    if encoder.status != "finished" or not (encoder.has_stream or encoder.has_assets):
        return None
    awaited = encoder.readers or encoder.observed
    written_at = max(encoder.published_at, encoder.provided_at)
    return written_at + (STREAM_SECONDS if awaited else PUBLISH_AGAIN_SECONDS)
