"""What larger federations need: by numbers worked by hand, and against a simulated one."""

from __future__ import annotations

import pytest

from common.errors import UserError
from tests.benchmarks.scale import Costs, Federation, checked, needs, table

#: A master that takes 1 ms for an update, 2 ns for each of its parameters, and 3 ns for each of a version's.
FIGURES = {
    "parts": {
        "synchronous": [
            {
                "parameters": 25_000_000,
                "nodes": 4,
                "up": "int8",
                "down": "bfloat16",
                "cpu_seconds_a_version": {"master": 4 * 0.001 + (4 * 2 + 3) * 0.025, "broker": 0.5, "n0": 0.25},
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
