"""What the bytes of a message may hold, looked at before anything is built of them: msgpack, walked token by token.

https://github.com/msgpack/msgpack/blob/master/spec.md; msgpack's own limits are per list and table, so that nested
ones of a few megabytes still become gigabytes. Here the whole is bounded: depth, number of values, bytes of words, and
how large a number is.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from common.errors import Poison
from common.wire.topology import MAX_BODY_BYTES, MIB

#: Levels of lists and tables in a message, the message itself included.
MAX_DEPTH = 32
#: Bytes of one string.
MAX_WORD_BYTES = 64 << 10
#: Bytes of a body that may be built unlooked at: each of a thousand nested lists may claim as many values as those.
_SMALL = 2048
#: Levels of lists and tables in what is built of one; of deeper ones every token is looked at.
_FLAT = 8
#: The largest whole number that a message may carry, and its negative: exact in JSON and in a float64.
MAX_WHOLE = 1 << 53
#: The largest finite number: whatever was computed in float32 is below it, and sums of many stay finite in float64.
MAX_FLOAT = struct.unpack(">f", b"\x7f\x7f\xff\xff")[0]


@dataclass(frozen=True, slots=True)
class Limits:
    """`words`: bytes of a message beside the tensors that it carries; `values`: numbers, strings, lists and tables."""

    words: int
    values: int


#: Control messages, and chunks beside their payload.
CONTROL = Limits(words=MIB, values=150_000)
#: What a master says of a federation of thousands of nodes, to who asked it.
REPORT = Limits(words=MAX_BODY_BYTES, values=5_000_000)

#: What a value of each first byte has behind it: so many bytes, and no more values.
_REST = {
    **dict.fromkeys((*range(0x80), *range(0xE0, 0x100), 0x80, 0x90, 0xA0, 0xC0, 0xC2, 0xC3), 0),
    **{0xA0 + size: size for size in range(1, 32)},
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
}
#: Numbers that may be out of bounds.
_LARGE = {0xCA: ">f", 0xCB: ">d", 0xCF: ">Q", 0xD3: ">q"}
#: What begins with its length: how that is written, and what it is the length of.
_MEASURED = {
    0xD9: (">B", "string"),
    0xDA: (">H", "string"),
    0xDB: (">I", "string"),
    0xC4: (">B", "bytes"),
    0xC5: (">H", "bytes"),
    0xC6: (">I", "bytes"),
    0xDC: (">H", "list"),
    0xDD: (">I", "list"),
    0xDE: (">H", "table"),
    0xDF: (">I", "table"),
}
#: Values of one byte in a row, which are counted at once.
_RUN = re.compile(rb"[\x00-\x80\x90\xa0\xc0\xc2\xc3\xe0-\xff]*")


def check(body: bytes, limits: Limits = CONTROL) -> None:
    """Raises Poison for a body that is larger, deeper or longer than a message is, or holds a number beyond all use.

    Whether it is msgpack at all is left to who builds it, but for what ends in the middle.
    """
    if len(body) > MAX_BODY_BYTES:
        raise Poison("oversize", f"{len(body)} bytes, at most {MAX_BODY_BYTES} are read")
    try:
        _walk(body, limits)
    except (IndexError, struct.error):
        raise Poison("not-msgpack", "it ends in the middle") from None


def is_small(body: bytes, limits: Limits) -> bool:
    """Whether a body is so short that it may be built before it is looked at: then `is_within` says the same of what is
    built, in a fraction of the time. Nearly all messages are."""
    return len(body) <= min(_SMALL, limits.values, limits.words)


def is_within(values: Iterable[Any], depth: int = 1) -> bool:
    """Whether `check` finds nothing in a small body of which these values were built. What it cannot say at once, it
    says no to."""
    for value in values:
        kind = type(value)
        if kind is str or kind is bytes or kind is bool or value is None:
            continue
        if kind is int:
            if not -MAX_WHOLE <= value <= MAX_WHOLE:
                return False
        elif kind is float:
            if MAX_FLOAT < abs(value) < math.inf:
                return False
        elif kind is dict or kind is list:
            if depth >= _FLAT or not is_within(value.values() if kind is dict else value, depth + 1):
                return False
        else:
            return False
    return True


def _walk(body: bytes, limits: Limits) -> None:
    """Raises IndexError or struct.error where the body ends too early.

    One loop without a call for each value: a stranger decides how many there are.
    """
    at = values = payload = 0
    outer: list[int] = []  # how many values are still to come on the levels around this one
    left = 1
    while True:
        while left:
            run = _RUN.match(body, at, at + left).end() - at  # type: ignore[union-attr]  # it matches nothing, too
            at, left, values = at + run, left - run, values + run
            if values > limits.values:
                raise Poison("oversize", f"more than {limits.values} values")
            if not left:
                break
            kind = body[at]
            at, left, values = at + 1, left - 1, values + 1
            if (rest := _REST.get(kind)) is not None:
                at += rest
            elif kind in _LARGE:
                at = _number(body, at, kind)
            else:
                count, what, at = _measured(body, at, kind)
                if what == "bytes":
                    payload += count
                if what in ("bytes", "string"):
                    at += count
                else:
                    # each value takes a byte at least: nothing is longer than what is left of the body
                    if count > len(body) - at:
                        raise IndexError
                    if len(outer) >= MAX_DEPTH:
                        raise Poison("invalid", f"nested deeper than {MAX_DEPTH} levels")
                    outer.append(left)
                    left = count
            if at > len(body):
                raise IndexError
            if at - payload > limits.words:
                raise Poison("oversize", f"more than {limits.words} bytes beside what it carries")
        if not outer:
            break
        left = outer.pop()


def _number(body: bytes, at: int, kind: int) -> int:
    """Where what follows a number begins. NaN and infinity are some fields' own business: a loss may be either."""
    (number,) = struct.unpack_from(_LARGE[kind], body, at)
    if isinstance(number, int) and abs(number) > MAX_WHOLE:
        raise Poison("invalid", "a whole number beyond 2^53")
    if MAX_FLOAT < abs(number) < math.inf:
        raise Poison("invalid", "a number beyond what float32 holds")
    return at + struct.calcsize(_LARGE[kind])


def _measured(body: bytes, at: int, kind: int) -> tuple[int, str, int]:
    """The bytes, or the values, of what begins with its length; what it is; and where its content begins."""
    if kind < 0xA0:
        return (2 * (kind & 0x0F), "table", at) if kind < 0x90 else (kind & 0x0F, "list", at)
    if kind not in _MEASURED:
        if kind == 0xC1:
            raise Poison("not-msgpack", "a byte that means nothing")
        raise Poison("invalid", "a value of a kind of its own")
    form, what = _MEASURED[kind]
    (count,) = struct.unpack_from(form, body, at)
    if what == "string" and count > MAX_WORD_BYTES:
        raise Poison("oversize", f"a string of {count} bytes, at most {MAX_WORD_BYTES} are read")
    return count * (2 if what == "table" else 1), what, at + struct.calcsize(form)
