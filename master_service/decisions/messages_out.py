"""What the master says of an encoder, and to whom: pure functions of its state."""

from __future__ import annotations

from dataclasses import replace

from common.wire.to_master import UpdateManifest
from common.wire.to_node import Answer, Finish, Instruction, Notice, Resend, Withdrawn
from master_service.decisions.effects import Effect, Provide, Publish, Send
from master_service.decisions.settings import Settings
from master_service.decisions.state import Buffered, EncoderState
from master_service.decisions.stopping import progress

#: After the last publication, seconds; a node looks for a version on the stream for half as long.
PUBLISH_AGAIN_SECONDS = 30.0


def instruction(encoder: EncoderState) -> Instruction:
    # not checked again: it is made for every node that joins, and a layout has hundreds of entries
    return Instruction.model_construct(
        encoder=encoder.encoder,
        encoder_type=encoder.encoder_type,
        architecture=encoder.architecture,
        layout=encoder.layout,
        layout_digest=encoder.layout_digest,
        assets=encoder.assets,
        shards=encoder.shards,
    )


def unmade(encoder: EncoderState) -> Withdrawn:
    """What nodes are told of an encoder that could not be made."""
    return Withdrawn(encoder=encoder.encoder, encoder_type=encoder.encoder_type, reason=shortened(encoder.reason))


def kicked(encoder: str, why: str) -> Withdrawn:
    """What a node is told that an operator has taken out; a release before lets go of the encoder without a word."""
    return Withdrawn(encoder=encoder, reason=why, kicked=True)


def finish(encoder: EncoderState) -> Finish:
    return Finish(
        encoder=encoder.encoder,
        encoder_type=encoder.encoder_type,
        version=encoder.version,
        digest=encoder.digest,
        published_at=0.0,
        reason=encoder.reason,
    )


def answer(encoder: EncoderState) -> Answer:
    return Answer(
        accepted=True,
        encoder=encoder.encoder,
        encoder_type=encoder.encoder_type,
        status=encoder.status,
        version=encoder.version,
        digest=encoder.digest or None,
        architecture=encoder.architecture,
        layout=encoder.layout,
        detail=encoder.reason,
        assets=encoder.assets,
        shards=encoder.shards,
    )


def shortened(words: str) -> str:
    """Words that may quote what somebody sent, cut to what a message takes."""
    return words if len(words) <= 2000 else words[:1999] + "…"


def resend(encoder: str, update: UpdateManifest | Buffered, detail: str = "", beyond: int = 0) -> Resend:
    """The request to send an update once more, as the attempt after the one that came, of an order above `beyond`;
    `detail` says why, in words."""
    return Resend(
        encoder=encoder,
        node=update.node,
        incarnation=update.incarnation,
        sequence=update.sequence,
        attempt=update.attempt + 1,
        detail=detail,
        beyond=beyond,
    )


def publish(settings: Settings, encoder: EncoderState, at: float) -> Publish:
    """The order to publish the newest version; the state knows from here on that it is."""
    encoder.published_version, encoder.published_at, encoder.has_stream = encoder.version, at, True
    return Publish(encoder.encoder, encoder.version, progress(encoder, settings.stop, at))


def publish_again(settings: Settings, encoder: EncoderState, sought: int | None, at: float) -> list[Effect]:
    """Publish the newest version once more for a node that did not find what it was told of on the stream.

    A broker that dies can lose the end of a stream that it had confirmed, or all of it with its disk. Many nodes miss
    the same version then, and one of them may lie: once in a while is enough for all.
    """
    lost = sought is not None and sought <= encoder.published_version
    if not lost or at - encoder.published_at < PUBLISH_AGAIN_SECONDS:
        return []
    return [replace(publish(settings, encoder, at), again=True)]


def provide(encoder: EncoderState, at: float) -> list[Effect]:
    """The order to write the encoder's assets to their stream, if it has any and they are not there."""
    if not encoder.assets or encoder.has_assets:
        return []
    encoder.provided_at, encoder.has_assets = at, True
    return [Provide(encoder.encoder)]


def provide_again(encoder: EncoderState, at: float) -> list[Effect]:
    """Write the assets once more for somebody who did not find them; once in a while is enough for all, as with a
    version."""
    if encoder.has_assets and at - encoder.provided_at < PUBLISH_AGAIN_SECONDS:
        return []
    encoder.has_assets = False
    return provide(encoder, at)


def notify(settings: Settings, encoder: EncoderState, nodes: list[str], at: float) -> list[Effect]:
    """Tell these of the newest version, which is published first if it was not."""
    effects: list[Effect] = [publish(settings, encoder, at)] if encoder.published_version < encoder.version else []
    notice = Notice(
        encoder=encoder.encoder,
        version=encoder.version,
        digest=encoder.digest,
        published_at=0.0,
        progress=progress(encoder, settings.stop, at),
    )
    for node in nodes:
        encoder.waiting.pop(node, None)
        effects.append(Send(node, notice))
    return effects
