"""Messages to bytes and back; nothing but Poison may come out of bytes that are not a message."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from typing import get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Poison
from common.numbers.slicing import EncodingName
from common.wire.base import Message
from common.wire.bounds import CONTROL, MAX_DEPTH, MAX_FLOAT, MAX_WHOLE, REPORT, check, is_small, is_within
from common.wire.codec import decode, encode
from common.wire.fields import MAX_ASSET_BYTES
from common.wire.messages import ToMaster, ToNode
from common.wire.to_master import Alive, Join
from common.wire.to_node import StatusReport
from common.wire.topology import MAX_BODY_BYTES

KINDS = [*get_args(ToMaster), *get_args(ToNode)]
ID = st.from_regex(r"[a-z][a-z0-9-]{0,10}", fullmatch=True)
DIGEST = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
NAME = st.from_regex(r"[a-z][a-z0-9._-]{0,10}", fullmatch=True)
SIZE = st.integers(0, MAX_ASSET_BYTES)
LAYOUT = st.lists(st.tuples(st.text(max_size=8), st.lists(st.integers(0, 9), max_size=3)), max_size=3)
BY_NAME = {
    "node": ID,
    "incarnation": ID,
    "encoder": ID,
    "encoder_type": ID,
    "sender": ID,
    "digest": DIGEST,
    "layout_digest": DIGEST,
    "layout": LAYOUT,
    "types": st.lists(ID, max_size=3),
    "architecture": st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e6, 1e6),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
    "encoding": st.sampled_from(get_args(EncodingName)),
    "data": st.binary(max_size=64),
    "checksum": st.text(max_size=16),
    "chunks": st.integers(1, 9),
    "update_rule": st.just({}),
    "member": ID,
    "changes": st.dictionaries(st.text(min_size=1, max_size=9), st.none() | st.floats(-1e6, 1e6) | ID, max_size=3),
    "back": st.lists(st.text(min_size=1, max_size=9), max_size=3),
    "report": st.just({"a": [1, 2.5, None]}),
    "name": NAME,
    "size": SIZE,
    "assets": st.lists(st.fixed_dictionaries({"name": NAME, "digest": DIGEST, "size": SIZE}), max_size=3),
}
#: Filled in although they have a default.
ALSO = ("assets", "changes", "back")


def instances(kind: type[Message]) -> st.SearchStrategy[Message]:
    fields = {}
    for name, field in kind.model_fields.items():
        if name in BY_NAME and (field.is_required() or name in ALSO):
            fields[name] = BY_NAME[name]
        elif field.is_required():
            fields[name] = {bool: st.booleans(), str: st.text(max_size=8)}.get(field.annotation, st.integers(0, 10**12))
    return st.fixed_dictionaries(fields).map(kind.model_validate)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS).flatmap(instances))
def test_every_kind_comes_back_as_it_was(message: Message) -> None:
    assert decode(encode(message)) == message


def test_a_newer_sender_may_add_fields() -> None:
    plain = msgpack.unpackb(encode(Join(node="n", incarnation="i", types=["text"])))
    assert decode(msgpack.packb({**plain, "added_later": 1})) == Join(node="n", incarnation="i", types=["text"])


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


GET = {"kind": "request.get", "schema_version": 1, "sender": "s", "encoder_type": "text"}
UPDATE = {"kind": "update", "schema_version": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not-msgpack"),
        (b"\xc1", "not-msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not-msgpack"),
        (b"\x91" * 5000 + b"\xc0", "invalid"),
        (msgpack.packb([1]), "not-msgpack"),
        (msgpack.packb({1: 2}), "not-msgpack"),
        (msgpack.packb({"kind": "ack"}), "schema-version"),
        (msgpack.packb({"kind": "ack", "schema_version": 2}), "schema-version"),
        (msgpack.packb({"kind": "brew", "schema_version": 1}), "unknown-kind"),
        (msgpack.packb({"schema_version": 1}), "unknown-kind"),
        (msgpack.packb({"kind": "request.join", "schema_version": 1, "node": "a/b", "incarnation": "i"}), "invalid"),
        (msgpack.packb({"kind": "request.join", "schema_version": 1, "node": "a"}), "invalid"),
        (encode(Join(node="n", incarnation="i"))[:-1], "not-msgpack"),
        (encode(Join(node="n", incarnation="i")) + b"\x00", "not-msgpack"),
        (msgpack.packb({"kind": "x" * 10**6, "schema_version": 1}), "oversize"),
        (msgpack.packb({"kind": "x" * 10**4, "schema_version": 1}), "unknown-kind"),
        (msgpack.packb({"kind": ["ack"], "schema_version": 1}), "unknown-kind"),
        (msgpack.packb({"kind": "ack", "schema_version": "1" * 10**4}), "schema-version"),
        (msgpack.packb({"kind": "ack", "schema_version": True}), "schema-version"),
        # reading a value of so many levels aloud, or comparing it, is no small thing
        (msgpack.packb({"kind": nested(500), "schema_version": 1}), "invalid"),
        (msgpack.packb({"kind": "ack", "schema_version": nested(500)}), "invalid"),
        (msgpack.packb({"kind": {"a": [1] * 10_000}, "schema_version": 1}), "unknown-kind"),
        (msgpack.packb({**GET, "sender": 5}), "invalid"),
        # what an architecture holds gets into the state: only what a snapshot's JSON can hold may come in
        (msgpack.packb({**GET, "architecture": {"x": b"\xff"}}), "invalid"),
        (msgpack.packb({**GET, "architecture": {"x": [{b"\xff": 1}]}}), "invalid"),
        (msgpack.packb({**GET, "architecture": {"x": msgpack.Timestamp(1)}}), "invalid"),
        (msgpack.packb({**GET, "architecture": {"x": msgpack.ExtType(1, b"")}}), "invalid"),
        (msgpack.packb({**GET, "architecture": {"x": float("nan")}}), "invalid"),
        (msgpack.packb({**GET, "architecture": {"x": nested(300)}}), "invalid"),
        (msgpack.packb({**GET, "architecture": {"x" * 10**4: b""}}), "invalid"),
        (bytes(MAX_BODY_BYTES + 1), "oversize"),
    ],
)
def test_what_is_not_a_message_is_poison_with_a_reason(body: bytes, reason: str) -> None:
    with pytest.raises(Poison) as poison:
        decode(body)
    assert poison.value.reason == reason
    assert len(poison.value.detail) <= 500, "the detail goes into a log line and a header"


@pytest.mark.parametrize(
    "plain",
    [
        {**UPDATE, "layout": [["w", [-1] * 100_000]]},
        {**UPDATE, "layout": [["w", [-1] * 16]] * 5_000},
        {**GET, "architecture": {"x": [b""] * 20_000}},
        {**GET, "kind": "request.join", "node": "n", "incarnation": "i", "types": [1] * 100_000},
    ],
)
def test_a_small_body_full_of_errors_does_not_fill_the_memory(plain: dict[str, object]) -> None:
    body = msgpack.packb(plain)
    tracemalloc.start()
    try:
        with pytest.raises(Poison):
            decode(body)
        assert tracemalloc.get_traced_memory()[1] < 60 * len(body)
    finally:
        tracemalloc.stop()


EMPTY = {
    "lists": b"\xdd" + struct.pack(">I", 14 << 20) + b"\x90" * (14 << 20),
    "lists of lists": b"\x9f" + (b"\xdc\xff\xff" + b"\x90" * 0xFFFF) * 15,
    "tables": b"\xdc\xff\xff" + b"\x80" * 0xFFFF + b"\x00",
    "a table": b"\xdf" + struct.pack(">I", 3 << 20) + b"\xa0\x90" * (3 << 20),
    "a table of keys": b"\xdf\x00\x10\x00\x00"
    + b"".join(b"\xa3" + struct.pack(">I", i)[1:] + b"\xc0" for i in range(1 << 20)),
    "a claim": b"\xdd\xff\xff\xff\xff" + b"\x90" * 100,
}


@pytest.mark.parametrize("body", EMPTY.values(), ids=EMPTY.keys())
def test_f1_what_would_become_gigabytes_is_refused_before_anything_is_built(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Poison):
            decode(body)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_report_of_thousands_of_nodes_is_read_by_who_asked_for_it_alone() -> None:
    members = {f"node-{number}": {"samples": number, "note": "x" * 100} for number in range(10_000)}
    report = StatusReport(report={"encoders": {"text-1": {"members": members}}, "sum": 5 * 2**62, "norm": -1e308})
    read = decode(encode(report), REPORT)
    assert isinstance(read, StatusReport) and read.report["encoders"] == report.report["encoders"]
    assert (read.report["sum"], read.report["norm"]) == (MAX_WHOLE, -MAX_FLOAT), "what strangers claim adds up"
    with pytest.raises(Poison, match="oversize"):
        decode(encode(report))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.binary(max_size=3))
def test_damage_never_raises_anything_else(noise: bytes, cut: int, patch: bytes) -> None:
    good = encode(Alive(node="n", incarnation="i", loss=1.5))
    for body in (noise, good[:cut], good[:cut] + patch + good[cut + len(patch) :]):
        with contextlib.suppress(Poison):
            decode(body)


#: What stands at the bounds of a message, on both sides.
EDGES = st.sampled_from(
    [MAX_WHOLE, -MAX_WHOLE, MAX_WHOLE + 1, -MAX_WHOLE - 1, MAX_FLOAT, 2 * MAX_FLOAT, -2 * MAX_FLOAT]
)
VALUES = st.recursive(
    EDGES | st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.integers(0, 2 * MAX_DEPTH))
@settings(max_examples=300)
def test_what_is_looked_at_as_a_whole_is_what_is_looked_at_token_by_token(plain: dict[str, object], deep: int) -> None:
    """A small body that counts as within bounds when it is built is within them; and one that is flat is not looked at
    twice for nothing."""
    for _ in range(deep):
        plain = {"inner": plain}
    body = msgpack.packb(plain)
    assert is_small(body, CONTROL)
    found = None
    with contextlib.suppress(Poison):
        found = check(body) is None
    if is_within(msgpack.unpackb(body, strict_map_key=True).values()):
        assert found
    else:
        assert not found or deep > 0 or _levels(plain) > 4


def _levels(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_levels(each) for each in inner), default=0)


@pytest.mark.parametrize(
    "body", [msgpack.packb({"a": msgpack.ExtType(5, b"x")}), msgpack.packb({"a": msgpack.Timestamp(1)})]
)
def test_a_value_of_a_kind_of_its_own_is_not_within(body: bytes) -> None:
    assert not is_within(msgpack.unpackb(body).values())
