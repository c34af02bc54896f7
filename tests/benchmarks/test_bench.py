"""The benchmark runs and adds up; what it says of time is nobody's to assert."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.__main__ import measured, show
from tests.benchmarks.federation import Shape


@pytest.mark.timeout(300)
def test_the_benchmark_runs_and_adds_up(tmp_path: Path) -> None:
    free = Shape(2, 3000, rule={"preset": "return-count"})
    figures = measured([Shape(2, 3000)], [free], tmp_path, versions=6, seconds=3.0)
    [row], [beside] = figures["synchronous"], figures["asynchronous"]
    assert row["versions"] == 6 and row["round_seconds"] > 0 and row["lean"]["round_seconds"] > 0
    assert row["updates_per_second"] == pytest.approx(2 / row["round_seconds"], rel=1.0), "two in every round"
    assert beside["updates_per_second"] > 0
    for each in (row, beside):
        assert set(each["peak_mib"]) == {"master", "n0", "n1", "broker"} and min(each["peak_mib"].values()) > 10
    said = Console(file=io.StringIO(), width=160)
    show(figures, said)
    assert "2 × 3,000" in said.file.getvalue()  # type: ignore[attr-defined]
