"""What /metrics, /healthz and /readyz say, from what a service is seen as; and that nobody who scrapes holds it up."""

from __future__ import annotations

import itertools
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from common.clock import VirtualClock
from common.growth import SECONDS_A_DAY, bytes_a_day, seconds_left, within
from common.wire.broker import BrokerStatus
from deploy.logging import Noticed, configure_logging
from deploy.monitoring import common, master, node, table
from deploy.monitoring.common import Disk, Seen
from deploy.monitoring.disk import DiskWatch, stored_bytes
from deploy.monitoring.exposition import exposed
from deploy.monitoring.health import HUNG_SECONDS, OK, Heart, broker_part, disk_part, hung, lock_part, log_part
from deploy.monitoring.master import MOST_ENCODERS, MOST_MEMBERS
from deploy.monitoring.monitor import MasterMonitor, NodeMonitor
from deploy.monitoring.pages import health, metrics, readiness
from deploy.monitoring.table import METRICS, Sample
from master_service.counts import STALENESS, WEIGHTS, Answered, Counts, Histogram
from master_service.status import EncoderReport, LogReport, MemberReport, Report
from node_service.figures import NodeFigures
from tests.e2e.prometheus import promtool

HERE = BrokerStatus(True, None, 2, 30, 40)
AWAY = BrokerStatus(False, None, 2, 30, 40, problem="nobody answers")
BLOCKED = BrokerStatus(True, "low on memory", 0, 0, 0)
DAY = SECONDS_A_DAY


# --- growth, and how long the disk lasts -----------------------------------------------------------------------------


@given(
    st.integers(0, 1 << 50),
    st.integers(-(1 << 30), 1 << 30),
    st.lists(st.integers(0, 100_000), min_size=2, unique=True).map(sorted),
)
def test_what_grows_evenly_grows_by_that(begin: int, rate: int, moments: list[int]) -> None:
    found = bytes_a_day([(float(at), begin + rate * at) for at in moments])
    assert found == pytest.approx(rate * DAY, rel=1e-6, abs=abs(begin) * 1e-4)


def test_payloads_that_are_dropped_now_and_then_are_a_saw_and_no_growth() -> None:
    saw = [(10.0 * turn, (turn % 20) * 1_000_000) for turn in range(2_000)]
    last_tooth = bytes_a_day(saw[-10:])
    whole = bytes_a_day(saw)
    assert last_tooth is not None and whole is not None and abs(whole) < 0.001 * last_tooth


@pytest.mark.parametrize("samples", [[], [(1.0, 5)], [(1.0, 5), (1.0, 9)]])
def test_one_moment_is_no_growth(samples: list[tuple[float, int]]) -> None:
    assert bytes_a_day(samples) is None


def test_what_is_too_old_does_not_count() -> None:
    assert within([(0.0, 1), (5.0, 2), (10.0, 3)], window=5.0) == [(5.0, 2), (10.0, 3)]


@pytest.mark.parametrize(
    ("free", "needed", "growth", "seconds"),
    [
        (1_100, 100, 1_000.0, DAY),
        (1_100, 100, 500.0, 2 * DAY),
        (1_100, 100, 0.0, float("inf")),
        (1_100, 100, -5.0, float("inf")),
        (100, 100, 1_000.0, 0.0),
        (50, 100, None, 0.0),
        (1_100, 100, None, None),
    ],
)
def test_how_long_the_disk_lasts(free: int, needed: int, growth: float | None, seconds: float | None) -> None:
    assert seconds_left(free, needed, growth) == seconds


