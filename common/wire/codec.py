"""Messages to bytes and back. Whatever does not decode is `Poison`, with a short reason for the dead letters."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import msgpack
from pydantic import TypeAdapter, ValidationError

from common.errors import Poison
from common.wire.base import SCHEMA_VERSION, Message
from common.wire.bounds import CONTROL, Limits, check, is_small, is_within
from common.wire.broker import Delivery
from common.wire.fields import DOOR
from common.wire.messages import AnyMessage

M = TypeVar("M", bound=Message)
_ADAPTER: TypeAdapter[Message] = TypeAdapter(AnyMessage)
#: Characters of a stranger's value in a line of ours.
_WORDS = 80


def encode(message: Message) -> bytes:
    """The msgpack body of a message."""
    body: bytes = msgpack.packb(message.model_dump(mode="python"), use_bin_type=True)
    return body


@overload
def received(delivery: Delivery, limits: Limits = ...) -> Message: ...
@overload
def received(delivery: Delivery, limits: Limits = ..., *, adapter: TypeAdapter[M]) -> M: ...
def received(delivery: Delivery, limits: Limits = CONTROL, *, adapter: TypeAdapter[Any] = _ADAPTER) -> Any:
    """The message of a delivery. Raises Poison, also where only what stands beside the body cannot be read. `adapter`:
    of other messages than those of nodes and the master."""
    if delivery.unreadable:
        raise Poison("headers", delivery.unreadable)
    return decode(delivery.body, limits, adapter)


def decode(body: bytes, limits: Limits = CONTROL, adapter: TypeAdapter[Any] = _ADAPTER) -> Any:
    """The message of a body; what it may hold is bounded before anything is built of it. Raises Poison."""
    plain = _unpack(body, limits)
    version = plain.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        detail = f"this program reads schema version {SCHEMA_VERSION}, the message has {shown(version)}"
        raise Poison("schema-version", detail)
    try:
        return adapter.validate_python(plain, context=DOOR)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
            raise Poison("unknown-kind", f"no message kind {shown(plain.get('kind'))}") from None
        where = ".".join(str(part)[:_WORDS] for part in first["loc"][:8])
        raise Poison("invalid", f"{where}: {first['msg'][:_WORDS]}") from None


def shown(value: object) -> str:
    """A stranger's value in words: never the whole of it, whatever it is."""
    if isinstance(value, str | bytes):
        return repr(value[:_WORDS]) + ("…" if len(value) > _WORDS else "")
    if value is None or isinstance(value, int | float):
        return repr(value)[:_WORDS]
    return f"a {type(value).__name__}"


def _unpack(body: bytes, limits: Limits) -> dict[str, Any]:
    if is_small(body, limits):
        # whatever it claims takes little: built first, and looked at as a whole. What is wrong with it is said below
        try:
            plain = msgpack.unpackb(body, raw=False, strict_map_key=True)
        except (ValueError, msgpack.exceptions.UnpackException, RecursionError):
            plain = None
        if isinstance(plain, dict) and is_within(plain.values()):
            return plain
    check(body, limits)
    try:
        plain = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise Poison("not-msgpack", str(error)[:200] or type(error).__name__) from None
    if not isinstance(plain, dict):
        raise Poison("not-msgpack", f"a map was expected, a {type(plain).__name__} came")
    return plain
