"""Message headers as any member may set them: what cannot be read is None, and no reason to lose the connection."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

#: The driver's reader of one field of a header table: bytes and an offset in, a value and the offset behind it out.
DecodeValue = Callable[[bytes, int], tuple[Any, int]]

#: Fields of a fixed length, and those that begin with their length: bytes behind the letter that names the kind.
_FIXED = {b"T": 8, b"f": 4, b"d": 8}
_MEASURED = frozenset((b"F", b"A"))


def lenient(decode_value: DecodeValue) -> DecodeValue:
    """The same reader, but for values that Python cannot hold: they are None.

    A time after the year 9999, a number that is none, a table of a thousand levels: RabbitMQ carries them, and the
    driver takes its stumble for a broken connection. The message would come again after each reconnect, for ever.
    """

    def decode(encoded: bytes, offset: int) -> tuple[Any, int]:
        try:
            return decode_value(encoded, offset)
        except (OverflowError, ValueError, OSError, RecursionError):
            kind, begin = encoded[offset : offset + 1], offset + 1
            if kind in _FIXED:
                return None, begin + _FIXED[kind]
            if kind in _MEASURED:
                return None, begin + 4 + int(struct.unpack_from(">I", encoded, begin)[0])
            raise

    return decode