def test_a_state_directory_is_measured_by_its_parts_and_the_disk_before_it_is_made(tmp_path: Path) -> None:
    directory, clock = tmp_path / "not/there/yet", VirtualClock()
    watch = DiskWatch(directory, 10, clock)
    assert (watch.look().free_bytes or 0) > 0 and watch.look().parts is None and watch.look().seconds_left is None
    for name, size in {
        "ledger.sqlite": 5,
        "ledger.sqlite-wal": 2,
        "payloads/ab/cd": 30,
        "snapshots/x/y": 7,
        "z": 1,
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(bytes(size))
    assert stored_bytes(directory) == {"ledger": 7, "payloads": 30, "snapshots": 7, "other": 1}
    watch.measure()
    clock.time += 100.0
    (directory / "payloads/ab/ef").write_bytes(bytes(50))
    watch.measure()
    found = watch.look()
    assert found.parts == {"ledger": 7, "payloads": 80, "snapshots": 7, "other": 1}
    assert found.growth == pytest.approx(0.5 * DAY) and (found.seconds_left or 0) > 0
    nodes = DiskWatch(directory, 0, clock, parts={})
    nodes.measure()
    assert nodes.look().parts == {"other": 95} and nodes.look().growth is None


# --- alive, and ready ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heart", "now", "broker", "missing", "is_hung"),
    [
        (Heart(), 1e9, None, "", False),  # it starts: a long log, a large corpus
        (Heart(0.0), HUNG_SECONDS, HERE, "", False),
        (Heart(0.0), HUNG_SECONDS + 1, HERE, "", True),
        (Heart(0.0, longest=120.0), 1200.0, HERE, "", False),  # its steps take minutes
        (Heart(0.0, longest=120.0), 1201.0, HERE, "", True),
        (Heart(0.0, longest=1e5), 6001.0, HERE, "", True),  # it once waited a day for a broker that took nothing
        (Heart(0.0), 1e9, AWAY, "", False),  # nothing that a restart would mend
        (Heart(0.0), 1e9, BLOCKED, "", False),
        (Heart(0.0), 1e9, HERE, "aggregator 1/2", False),
    ],
)
def test_only_what_truly_hangs_is_to_be_killed(
    heart: Heart, now: float, broker: BrokerStatus | None, missing: str, is_hung: bool
) -> None:
    assert bool(hung(heart, now, broker, missing)) is is_hung


def test_a_heart_remembers_its_longest_turn() -> None:
    heart = Heart()
    for at in (100.0, 101.0, 131.0, 132.0):
        heart = heart.beaten(at)
    assert heart == Heart(132.0, 30.0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (broker_part(HERE, ""), OK),
        (broker_part(None, ""), "not connected yet"),
        (broker_part(None, "refused"), "waiting for it: refused"),
        (broker_part(AWAY, ""), "away: nobody answers"),
        (broker_part(BLOCKED, ""), "blocked: low on memory"),
        (broker_part(BrokerStatus(True, None, 0, 0, 0, problem="no queue x"), ""), "no queue x"),
        (lock_part(HERE, True), OK),
        (lock_part(HERE, False), "not taken yet"),
        (lock_part(AWAY, True), "not known while the broker is away"),
        (disk_part(100, 100), OK),
        (disk_part(99, 100), "99 bytes are free, 100 are wanted"),
        (disk_part(500, 100, short=True), "500 bytes are free, 100 are wanted"),
        (disk_part(None, 0), "the state directory cannot be read"),
        (disk_part(1, 0, held=3), "3 orders wait for room"),
        (log_part(True, "", ""), OK),
        (log_part(False, "", ""), "not read yet"),
        (log_part(False, "aggregator 2/2", ""), "waiting for aggregator 2/2"),
        (log_part(True, "aggregator 2/2", ""), "waiting for aggregator 2/2"),
        (log_part(True, "", "another process holds it"), "another process holds it"),
    ],
)
def test_each_part_is_ok_or_says_what_is_wrong(words: str, expected: str) -> None:
    assert words == expected


# --- the metrics -----------------------------------------------------------------------------------------------------


def full_member(**changes: Any) -> MemberReport:
    """With all that may be missing."""
    return MemberReport(
        **{"last_weight": 1.5, "loss": 3.0, "held_out": 2.0, "silent_seconds": 4.0, "lost_seconds": {"other": 1.0}}
        | changes
    )


def full_encoder(**changes: Any) -> EncoderReport:
    plain = {"status": "running", "version": 7, "held_out": 3.1, "best_held_out": 3.0, "members": {"a": full_member()}}
    return EncoderReport(**plain | changes)


