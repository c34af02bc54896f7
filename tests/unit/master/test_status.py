"""What `status` says: figures stand under the encoder that they are of, and the report survives the wire."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from common.brokers.memory import MemoryServer
from common.wire.broker import BrokerStatus
from common.wire.codec import decode, encode
from common.wire.to_master import Alive, Get, Leave
from common.wire.to_node import StatusReport
from deploy.commands.observe import Observer
from master_service.status import (
    KEPT_ENCODERS,
    KEPT_NODES,
    BrokerReport,
    DiskReport,
    EncoderReport,
    Live,
    LogReport,
    MemberReport,
    Report,
    SnapshotReport,
    report,
)
from tests.integration.harness import TOPOLOGY, HandNode, connection, running_master
from tests.unit.scenario import Scenario

CONNECTED = BrokerStatus(connected=True, blocked=None, reconnects=2, bytes_out=9, bytes_in=9)
#: A node's figures, all of them unlike what a log says.
FIGURES: dict[str, Any] = {
    "version": 7,
    "steps": 500,
    "steps_per_second": 12.5,
    "loss": 3.25,
    "waiting_seconds": 40.0,
    "bytes_sent": 1 << 20,
}


class Federation(Scenario):
    """Two encoders; nodes `a` and `b` take part in both, and each has had one update of 10 steps accepted in both."""

    def __init__(self) -> None:
        super().__init__()
        self.live = Live()
        self.first, self.second = self.generate("text"), self.generate("image")
        for encoder in (self.first, self.second):
            for node in ("a", "b"):
                self.join(node, encoder)
                self.update(node, encoder, 0)

    def say(self, node: str, encoder: str | None, **changes: Any) -> None:
        self.live.seen(node, self.at)
        self.live.alive(Alive(node=node, incarnation="first", encoder=encoder, **{**FIGURES, **changes}))

    def report(self, broker: BrokerStatus = CONNECTED) -> Report:
        return report(
            self.coordinator.state,
            self.live,
            broker,
            now=self.at + 5.0,
            bytes_published=4096,
            disk=DiskReport(short=True, free_bytes=1, needed_bytes=2),
            log=LogReport(entries=len(self.log)),
            snapshot=SnapshotReport(offset=3, age_seconds=1.5),
        )

    def member(self, node: str, encoder: str) -> MemberReport:
        return self.report().encoders[encoder].members[node]


@pytest.fixture
def federation() -> Federation:
    return Federation()


def live_figures(member: MemberReport) -> dict[str, Any]:
    return {name: getattr(member, name) for name in FIGURES}


def test_f9_live_figures_stand_under_the_encoder_that_the_node_trains_and_no_other(federation: Federation) -> None:
    before = federation.member("a", federation.first)
    assert (before.steps, before.loss, before.steps_per_second) == (10, 5.0, 0.0)
    federation.say("a", federation.second)
    assert live_figures(federation.member("a", federation.second)) == FIGURES
    # of the other, what the log says; but that the node was heard holds for both
    other = federation.member("a", federation.first)
    assert live_figures(other) == live_figures(before) and other.silent_seconds == 5.0
    assert federation.member("b", federation.second).steps == 10


@pytest.mark.parametrize("idle", [False, True])
def test_f9_of_an_encoder_that_it_trained_before_the_last_figures_stay(federation: Federation, idle: bool) -> None:
    federation.say("a", federation.first)
    # an idle node repeats the figures of what it trained last: they are of no encoder now
    federation.say("a", None if idle else federation.second, steps=900, loss=1.0, version=99)
    assert live_figures(federation.member("a", federation.first)) == {**FIGURES, "steps_per_second": 0.0}
    assert federation.member("a", federation.second).steps == (10 if idle else 900)
    federation.say("a", federation.first, steps=501)
    assert live_figures(federation.member("a", federation.first)) == {**FIGURES, "steps": 501}


def test_f9_a_node_that_has_gone_trains_nothing(federation: Federation) -> None:
    federation.say("a", federation.first)
    federation.apply(Leave(node="a", incarnation="first"))
    gone = federation.member("a", federation.first)
    assert not gone.active and gone.steps_per_second == 0.0 and gone.steps == 500


def test_the_log_is_believed_where_it_is_newer(federation: Federation) -> None:
    """A node that came back from a backup, or whose last figures are old."""
    federation.say("a", federation.first, steps=3, version=0, loss=None, bytes_sent=0)
    member, logged = federation.member("a", federation.first), federation.coordinator.state.encoders[federation.first]
    assert (member.steps, member.loss) == (10, 5.0)
    assert member.version == logged.members["a"].version
    assert member.bytes_sent == logged.members["a"].payload_bytes > 0


def test_a_report_survives_the_wire(federation: Federation) -> None:
    federation.say("a", federation.first)
    made = federation.report(BrokerStatus(False, "low on disk", 2, 0, 0, problem="queue x is gone"))
    assert made.broker == BrokerReport(connected=False, blocked="low on disk", reconnects=2, problem="queue x is gone")
    assert (made.bytes_published, made.disk.short, made.log.entries) == (4096, True, len(federation.log))
    message = decode(encode(StatusReport(report=made.model_dump())))
    assert isinstance(message, StatusReport) and Report.model_validate(message.report) == made
    assert Report.model_validate_json(made.model_dump_json()) == made


def test_a_loss_that_is_not_a_number_is_no_hindrance_to_readers_of_json(federation: Federation) -> None:
    federation.update("a", federation.first, 1, loss=math.nan)
    made = federation.report()
    loss = made.encoders[federation.first].members["a"].loss
    assert loss is not None and math.isnan(loss)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    plain = json.loads(made.model_dump_json(), parse_constant=refuse)
    assert plain["encoders"][federation.first]["members"]["a"]["loss"] is None


@pytest.mark.parametrize(
    "part", [Report, BrokerReport, DiskReport, LogReport, SnapshotReport, EncoderReport, MemberReport]
)
def test_every_number_says_what_it_counts(part: type[BaseModel]) -> None:
    for name, field in part.model_fields.items():
        if field.annotation in (int, float, int | None, float | None):
            assert field.description or "bytes" in name or name.endswith("_seconds"), name
    part()  # all of it has defaults, for reports of masters that do not know it


def test_names_and_encoders_that_somebody_makes_up_are_not_all_kept() -> None:
    live = Live()
    for number in range(KEPT_ENCODERS + 3):
        live.alive(Alive(node="a", incarnation="first", encoder=f"text-{number}"))
    kept = [number for number in range(KEPT_ENCODERS + 3) if live.figures("a", f"text-{number}")]
    assert kept == list(range(3, KEPT_ENCODERS + 3))
    for number in range(KEPT_NODES):
        live.alive(Alive(node=f"n{number}", incarnation="first", encoder="text-1"))
        if number == KEPT_NODES // 2:
            live.alive(Alive(node="a", incarnation="first", encoder="text-1"))
    assert len(live.said) == KEPT_NODES and live.trains("a", "text-1") and not live.trains("n0", "text-1")


def test_who_asks_for_the_status_or_an_encoder_is_no_node(tmp_path: Path) -> None:
    server = MemoryServer()
    with running_master(server, tmp_path) as master:
        node = HandNode(server, "clinic")
        node.enter()
        observer = Observer(connection(server, "observer"), TOPOLOGY)
        observer.say(Get(sender=observer.name, encoder_type="text"))
        seen = observer.status(10.0)
        assert seen.nodes == ("clinic",)
        assert [list(encoder.members) for encoder in seen.encoders.values()] == [["clinic"]]
        assert list(master.service.master.live.last_seen) == ["clinic"]
        observer.close()
