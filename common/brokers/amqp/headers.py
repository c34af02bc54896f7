"""Reads message headers, whoever set them: a value that cannot be read becomes None, and the connection stays."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

#: The driver's reader of one field of a header table: takes bytes and an offset, gives a value and the next offset.
DecodeValue = Callable[[bytes, int], tuple[Any, int]]

#: Fields of a fixed length, and those that begin with their length: bytes behind the letter that names the kind.
_FIXED = {b"T": 8, b"f": 4, b"d": 8}
_MEASURED = frozenset((b"F", b"A"))


def lenient(decode_value: DecodeValue) -> DecodeValue:
    """The same reader, but a value that Python cannot hold becomes None.

    RabbitMQ carries a time after the year 9999, a decimal that is not a number, or a table of a thousand levels. The
    driver fails on them, takes that for a broken connection, and gets the same message again after each reconnect.
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
