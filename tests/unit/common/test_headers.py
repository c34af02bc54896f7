"""F1: what stands beside a body and cannot be read must not cut off whoever gets it, after every reconnect."""

from __future__ import annotations

import struct

import pika.spec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common.brokers.amqp.rabbitmq  # noqa: F401  # it guards the driver's reader
from common.brokers.amqp.headers import headers_of
from tests.builders import ODD_FIELDS, header_table


def read(table: bytes, behind: bytes = b"") -> tuple[dict[str, object], str]:
    """What comes of properties that are a header table, and `behind` it a message id."""
    flags = pika.BasicProperties.FLAG_HEADERS | (pika.BasicProperties.FLAG_MESSAGE_ID if behind else 0)
    properties = pika.BasicProperties()
    properties.decode(struct.pack(">H", flags) + table + behind)
    return headers_of(properties)


@pytest.mark.parametrize("field", ODD_FIELDS.values(), ids=ODD_FIELDS.keys())
def test_f1_what_the_driver_cannot_read_is_no_headers_and_a_reason(field: bytes) -> None:
    headers, problem = read(header_table(b"S\x00\x00\x00\x02hi", field), b"\x02id")
    assert headers == {} and problem.startswith("the headers cannot be read: ") and len(problem) < 300


def test_what_can_be_read_is_read_and_nobody_can_forge_the_mark() -> None:
    headers, problem = read(header_table(b"S\x00\x00\x00\x02hi", b"t\x01", b"F" + header_table()), b"\x02id")
    assert (headers, problem) == ({"a": "hi", "b": True, "c": {}}, "")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_f1_no_bytes_make_the_reader_raise(noise: bytes) -> None:
    headers, problem = read(noise)
    assert isinstance(headers, dict) and (problem == "" or not headers)
