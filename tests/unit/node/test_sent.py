"""The auditor's file: what leaves is in it, before it leaves; what is not in it has not left."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.clock import VirtualClock
from common.errors import UserError
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.to_master import Alive, Join
from common.wire.topology import Topology
from node_service.handover.outbox import Outbox
from node_service.handover.sent import SentFile, line_of, shown

TOPOLOGY = Topology("ns")


class Line:
    """A broker's connection, as far as an outbox has it: what was published while the file had how many lines."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.published: list[tuple[Publication, int]] = []

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        lines = len(self.file.read_text().splitlines())
        self.published += [(each, lines) for each in publications]


def outbox(line: Any, file: SentFile) -> Outbox:
    return Outbox(line, TOPOLOGY, "a", lambda manifest, index: None, on_leaving=file.note)


def test_a_message_is_in_the_file_before_it_leaves(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sent.jsonl"
    clock = VirtualClock()
    line = Line(path)
    box = outbox(line, SentFile(path, clock))
    for message in (Join(node="a", incarnation="i", types=["text"]), Alive(node="a", incarnation="i", steps=7)):
        box.say(message)
    while box.flush_one():
        pass
    assert [lines for _, lines in line.published] == [1, 2]
    found = [json.loads(text) for text in path.read_text().splitlines()]
    assert [each["kind"] for each in found] == ["request.join", "request.alive"]
    for each, (publication, _) in zip(found, line.published, strict=True):
        assert each["bytes"] == len(publication.body) and each["message_id"] == publication.message_id
        assert (each["exchange"], each["routing_key"]) == (publication.exchange, publication.routing_key)
    assert found[1]["fields"]["steps"] == 7 and found[0]["fields"]["types"] == ["text"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_cannot_be_noted_does_not_leave(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    line = Line(path)
    box = outbox(line, SentFile(path, VirtualClock()))
    path.unlink()
    path.mkdir()
    box.say(Join(node="a", incarnation="i", types=["text"]))
    with pytest.raises(OSError):
        box.flush_one()
    assert line.published == [] and not box.empty
    with pytest.raises(UserError, match="no message leaves that is not noted there"):
        SentFile(path, VirtualClock())


def test_it_goes_on_in_a_file_of_the_day_before_and_in_a_new_one_once_that_is_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    message = Publication("x", "k", encode(Join(node="a", incarnation="i", types=["text"])))
    SentFile(path, VirtualClock()).note(message)
    file = SentFile(path, VirtualClock())
    file.note(message)
    assert len(path.read_text().splitlines()) == 2
    path.rename(tmp_path / "monday.jsonl")
    file.note(message)
    assert len(path.read_text().splitlines()) == 1


@given(st.binary(max_size=1000) | st.text(max_size=1000) | st.lists(st.integers(), max_size=300) | st.none())
def test_a_field_is_there_as_it_is_or_by_its_size_and_digest(value: Any) -> None:
    found = shown(value)
    if isinstance(value, bytes):
        assert found == {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    elif found != value:
        text = json.dumps(value)
        assert len(text) > 200 and found["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert len(json.dumps(found)) <= 250


def test_every_field_that_travels_is_named() -> None:
    message = Alive(node="a", incarnation="i", encoder="e", version=3, note="at work")
    fields = line_of(Publication("x", "k", encode(message)), "now")["fields"]
    travels = {name for name, value in message if value is not None} - {"kind", "schema_version"}
    assert fields.keys() == travels
