"""Reads what stands beside a body, whoever set it: what does not decode is marked, and the connection stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The driver's reader of a message's properties: the object that it fills, the bytes, and where they begin.
DecodeProperties = Callable[..., Any]

#: Characters of what was wrong, in a dead letter.
_WORDS = 200


class Unreadable(dict[str, Any]):
    """The headers of a message whose properties the driver could not read: none, and why. No publisher can forge it."""

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem


def guarded(decode: DecodeProperties) -> DecodeProperties:
    """The same reader, but properties that do not decode are `Unreadable` headers.

    RabbitMQ carries a time after the year 9999, a number that is none, kinds of values that the driver does not know,
    a table of a thousand levels. The driver fails on them, takes that for a broken connection, and gets the same
    message again after each reconnect. A frame's length is known before its content is read: what follows is in order.
    """

    def guarded_decode(properties: Any, encoded: bytes, offset: int = 0) -> Any:
        try:
            return decode(properties, encoded, offset)
        except Exception as error:  # a stranger's bytes may make the driver stumble over anything
            properties.headers = Unreadable(f"{type(error).__name__}: {error}"[:_WORDS])
            return properties

    return guarded_decode


def headers_of(properties: Any) -> tuple[dict[str, Any], str]:
    """The headers of a message, and what could not be read beside its body; empty if all could."""
    headers = properties.headers
    if isinstance(headers, Unreadable):
        return {}, f"the headers cannot be read: {headers.problem}"
    return headers or {}, ""


def words_of(short: str | bytes | None) -> str | None:
    """A short string as text. The driver gives bytes where a stranger wrote what is no UTF-8."""
    return short.decode(errors="backslashreplace") if isinstance(short, bytes) else short
