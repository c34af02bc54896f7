"""What the master says of an encoder: pure functions of its state."""

from __future__ import annotations

from common.messages import Answer, Finish, Instruction
from master_service.state import EncoderState


def instruction(encoder: EncoderState) -> Instruction:
    return Instruction(
        encoder=encoder.encoder,
        encoder_type=encoder.encoder_type,
        architecture=encoder.architecture,
        layout=encoder.layout,
        layout_digest=encoder.layout_digest,
    )


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
    )
