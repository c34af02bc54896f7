"""The ledger takes every kind of entry and gives it back as it was, once, in order; payloads are shared by digest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from common.wire.base import Message
from common.wire.to_master import Get, UpdateManifest
from master_service.decisions.records import (
    Configured,
    Entry,
    Gathering,
    Generated,
    GenerationFailed,
    Presence,
    Provided,
    Record,
    Repaired,
    Said,
    Skipped,
    Started,
    StepFailed,
    Tick,
    UpdateFacts,
    Versioned,
    pack,
    unpack,
)
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import LossPlateau, Settings, StopRule
from master_service.log.message_log import open_log
from master_service.log.payload_files import payload_path
from tests.builders import LAYOUT
from tests.unit.common.test_codec import instances
from tests.unit.scenario import DIGEST, Scenario

RECORDS: list[Any] = [
    Configured(
        settings=Settings(
            rule=aggregation_rule("diloco", {"guards": {"norm_clip": None}}),
            stop=StopRule(seconds=1.5, plateau=LossPlateau(patience=3)),
            architecture={"layers": [1, 2], "name": "é"},
        )
    ),
    Started(epoch=3, fingerprint={"torch": "2"}),
    Gathering(encoder="e"),
    Provided(encoder="e", name="tokenizer.json", digest=DIGEST, size=3),
    Generated(encoder="e", architecture={"a": None}, layout=LAYOUT.plain(), layout_digest=LAYOUT.digest, digest=DIGEST),
    GenerationFailed(encoder="e", reason="x" * 5000),
    Versioned(encoder="e", version=4, digest=DIGEST),
    StepFailed(encoder="e", version=5, lost=[DIGEST]),
    Skipped(offset=4),
    Presence(node="n", present=False),
    Tick(),
    Repaired(last_whole=3, resumed_at=9, problem="it was cut"),
]


def test_every_record_of_the_masters_own_comes_back(tmp_path: Path) -> None:
    assert {type(record) for record in RECORDS} == set(get_args(Record))
    log = open_log(tmp_path)
    for index, record in enumerate(RECORDS):
        log.append(record, message_id=str(index), at=float(index))
    log.close()
    for reader in (open_log(tmp_path, read_only=True), open_log(tmp_path)):
        assert [entry.body for entry in reader.entries()] == RECORDS
        reader.close()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(get_args(Said)).flatmap(instances))
def test_every_message_of_a_node_comes_back(message: Message) -> None:
    assert unpack(pack(message)) == message


def test_facts_and_numbers_that_are_not_numbers_come_back(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    facts = UpdateFacts(digest=DIGEST, size=3, finite=True, norm=1 / 3)
    manifest = Scenario().manifest("a", "e", 0, loss=math.nan)
    log.append(manifest, message_id="u", at=0.1 + 0.2, facts=facts, payload=DIGEST)
    [entry] = log.entries()
    assert isinstance(entry, Entry) and isinstance(entry.body, UpdateManifest) and math.isnan(entry.body.loss)
    assert (entry.at, entry.facts, entry.payload) == (0.1 + 0.2, facts, DIGEST)
    # a node keeps what it owes as JSON
    assert math.isnan(UpdateManifest.model_validate_json(manifest.model_dump_json()).loss)


def test_a_payload_is_dropped_only_when_no_later_entry_needs_its_bytes_and_the_reason_is_kept(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    shared, alone = log.write_payload(b"the same"), log.write_payload(b"another")
    assert log.write_payload(b"the same") == shared
    for index, payload in enumerate((shared, alone, shared)):
        log.append(Get(sender="s", encoder_type="text"), message_id=str(index), at=0.0, payload=payload)
    assert log.uses(shared) == 2 and log.drop([shared, alone], "retention 5", 9.0, up_to=1) == len(b"another")
    assert log.payloads.read(shared, 4, 3) == b"sam"
    assert log.payloads.damage(alone) == "missing" and log.dropped() == {alone: "retention 5"}
    log.write_payload(b"another")
    assert log.dropped() == {} and log.payloads.damage(alone) is None
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_payload_is_known_by_its_name_and_can_be_written_again(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    payload = log.write_payload(b"whole")
    payload_path(log.directory / "payloads", payload).write_bytes(b"torn")
    assert log.payloads.damage(payload) == "damaged"
    assert log.write_payload(b"whole") == payload and log.payloads.damage(payload) is None
