"""What larger federations need: by numbers worked by hand, and against a simulated one."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import UserError
from tests.benchmarks.scale import Costs, Federation, checked, needs, shards, table

_ALONE = 4 * 0.001 + (4 * 2 + 3) * 0.025


def _pair(count: int) -> dict[str, Any]:
    """Of aggregators that together take a tenth more than a master alone, which then takes 2 ms for an update and 1 for
    each of them, as the broker does."""
    parts = {f"a{number}": 1.1 * _ALONE / count for number in range(1, count + 1)}
    cpu = {"master": 4 * (0.002 + 0.001 * count), "broker": 0.5 + 4 * 0.001 * count, **parts}
    sets = {"master": 0.0, "n0": 3.0, **dict.fromkeys(parts, 3.5)}
    many = {"rule": "fedavg", "parameters": 25_000_000, "nodes": 4, "shards": count, "sets_above": sets}
    many |= {"cpu_seconds_a_version": cpu, "peak_mib": dict.fromkeys(cpu, 1)}
    return {"one": {"cpu_seconds_a_version": {"master": _ALONE, "broker": 0.5}}, "many": many}


#: A master that takes 1 ms for an update, 2 ns for each of its parameters, and 3 ns for each of a version's.
FIGURES: dict[str, Any] = {
    "parts": {
        "synchronous": [
            {
                "parameters": 25_000_000,
                "nodes": 4,
                "up": "int8",
                "down": "bfloat16",
                "cpu_seconds_a_version": {"master": _ALONE, "broker": 0.5, "n0": 0.25},
                "sets_above": {"master": 3.5},
            }
        ],
        "asynchronous": [
            {
                "parameters": 10_000_000,
                "nodes": 4,
                "cpu_seconds_a_version": {"master": 2 * 0.001 + (2 * 2 + 3) * 0.01},
            }
        ],
        "fixed-cost": [{"cpu_milliseconds": 1.0}],
        "shards": [_pair(2), _pair(4)],
    }
}


def test_costs_are_those_that_the_figures_were_made_of() -> None:
    costs = Costs.measured(FIGURES)
    found = (costs.fixed, 1e9 * costs.update, 1e9 * costs.version, 1e9 * costs.node, costs.master_sets)
    assert found == pytest.approx((0.001, 2.0, 3.0, 10.0, 3.5))
    bears = Federation(100, 100_000_000).shortest(costs)
    assert bears["master's core"] == pytest.approx(100 * (0.001 + 0.2) + 2 * 0.3)
    assert bears["node's line"] == pytest.approx(200e6 / 12.5e6, rel=0.01)
    assert bears["broker's line"] == pytest.approx(100 * 301.6e6 / 1.25e9, rel=0.01)
    assert len(table(costs).rows) == len(needs(costs).rows) == 8
    assert all(sum("**" in cell for cell in row) == 1 for row in table(costs).rows), "one gives way first"
    with pytest.raises(UserError, match="lack fixed-cost"):
        Costs.measured({"parts": {name: rows for name, rows in FIGURES["parts"].items() if name != "fixed-cost"}})


def test_a_simulated_federation_moves_what_is_counted() -> None:
    for name, _, _, ratio in checked(nodes=10, returns=3, parameters=20_000).rows:
        assert 0.9 < float(ratio) < 1.1, name


def test_aggregators_help_until_something_else_is_narrower() -> None:
    costs = Costs.measured(FIGURES)
    found = (costs.shards.arithmetic, costs.shards.update, costs.shards.order, costs.shards.broker, costs.shards.sets)
    assert found == pytest.approx((1.1, 0.002, 0.001, 0.001, 3.5))
    federation = Federation(1000, 100_000_000)
    bears, sharded = federation.shortest(costs), federation.sharded(costs)
    assert sharded.busiest(costs.shards, 1) == pytest.approx(bears["master's disk"]), "a little more than its core"
    assert sharded.busiest(costs.shards, 4) == pytest.approx(1.1 * bears["master's core"] / 4)
    assert sharded.busiest(costs.shards, 64) == pytest.approx(1000 * 0.066), "then it is orders that take time"
    small, large = (1, 1), (8, 10)
    assert sharded.floor(costs.shards, 2, small) == pytest.approx(bears["broker's core"] + 2.0)
    assert sharded.floor(costs.shards, 2, large) == pytest.approx((bears["broker's core"] + 2.0) / 8)
    assert sharded.worth(costs.shards, small) == 1, "the broker is narrower than the master"
    assert sharded.worth(costs.shards, large) == 4, "221.8 seconds of cores by four are the broker's"
    assert sharded.needed(costs.shards, 2.01 * bears["master's disk"]) == 1
    assert sharded.needed(costs.shards, bears["master's core"]) == 3, "two would do if a tenth were not added"
    assert sharded.needed(costs.shards, 10.0) is None
    assert len(shards(costs).rows) == 8
