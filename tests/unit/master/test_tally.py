"""F11: what one update costs the master does not grow with the number of nodes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from common.wire.to_master import Fetch
from master_service.decisions.records import Tick
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import StopRule
from tests.unit.scenario import Scenario


class Watched(dict[str, Any]):
    """Members, and how often anybody looked through them."""

    looks = 0

    def __iter__(self) -> Iterator[str]:
        self.looks += 1
        return super().__iter__()

    def values(self) -> Any:
        self.looks += 1
        return super().values()

    def items(self) -> Any:
        self.looks += 1
        return super().items()

    def keys(self) -> Any:
        self.looks += 1
        return super().keys()


class Work:
    """Counts the byte codes that are run in the master's decisions: work without a clock."""

    def __init__(self) -> None:
        self.done = 0

    def __enter__(self) -> Work:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if "master_service/decisions" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.done += event == "opcode"
        return self._trace


def round_of_updates(preset: str, nodes: int) -> tuple[float, int]:
    """Every node hands in one update, asks for the next version, and a deadline is looked for after each: the work for
    one of them, and how often the members were looked through."""
    run = Scenario(rule=aggregation_rule(preset), stop=StopRule(versions=10**6))
    name = run.generate()
    for number in range(nodes):
        run.join(f"n{number}", name)
    encoder = run.coordinator.state.encoders[name]
    members = encoder.members = Watched(encoder.members)
    with Work() as work:
        for number in range(nodes):
            node = f"n{number}"
            manifest = run.manifest(node, name, 0)
            run.coordinator.wants_payload(manifest)
            run.apply(manifest, *run.payload(manifest))
            run.apply(manifest.model_copy(update={"attempt": 1}))
            run.apply(Fetch(node=node, incarnation="first", encoder=name, have_version=encoder.version))
            run.coordinator.deadline()
        run.apply(Tick())
    assert encoder.version > 0 and encoder.updates == nodes
    return work.done / nodes, members.looks


@pytest.mark.parametrize("preset", ["fedavg", "fedasync", "fedbuff", "return-count"])
def test_f11_an_update_costs_as_much_among_many_nodes_as_among_few(preset: str) -> None:
    # more updates than the guards look back on, so that their share is the same
    (few, _), (many, looks) = round_of_updates(preset, 150), round_of_updates(preset, 600)
    assert looks == 0, "somebody looks through all members"
    assert many < 1.5 * few, f"{few:.0f} byte codes an update among 150 nodes, {many:.0f} among 600"
