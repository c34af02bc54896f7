"""The benchmark of the node's arithmetic runs, and says what it promises; no time is asserted."""

from __future__ import annotations

import math
import sys
from typing import get_args

from common.numbers.slicing import EncodingName
from tests.benchmarks.node_arithmetic import measured


def test_every_figure_is_there() -> None:
    figures = measured(3000, runs=1)
    for encoding in get_args(EncodingName):
        for what in ("hand in", "manifest", "encode", "decode", "add four", "sha256", "peak sets"):
            assert f"{what} {encoding}" in figures
    assert {"adopt float32", "adopt bfloat16", "drift", "shared()", "checkpoint", "peak sets checkpoint"} <= set(
        figures
    )
    sets = {name: value for name, value in figures.items() if name.startswith("peak sets")}
    assert all(value > 0 for name, value in figures.items() if name not in sets and name != "shared()")
    assert len(sets) == 5 and (not sys.platform.startswith("linux") or all(map(math.isfinite, sets.values())))
