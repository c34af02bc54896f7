"""Thousands of interleavings of master, nodes and broker, with every fault between them; and that the harness can fail.

`FAULT_EXAMPLES=20000 pytest tests/faults/test_interleavings.py` looks further than the suite does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from tests.faults.interleavings import FAULTS, RULES, STOPS, Act, Plan, weather
from tests.faults.simulated import simulated

EXAMPLES = int(os.environ.get("FAULT_EXAMPLES", "500"))
FOUND = Path(__file__).parents[1] / "logs" / "counterexamples.json"


def _actions() -> list[Act]:
    """What may happen next, the likelier the more often it is here; simple things first, to shrink towards them."""
    plain: list[Act] = [("run", 1), ("run", 4), ("run", 15), *([("run", 40)] * 3)]
    node: list[Act] = []
    for each in range(4):
        node += [*([("train", each)] * 6), ("hear", each), ("hear", each), ("send", each), ("send", each)]
        node += [("read", each), ("alive", each), ("ask", each), ("leave", each), ("start_node", each)]
        node += [("start_node", each), ("channel", each), ("wipe", each), ("backup", each), ("restore", each)]
        node += [("restart_node", each), *(("kill_node", each, steps) for steps in (0, 1, 2, 3, 5))]
        node += [("fault", each, fault) for fault in FAULTS]
    master: list[Act] = [("take", each) for each in ("inbox", "updates", "chunks")] * 5
    master += [("prefetch", each) for each in ("inbox", "updates", "chunks")]
    master += [("kill_master", steps) for steps in (0, 1, 2, 3, 4, 6, 9, 13, 20)] * 2
    master += [("restart_master", True), ("restart_master", False), ("start_master", True), ("start_master", False)] * 3
    master += [("stop_master",), ("snapshot",), ("snapshot",), ("channel", "master"), ("chunks_missing",)] * 2
    master += [("fault", "master", fault) for fault in FAULTS] * 2
    master += [("later", 5.0), ("later", 31.0), ("later", 46.0), *(("settings", rule) for rule in RULES)]
    operator: list[Act] = [("operator", what) for what in ("stop", "continue", "continue", "get", "image")]
    operator += [("fault", "operator", fault) for fault in FAULTS]
    return [*plain * 3, *node, *master, *operator]


PLANS = st.builds(
    Plan,
    rule=st.sampled_from(RULES),
    nodes=st.integers(1, 4),
    present=st.integers(1, 4),
    min_nodes=st.sampled_from([1, 1, 2]),
    stop=st.sampled_from([0, 0, 0, 0, *range(1, len(STOPS))]),
    warm=st.booleans(),
    actions=st.lists(st.sampled_from(_actions()), min_size=10, max_size=60).map(tuple),
)
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.fixture(scope="module", autouse=True)
def _simulated() -> Iterator[None]:
    with simulated():
        yield


@settings(QUICK, max_examples=EXAMPLES)
@given(PLANS)
def test_whatever_happens_nothing_is_lost_and_nothing_is_doubled(plan: Plan) -> None:
    weather(plan)