def full_counts() -> Counts:
    weights, staleness = Histogram(WEIGHTS), Histogram(STALENESS)
    weights.add(1.2)
    staleness.add(3)
    answered = {Answered("e", "counted"): 1, Answered("e", "refused", "stale"): 2}
    return Counts(answered, {"e": weights}, {"e": staleness}, {"e": 99}, {"e": 1e9})


def of_master(report: Report, counts: Counts | None = None) -> list[Sample]:
    return list(master.samples(report, counts or Counts(), 5))


def of_all(role: table.Role) -> list[Sample]:
    parts = {"broker": OK, "lock": "not taken yet"}
    disk = Disk(10, 5, {"ledger": 1}, 2.0, 3.0) if role != "node" else Disk(10, 5, {"other": 1})
    queues = {"arrived": 1} if role != "node" else {}
    seen = Seen(role, "a", "1", parts, HERE, disk, 0.5, {"error": 1}, 1e9, queues)
    own = {
        "master": of_master(Report(encoders={"e": full_encoder()}, log=LogReport(entries=5)), full_counts()),
        "node": list(node.samples(node.NodeSeen(NodeFigures(loss=1.0, held_out=2.0), {"text": 3}, 1.0, 2, 300))),
        "aggregator": [Sample("aggregator_version", 1, {"encoder": "e"})],
    }
    own["master"].append(Sample("snapshot_age_seconds", 1.0))
    return [*common.samples(seen), *own[role]]


@pytest.mark.parametrize("role", ["master", "node", "aggregator"])
def test_a_party_has_every_metric_that_the_table_says_and_no_other(role: table.Role) -> None:
    assert {sample.name for sample in of_all(role)} == {metric.name for metric in table.of(role)}


