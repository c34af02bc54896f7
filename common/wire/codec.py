"""Messages to bytes and back. Whatever does not decode is `Poison`, with a short reason for the dead letters."""

from __future__ import annotations

from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from common.errors import Poison
from common.wire.broker import Delivery
from common.wire.messages import SCHEMA_VERSION, AnyMessage, Message
from common.wire.topology import MAX_BODY_BYTES

_ADAPTER: TypeAdapter[Message] = TypeAdapter(AnyMessage)


def encode(message: Message) -> bytes:
    """The msgpack body of a message."""
    body: bytes = msgpack.packb(message.model_dump(mode="python"), use_bin_type=True)
    return body


def received(delivery: Delivery) -> Message:
    """The message of a delivery. Raises Poison, also where only what stands beside the body cannot be read."""
    if delivery.unreadable:
        raise Poison("headers", delivery.unreadable)
    return decode(delivery.body)


def decode(body: bytes) -> Message:
    """The message of a body; sizes are bounded before anything is allocated. Raises Poison."""
    plain = _unpack(body)
    version = plain.get("schema_version")
    if version != SCHEMA_VERSION:
        detail = f"this program reads schema version {SCHEMA_VERSION}, the message has {version!r}"
        raise Poison("schema-version", detail[:200])
    try:
        return _ADAPTER.validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
            raise Poison("unknown-kind", f"no message kind {plain.get('kind')!r}"[:200]) from None
        where = ".".join(str(part) for part in first["loc"])
        raise Poison("invalid", f"{where}: {first['msg']}") from None


def _unpack(body: bytes) -> dict[str, Any]:
    if len(body) > MAX_BODY_BYTES:
        raise Poison("oversize", f"{len(body)} bytes, at most {MAX_BODY_BYTES} are read")
    try:
        # msgpack bounds every length by the buffer's own size, so no header can claim more than was sent
        plain = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise Poison("not-msgpack", str(error)[:200] or type(error).__name__) from None
    if not isinstance(plain, dict):
        raise Poison("not-msgpack", f"a map was expected, a {type(plain).__name__} came")
    return plain
