"""The benchmark runs and adds up; what it says of time is nobody's to assert."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import UserError
from tests.benchmarks.federation import Shape
from tests.benchmarks.hand_fed import fixed_cost, master_peak, small_messages
from tests.benchmarks.hand_out import hand_out
from tests.benchmarks.measured import PARTS, Parts, asynchronous, measured, merged, sharded, synchronous
from tests.benchmarks.simulated import simulated
from tests.benchmarks.tables import document, show

#: As PARTS, but all of it small.
SMALL: Parts = {
    "synchronous": [lambda bench: synchronous(bench, shape=Shape(2, 3000), versions=6, raw_versions=3)],
    "asynchronous": [
        lambda bench: asynchronous(bench, shape=Shape(2, 3000, rule={"preset": "return-count"}), seconds=2.0)
    ],
    "fixed-cost": [lambda bench: fixed_cost(bench.url, bench.place(), nodes=2, each=4)],
    "small-messages": [lambda bench: small_messages(bench.url, bench.place(), nodes=2, each=5)],
    "master-peak": [lambda bench: master_peak(bench.url, bench.place(), parameters=3000, nodes=2, updates=4)],
    "hand-out": [lambda bench: hand_out(bench.url, parameters=3000, readers=2, versions=2)],
    "simulated": [lambda bench: simulated(bench.place(), nodes=50, returns=2)],
    "shards": [
        lambda bench: sharded(bench, shape=Shape(2, 2_000_000, until={"versions": 6}, shards=2)),
    ],
}


@pytest.mark.timeout(300)
def test_the_benchmark_runs_and_adds_up(tmp_path: Path) -> None:
    assert SMALL.keys() == PARTS.keys()
    figures = json.loads(json.dumps(measured(SMALL, tmp_path)))
    assert figures["run"]["rabbitmq"] and figures["run"]["command"]
    parts = {name: rows[0] for name, rows in figures["parts"].items()}
    row, beside = parts["synchronous"], parts["asynchronous"]
    assert row["versions"] == 6 and row["round_seconds"] > 0 and row["lean"]["round_seconds"] > 0
    assert row["updates_per_second"] == pytest.approx(2 / row["round_seconds"], rel=1.0), "two in every round"
    assert row["adopted_a_node"] == 7, "each version, and the first"
    for each in (row, beside):
        assert set(each["peak_mib"]) == {"master", "n0", "n1", "broker"} and min(each["peak_mib"].values()) > 10
        assert each["updates_per_second"] > 0
        assert each["read_twice"] == 0 and each["read_per_adopted"] >= 1.0
    assert row["read_per_adopted"] < 1.3, "in a round each takes every version; beside that it reads past small ones"
    assert parts["fixed-cost"]["updates"] == 8 and parts["fixed-cost"]["milliseconds"] > 0
    assert min(parts["small-messages"]["per_second"].values()) > 0
    assert parts["master-peak"]["versions"] == 2 and parts["master-peak"]["above_mib"] > 0
    assert parts["hand-out"]["seconds"] > 0 and parts["hand-out"]["raw_seconds"] > 0
    assert parts["simulated"]["updates"] == 100
    one, many = parts["shards"]["one"], parts["shards"]["many"]
    assert set(many["peak_mib"]) - set(one["peak_mib"]) == {"a1", "a2"} and min(many["peak_mib"].values()) > 10
    assert one["versions"] == many["versions"] == 6 and many["adopted_a_node"] == 7
    # of the few versions that are counted, one or two may leave beside that
    assert one["sent_a_version"]["master"] > 1_000_000, "a version of 4 MB"
    sent, given = many["sent_a_version"], many["given_a_version"]
    assert sent["master"] < 100_000 and min(sent["a1"], sent["a2"]) > 500_000, "words, and half of a version each"
    assert min(given["a1"], given["a2"]) > 500_000, "half of each update of 2 MB"
    said = Console(file=io.StringIO(), width=160)
    show(figures, said, before=figures)
    assert "2 × 3,000" in said.file.getvalue()  # type: ignore[attr-defined]

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: hand-out -->\nold\n<!-- end of bench -->\nafter\n")
    assert document(page, figures) == ["hand-out"]
    words = page.read_text()
    assert words.startswith("before\n<!-- bench: hand-out -->\n| readers") and words.endswith("bench -->\nafter\n")
    assert "| 2 readers, 3,000 |" in words and figures["run"]["date"] in words and "old" not in words
    assert document(page, figures, before=figures) and page.read_text().count("UTC") == 2
    page.write_text("no marks")
    with pytest.raises(UserError, match="no table to write"):
        document(page, figures)


def test_of_several_runs_the_medians_count() -> None:
    rows = [{"name": "a", "nodes": 7, "raw": {"seconds": seconds}} for seconds in (1.0, 5.0, 2.0)]
    assert merged(rows) == {"name": "a", "nodes": 7, "raw": {"seconds": 2.0}, "each": rows}
    assert merged(rows[:1]) == rows[0]
