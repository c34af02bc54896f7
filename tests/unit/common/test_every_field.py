"""Every field of every message, in both directions: what no sender of ours would put there is refused at the door."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, get_args

import msgpack
import pytest

from common.errors import Poison
from common.wire.base import Message
from common.wire.codec import decode, encode
from common.wire.messages import ToMaster, ToNode
from common.wire.to_node import Rule
from common.wire.update_rule import UpdateRule

KINDS = [*get_args(ToMaster), *get_args(ToNode)]
RULE = UpdateRule().model_dump()
RULE["when"] = {"steps": 25, "seconds": 60.0, "samples": 100, "loss_change": 0.1, "drift": 0.1}
RULE["away_steps"] = 100
RULE["finish"] |= {"steps": 10, "patience": 3, "look_every": 10}
#: Something good for every field that a message has, by its name.
GOOD: dict[str, Any] = {
    "node": "n",
    "incarnation": "i",
    "sender": "s",
    "encoder": "text-1",
    "encoder_type": "text",
    "types": ["text"],
    "digest": "0" * 64,
    "stream_digest": "0" * 64,
    "stream_offset": 7,
    "layout_digest": "1" * 64,
    "previous": "2" * 64,
    "checksum": "0" * 16,
    "data": b"xy",
    "architecture": {"a": [{"b": 1, "c": 0.5, "d": "e"}]},
    "layout": [["w", [2, 3]]],
    "encoding": "int8",
    "assets": [{"name": "tokenizer.json", "digest": "3" * 64, "size": 5}],
    "name": "tokenizer.json",
    "size": 5,
    "have_version": 1,
    "sought": 2,
    "version": 3,
    "base_version": 2,
    "held_out_version": 2,
    "epoch": 1_700_000_000,
    "documents": 9,
    "min_documents": 2,
    "words": [["word", 3]],
    "steps": 4,
    "samples": 40,
    "seconds": 1.5,
    "steps_per_second": 2.5,
    "loss": 4.5,
    "held_out": 4.25,
    "waiting_seconds": 0.5,
    "step_seconds": 60.5,
    "hand_in_seconds": 0.25,
    "adoption_seconds": 0.5,
    "checkpoint_seconds": 0.75,
    "other_seconds": 1.5,
    "bytes_sent": 10,
    "weight": 1.5,
    "note": "training",
    "reason": "stale",
    "detail": "words",
    "status": "running",
    "report": {"a": {"b": 1}},
    "sequence": 1,
    "attempt": 0,
    "order": 1,
    "beyond": 1,
    "shards": 1,
    "chunks": 1,
    "index": 0,
    "staleness": 1,
    "return_count": 2,
    "published_at": 1.7e9,
    "at": 1.7e9,
    "progress": 0.5,
    "update_rule": RULE,
    "fresh": False,
    "accepted": True,
    "named": False,
    "wants_version": True,
    "changes": {"rule.outer.lr": 2.5, "update.when.steps": 20, "update.encoding": "int8"},
    "back": ["rule.outer.lr"],
    "member": "n",
    "paused": False,
    "kicked": False,
}
#: Free in what they hold, but not in how large it is.
FREE = {"architecture", "report", "changes"}


def good(kind: type[Message]) -> dict[str, Any]:
    named = kind.model_fields.keys() - {"unknown"}
    plain = {name: GOOD[name] for name in named - {"kind", "schema_version"}}
    return {"kind": kind.model_fields["kind"].default, "schema_version": 1, **plain}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def wrong(path: tuple[Any, ...], value: Any) -> list[Any]:
    """What must not stand where `value` does."""
    field, free = path[0], path[0] in FREE
    huge = [2**63, 2**64 - 1, -(2**63), 2**53 + 1, 1e308, -1e308]
    no_number = [] if field == "report" else [math.nan, math.inf, -math.inf]
    if isinstance(value, bool):
        return [1, "true", 2**63, math.nan]
    if isinstance(value, int):
        return [*huge, *no_number, *([] if free else ["7", "9" * 400, 1.0, True, -2, 1 << 62])]
    if isinstance(value, float):
        # what no AdamW can be made of is the node's to refuse, with the reason in its answer
        signed = field in ("loss", "held_out") or "betas" in path or free
        diverged = field == "loss"  # is told as it is
        return [
            *huge,
            *([] if diverged else no_number),
            *([] if free else ["0.5", "nan", True]),
            *([] if signed else [-1.0]),
        ]
    if isinstance(value, str):
        return ["x" * 70_000, *([] if free else ["x" * 2_001, 7, b"x", ["x"]])]
    return [b"x" * ((4 << 20) + 1), 7, "x"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_f1_what_is_no_good_in_any_field_of_any_message_is_refused(kind: type[Message]) -> None:
    plain = good(kind)
    body = msgpack.packb(plain)
    assert decode(encode(decode(body))) == decode(body)
    fields = {path[0] for path, _ in leaves(plain)}
    assert fields == plain.keys(), "every field is tried"
    let_in = []
    for path, value in leaves(plain):
        for bad in wrong(path, value):
            changed = copy.deepcopy(plain)
            where: Any = changed
            for key in path[:-1]:
                if isinstance(where[key], tuple):
                    where[key] = list(where[key])
                where = where[key]
            where[path[-1]] = bad
            try:
                decode(msgpack.packb(changed))
            except Poison as poison:
                assert len(poison.detail) < 400, "strangers' values are not put into words whole"
            else:
                let_in.append((path, repr(bad)[:20]))
    assert let_in == []


def test_a_newer_masters_rule_is_taken_without_what_is_not_known_of_it() -> None:
    plain = good(Rule)
    plain["update_rule"] = {**RULE, "later": 1, "inner": {**RULE["inner"], "momentum": 0.9}}
    rule = decode(msgpack.packb(plain))
    assert isinstance(rule, Rule) and rule.unknown == ["inner.momentum", "later"]
    assert rule.update_rule == UpdateRule.model_validate(RULE)
    assert "unknown" not in rule.model_dump() and "later" not in rule.model_dump_json()