@pytest.mark.parametrize("role", ["master", "node", "aggregator"])
def test_what_is_exposed_is_what_was_said_and_prometheus_finds_nothing_to_mend(role: table.Role) -> None:
    said = of_all(role)
    body, content_type = exposed(table.of(role), said)
    assert content_type.startswith("text/plain")
    assert promtool("check", "metrics", given=body) == ""
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    for sample in said:
        name, labels = table.BY_NAME[sample.name].full_name, sample.labels.items()
        if isinstance(sample.value, table.Buckets):
            assert found[f"{name}_sum", tuple(sorted(labels))] == sample.value.total
            for bound, count in sample.value.cumulative:
                le = "+Inf" if bound == float("inf") else str(bound)
                assert found[f"{name}_bucket", tuple(sorted((*labels, ("le", le))))] == count
        else:
            assert found[name, tuple(sorted(labels))] == sample.value
    openmetrics, content_type = exposed(table.of(role), said, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text") and openmetrics.endswith(b"# EOF\n")


def test_names_are_as_prometheus_wants_them() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric
        assert metric.help.endswith(".") and metric.labels == tuple(dict.fromkeys(metric.labels))


def members(samples: list[Sample]) -> list[tuple[str, str]]:
    return [(each.labels["encoder"], each.labels["node"]) for each in samples if each.name == "member_active"]


def value(samples: list[Sample], name: str) -> Any:
    [found] = [each.value for each in samples if each.name == name]
    return found


def test_who_makes_up_names_has_no_series_for_them_and_pushes_nobody_out() -> None:
    joined = {"clinic-a": full_member(), "clinic-b": full_member()}
    strangers = {f"stranger-{number}": full_member() for number in range(3 * MOST_MEMBERS)}
    over = {f"old-{number}": full_encoder(status="finished") for number in range(2 * MOST_ENCODERS)}
    running = full_encoder(members=joined | strangers)
    samples = of_master(Report(encoders={"first": running, **over}))
    shown = members(samples)
    assert shown[:2] == [("first", "clinic-a"), ("first", "clinic-b")] and len(shown) == MOST_MEMBERS
    everybody = len(joined) + len(strangers) + len(over)
    assert value(samples, "members_unlisted") == everybody - MOST_MEMBERS
    listed = {each.labels["encoder"] for each in samples if each.name == "encoder_version"}
    assert len(listed) == MOST_ENCODERS and "first" in listed, "what is being trained comes first"
    assert f"old-{2 * MOST_ENCODERS - 1}" in listed and "old-0" not in listed, "then the newest"
    assert value(samples, "encoders_unlisted") == len(over) + 1 - MOST_ENCODERS
    # a member of two encoders has two series
    two = of_master(Report(encoders={"one": full_encoder(), "two": full_encoder()}))
    assert sorted(members(two)) == [("one", "a"), ("two", "a")] and value(two, "members_unlisted") == 0


@pytest.mark.parametrize(
    ("takes_part", "present", "vanished"), [(True, True, 0), (True, False, 1), (False, False, 0), (False, True, 0)]
)
def test_who_has_left_has_not_vanished(takes_part: bool, present: bool, vanished: int) -> None:
    member = full_member(takes_part=takes_part, present=present, active=takes_part and present)
    samples = of_master(Report(encoders={"e": full_encoder(members={"a": member})}))
    assert value(samples, "member_vanished") == vanished


@pytest.mark.parametrize(("status", "lost"), [(None, 0), (HERE, 2), (AWAY, 3)])
def test_a_connection_that_is_away_now_counts_as_lost(status: BrokerStatus | None, lost: int) -> None:
    samples = list(common.samples(Seen("master", "", "1", {}, status)))
    assert value(samples, "broker_disconnects_total") == lost
    assert value(samples, "broker_connected") == (status is HERE)


# --- the monitor -----------------------------------------------------------------------------------------------------


class FakeMaster:
    """A master service whose figures may be asked for in the thread that serves alone, at a cost."""

    missing = ""
    has_lock = True

    def __init__(self, clock: VirtualClock, cost: float = 0.0) -> None:
        self.asked, self.counts = 0, full_counts()
        self._clock, self._cost, self._thread = clock, cost, threading.current_thread()

    def report(self) -> Report:
        assert threading.current_thread() is self._thread, "whoever scrapes reads the copy"
        self.asked += 1
        self._clock.time += self._cost
        return Report(encoders={"e": full_encoder(version=self.asked)})

    def waiting(self) -> dict[str, int]:
        return {"arrived": 3}


class FakeBroker:
    def __init__(self, status: BrokerStatus = HERE) -> None:
        self.given = status

    def status(self) -> BrokerStatus:
        return self.given


def monitor_of(clock: VirtualClock, place: Path, broker: FakeBroker | None = None) -> Any:
    monitor: Any = MasterMonitor("", place, Noticed(), clock=clock)
    if broker is not None:
        monitor.connected(broker)
    return monitor


def scraped(monitor: Any) -> dict[str, float]:
    """In a thread of its own, as a scrape is."""
    found: dict[str, float] = {}

    def scrape() -> None:
        text = metrics(monitor, "").body.decode()
        found.update(
            {
                "|".join([sample.name, *sorted(sample.labels.values())]): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )

    thread = threading.Thread(target=scrape)
    thread.start()
    thread.join(10.0)
    return found


def test_figures_are_copied_once_a_second_and_take_a_fiftieth_of_the_time_at_most(tmp_path: Path) -> None:
    clock = VirtualClock()
    for cost, most in ((0.0, 101), (1.0, 3)):
        service, monitor = FakeMaster(clock, cost), monitor_of(clock, tmp_path, FakeBroker())
        until = clock.time + 100.0
        while clock.time < until:
            monitor.update(service)
            clock.time += 0.01
        assert most - 1 <= service.asked <= most


def test_a_scrape_reads_the_copy_and_is_answered_while_the_master_stands_still(tmp_path: Path) -> None:
    clock, broker = VirtualClock(1000.0), FakeBroker()
    service, monitor = FakeMaster(clock), monitor_of(clock, tmp_path, broker)
    monitor.made(service)
    monitor.update(service)
    asked = service.asked
    clock.time += 50.0  # it waits for a broker that takes nothing
    broker.given = BLOCKED
    found = scraped(monitor)
    assert service.asked == asked, "nobody asks the service"
    assert found["shared_encoder_encoder_version|e"] == 1.0
    assert found["shared_encoder_loop_age_seconds|master"] == 50.0
    assert found["shared_encoder_broker_blocked|master"] == 1.0, "the connection is looked at now"
    assert health(monitor).status == 200 and readiness(monitor).status == 503


def test_before_there_is_a_broker_it_is_alive_and_says_what_it_waits_for(tmp_path: Path) -> None:
    monitor = monitor_of(VirtualClock(), tmp_path)
    monitor.waiting("nobody answers at 127.0.0.1:5672")
    assert health(monitor).status == 200
    answer = readiness(monitor)
    said = json.loads(answer.body)
    assert answer.status == 503 and said["ready"] is False and said["role"] == "master"
    assert said["parts"] == {
        "broker": "waiting for it: nobody answers at 127.0.0.1:5672",
        "lock": "not taken yet",
        "disk": "ok",
        "log": "not read yet",
        "loop": "ok",
    }
    found = scraped(monitor)
    assert found["shared_encoder_ready|broker|master"] == 0 and found["shared_encoder_ready|disk|master"] == 1
    assert found["shared_encoder_broker_connected|master"] == 0


def test_a_loop_that_hangs_is_neither_alive_nor_ready(tmp_path: Path) -> None:
    clock = VirtualClock()
    service, monitor = FakeMaster(clock), monitor_of(clock, tmp_path, FakeBroker())
    monitor.made(service)
    monitor.update(service)
    assert (health(monitor).status, readiness(monitor).status) == (200, 200)
    clock.time += HUNG_SECONDS + 1
    assert (health(monitor).status, readiness(monitor).status) == (503, 503)


def test_of_the_last_error_its_fixed_words_are_shown_and_nothing_that_may_be_out_of_a_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noticed = Noticed()
    monitor: Any = NodeMonitor("a", tmp_path, noticed, clock=VirtualClock())
    assert "last_error" not in json.loads(readiness(monitor).body)
    configure_logging(noticed=noticed)
    log = structlog.get_logger()
    log.info("fine")
    log.warning("beware")
    log.error("cannot read", problem="patient 17 said")
    assert noticed.lines == {"warning": 1, "error": 1}
    said = readiness(monitor).body.decode()
    assert json.loads(said)["last_error"]["what"] == "cannot read" and "patient" not in said
    assert "patient 17 said" in capsys.readouterr().err, "the log has it in full"
    found = scraped(monitor)
    assert found["shared_encoder_logged_problems_total|error|node"] == 1
    assert found["shared_encoder_last_error_timestamp_seconds|node"] > 1e9


def test_the_table_of_the_page_is_the_codes() -> None:
    page = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    rows = list(itertools.takewhile(bool, page[page.index("| metric | kind |") :].splitlines()))
    assert rows == table.rows()


def test_the_page_has_every_alert_and_what_to_do() -> None:
    alerts = (Path(__file__).parents[3] / "deploy/monitoring/alerts.yml").read_text()
    page = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    names = [line.split("alert: ")[1] for line in alerts.splitlines() if "- alert: " in line]
    assert len(names) > 10
    assert [name for name in names if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("file", ["alerts.yml", "dashboard.json"])
def test_a_query_names_metrics_and_labels_that_there_are(file: str) -> None:
    """What a real Prometheus is asked takes longer: see tests/e2e/test_monitoring.py."""
    text = (Path(__file__).parents[3] / "deploy/monitoring" / file).read_text()
    named = re.findall(r"\bshared_encoder_(\w+)(?:\{([^}]*)\})?", text)
    assert len(named) > 10
    for name, labels in named:
        metric = table.BY_NAME[name.removesuffix("_bucket")]
        assert (metric.kind == "histogram") == name.endswith("_bucket")
        assert set(re.findall(r"(\w+)(?:=~|!=|=)", labels)) <= set(metric.labels), name
