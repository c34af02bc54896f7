"""F1: a header that Python cannot hold must not cut off whoever receives it, again after every reconnect."""

from __future__ import annotations

import struct

import pika.data
import pytest

import common.brokers.amqp.rabbitmq  # noqa: F401  # it makes the driver's reader lenient


def table(*fields: bytes) -> bytes:
    """A header table of AMQP: a name of one letter before each value."""
    content = b"".join(b"\x01" + bytes([ord("a") + index]) + field for index, field in enumerate(fields))
    return struct.pack(">I", len(content)) + content


def nested(levels: int) -> bytes:
    inner = table()
    for _ in range(levels):
        inner = table(b"F" + inner)
    return b"F" + inner


@pytest.mark.parametrize(
    "field",
    [
        b"T" + struct.pack(">Q", 2**63),
        b"T" + struct.pack(">Q", 10**12),
        b"f" + struct.pack(">f", float("nan")),
        b"d" + struct.pack(">d", float("inf")),
    ],
    ids=["time out of range", "year 33658", "nan", "infinity"],
)
def test_f1_a_value_that_python_cannot_hold_is_none_and_the_others_are_read(field: bytes) -> None:
    encoded = table(b"S\x00\x00\x00\x02hi", field, b"A" + struct.pack(">I", len(field)) + field, b"t\x01")
    assert pika.data.decode_table(encoded, 0) == ({"a": "hi", "b": None, "c": [None], "d": True}, len(encoded))


def test_f1_a_table_of_many_levels_is_read_as_far_as_it_can_be() -> None:
    encoded = table(nested(5_000), b"t\x01")
    values, end = pika.data.decode_table(encoded, 0)
    assert values["b"] is True and end == len(encoded)


def test_what_is_no_table_is_still_an_error() -> None:
    with pytest.raises(pika.exceptions.InvalidFieldTypeException):
        pika.data.decode_table(table(b"?"), 0)
