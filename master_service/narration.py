"""What an entry of the log and its effects say to whoever follows the events: pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from common.wire.base import update_id
from common.wire.to_master import (
    Admit,
    Change,
    Get,
    InstructionAck,
    Join,
    Kick,
    Leave,
    Pause,
    Resume,
    Stop,
    UpdateManifest,
    Words,
)
from common.wire.to_node import Receipt
from master_service.decisions.effects import Conclude, DeleteStream, Effect, Provide, Publish, Send
from master_service.decisions.records import Entry, Gathering, Generated, GenerationFailed, Presence, Started, Versioned

#: A few fixed words, and the facts by name.
Event = tuple[str, dict[str, Any]]


def events(entry: Entry, effects: Sequence[Effect]) -> Iterator[Event]:
    """The event of an entry, if it is one, and those of what it led to, in order."""
    body = entry.body
    if entry.skipped:
        return
    match body:
        case Join():
            yield "node joined", {"node": body.node, "types": body.types}
        case InstructionAck():
            what = "instruction accepted" if body.accepted else "instruction refused"
            facts: dict[str, Any] = {"samples": body.samples} if body.accepted else {"reason": body.reason}
            yield what, {"node": body.node, "encoder": body.encoder, **facts}
        case Leave():
            yield "node left", {"node": body.node}
        case Presence():
            yield "node returned" if body.present else "node vanished", {"node": body.node}
        case Get():
            yield "encoder requested", {"sender": body.sender, "type": body.encoder_type}
        case Stop():
            yield "stop requested", {"sender": body.sender, "encoder": body.encoder}
        case Change():
            facts = {"changes": body.changes} | ({"back": body.back} if body.back else {})
            yield "settings changed", {"sender": body.sender, "node": body.member, **facts}
        case Kick():
            yield "node kicked", {"sender": body.sender, "node": body.member, "reason": body.reason}
        case Admit():
            yield "node admitted", {"sender": body.sender, "node": body.member}
        case Pause() | Resume():
            what = "training paused" if isinstance(body, Pause) else "training resumed"
            yield what, {"sender": body.sender, "encoder": body.encoder}
        case Started():
            yield "master started", {"epoch": body.epoch}
        case Gathering():
            yield "words wanted", {"encoder": body.encoder}
        case Words():
            yield "words contributed", {"node": body.node, "encoder": body.encoder, "words": len(body.words)}
        case Generated():
            yield "encoder generated", {"encoder": body.encoder, "version": 0}
        case GenerationFailed():
            yield "encoder not generated", {"encoder": body.encoder, "reason": body.reason}
        case UpdateManifest():
            yield (
                "update received",
                _update(body)
                | {
                    "version": body.base_version,
                    "steps": body.steps,
                    "bytes": body.size,
                    "loss": body.loss,
                },
            )
        case Versioned():
            yield "version made", {"encoder": body.encoder, "version": body.version, "digest": body.digest}
    for effect in effects:
        match effect:
            case Send(message=Receipt() as receipt) if receipt.accepted:
                facts = {"version": receipt.version, "weight": receipt.weight, "staleness": receipt.staleness}
                yield "update counted", _update(receipt) | facts
            case Send(message=Receipt() as receipt):
                facts = {"version": receipt.version, "reason": receipt.reason, "detail": receipt.detail}
                yield "update refused", _update(receipt) | facts
            case Publish():
                yield "version published", {"encoder": effect.encoder, "version": effect.version}
            case Provide():
                yield "assets published", {"encoder": effect.encoder}
            case Conclude():
                yield "training ended", {"encoder": effect.encoder, "version": effect.version}
            case DeleteStream():
                yield "stream deleted", {"encoder": effect.encoder}


def _update(message: UpdateManifest | Receipt) -> dict[str, Any]:
    return {"node": message.node, "encoder": message.encoder, "update": update_id(message)}
