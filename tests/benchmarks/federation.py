"""A federation as users start it, master, aggregators and nodes as processes over a RabbitMQ, with training replaced by
a constant: how fast versions and updates come, and what they cost."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import Damaged, UserError
from common.numbers.slicing import EncodingName, elements, payload_size, shard_slices, slice_count
from master_service.log.message_log import open_log
from tests.benchmarks.party import moved_bytes, started
from tests.benchmarks.processes import cpu_seconds, family, is_forked, peak_bytes

#: Between two looks at the processes, seconds.
_LOOK_SECONDS = 0.2
#: Versions at the beginning that are not counted: everybody is still starting.
_WARM_UP = 2
#: How long an aggregator may take to end, seconds: it writes a snapshot.
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Shape:
    """What is run. `until`: limits of the section `stop`. `rule`: the section `rule`, with its preset. `shards`: more
    than one are so many aggregators beside the master."""

    nodes: int
    parameters: int
    up: EncodingName = "int8"
    down: EncodingName = "bfloat16"
    rule: Mapping[str, Any] = field(default_factory=lambda: {"preset": "fedavg"})
    update: Mapping[str, Any] = field(default_factory=lambda: {"when": {"steps": 1}})
    until: Mapping[str, Any] = field(default_factory=lambda: {"versions": 8})
    shards: int = 1

    @property
    def aggregators(self) -> dict[str, int]:
        """By party, how many numbers it has."""
        if self.shards == 1:
            return {}
        parts = shard_slices(slice_count(self.parameters), self.shards)
        return {f"a{number}": elements(self.parameters, part) for number, part in enumerate(parts, 1)}


@dataclass(frozen=True)
class Run:
    """What came of it. `versions` and `updates`: when each was logged, seconds since 1970. Of each party: seconds of
    the processor and bytes of message bodies (sent, given) between the versions that are counted, and the most memory
    it had, bytes; the broker is one, but for the bytes. `notes`: what each but the broker wrote down of itself (see
    `party`). `adopted`: how many versions each node took."""

    shape: Shape
    versions: list[float]
    updates: list[float]
    cpu: dict[str, float]
    moved: dict[str, tuple[int, int]]
    peak: dict[str, int]
    notes: dict[str, dict[str, int]]
    adopted: dict[str, int]

    @property
    def round_seconds(self) -> float:
        """The median time from one version to the next."""
        counted = self.versions[_WARM_UP:]
        return statistics.median(after - before for before, after in itertools.pairwise(counted))

    @property
    def updates_per_second(self) -> float:
        """Of those logged between the first counted version and the last."""
        begin, end = self.versions[_WARM_UP], self.versions[-1]
        return sum(begin < at <= end for at in self.updates) / (end - begin)

    @property
    def sets_above(self) -> dict[str, float]:
        """The most memory of a party above what it had before there was an encoder, in float32 sets; a node's without
        the parameters of its model, which has neither gradients nor an optimiser; an aggregator's in sets of its
        part."""
        parts = self.shape.aggregators
        return {
            party: (notes["peak"] - notes["before"]) / (4.0 * (parts.get(party) or self.shape.parameters))
            - (party in self.adopted)
            for party, notes in self.notes.items()
        }

    @property
    def read_per_adopted(self) -> float:
        """Bytes that all nodes have received from the stream, by those of the versions that they took."""
        taken = payload_size(self.shape.parameters, self.shape.down) * sum(self.adopted.values())
        return sum(self.notes[node]["stream_bytes"] for node in self.adopted) / max(1, taken)

    def figures(self) -> dict[str, Any]:
        """Plain, for JSON."""
        rounds = len(self.versions) - 1 - _WARM_UP
        return {
            "nodes": self.shape.nodes,
            "parameters": self.shape.parameters,
            "shards": self.shape.shards,
            "up": self.shape.up,
            "down": self.shape.down,
            "rule": self.shape.rule["preset"],
            "versions": len(self.versions),
            "round_seconds": self.round_seconds,
            "updates_per_second": self.updates_per_second,
            "cpu_seconds_a_version": {party: seconds / max(1, rounds) for party, seconds in self.cpu.items()},
            "sent_a_version": {party: round(sent / max(1, rounds)) for party, (sent, _) in self.moved.items()},
            "given_a_version": {party: round(given / max(1, rounds)) for party, (_, given) in self.moved.items()},
            "peak_mib": {party: round(peak / 2**20) for party, peak in self.peak.items()},
            "before_mib": {party: round(notes["before"] / 2**20) for party, notes in self.notes.items()},
            "sets_above": {party: round(sets, 2) for party, sets in self.sets_above.items()},
            "adopted_a_node": statistics.mean(self.adopted.values()),
            "read_per_adopted": round(self.read_per_adopted, 3),
            "read_twice": sum(self.notes[node]["stream_repeated"] for node in self.adopted),
        }


def run(shape: Shape, url: str, directory: Path, *, patience: float = 300.0) -> Run:
    """Start the processes, wait until the encoder is finished, and read their log. Raises RuntimeError with the last
    words of a process that failed, or after `patience` seconds."""
    directory.mkdir(parents=True)
    names = [f"n{number}" for number in range(shape.nodes)]
    file = _configuration(shape, url, directory, names)
    broker = [pid for pid in family(os.getpid())[1:] if not is_forked(pid)]
    options = ["--config", str(file), "--json"]
    parties = {"master": started("master", directory, ["master", *options])}
    parties |= {name: started(name, directory, ["node", name, *options]) for name in names}
    # these know no end of their own
    aggregators = {
        name: started(name, directory, _aggregator(shape, number, directory / name, options))
        for number, name in enumerate(shape.aggregators, 1)
    }
    meter = _Meter(
        {name: [process.pid or 0] for name, process in (parties | aggregators).items()} | {"broker": broker}, directory
    )
    deadline = time.monotonic() + patience
    try:
        while any(process.exitcode is None for process in parties.values()):
            time.sleep(_LOOK_SECONDS)
            meter.look(_count(directory))
            failed = [name for name, process in (parties | aggregators).items() if process.exitcode]
            if failed or time.monotonic() > deadline:
                name = failed[0] if failed else "master"
                words = (directory / f"{name}.log").read_text(errors="replace")[-1500:]
                raise RuntimeError(f"{name} {'failed' if failed else 'did not end'}: {words}")
        for process in aggregators.values():
            process.terminate()
            process.join(_END_SECONDS)
    finally:
        for process in (parties | aggregators).values():
            if process.exitcode is None:
                process.kill()
            process.join()
    notes = {party: json.loads((directory / f"{party}.json").read_text()) for party in parties | aggregators}
    log = open_log(directory / "master", read_only=True)
    rows = [(row.kind, row.at) for row in log.rows() if row.kind == "versioned" or row.payload is not None]
    log.close()
    return Run(
        shape,
        [at for kind, at in rows if kind == "versioned"],
        [at for kind, at in rows if kind == "update"],
        meter.spent(),
        meter.moved(),
        meter.peak | {party: each["peak"] for party, each in notes.items()},
        notes,
        {name: _adopted(directory / f"{name}.log") for name in names},
    )


class _Meter:
    """Reads what the parties' processes use; `spent` and `moved` between the first counted version and the last
    look."""

    def __init__(self, parties: dict[str, list[int]], directory: Path) -> None:
        self._parties = parties
        self._directory = directory
        self._bytes_from: dict[str, tuple[int, int]] = {}
        self._bytes_to: dict[str, tuple[int, int]] = {}
        self._from: dict[str, float] | None = None
        self._to: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self._seen = 0
        self.peak = dict.fromkeys(parties, 0)

    def look(self, versions: int) -> None:
        now = {party: sum(map(cpu_seconds, pids)) for party, pids in self._parties.items()}
        # of a process that has ended nothing is said any more
        now = {party: max(seconds, self._now.get(party, 0.0)) for party, seconds in now.items()}
        self._now = now
        for party, pids in self._parties.items():
            self.peak[party] = max(self.peak[party], sum(map(peak_bytes, pids)))
        if versions > self._seen:
            moved = {party: moved_bytes(self._directory, party) for party in self._parties if party != "broker"}
            if versions > _WARM_UP and self._from is None:
                self._from, self._bytes_from = now, moved
            self._seen, self._to, self._bytes_to = versions, now, moved

    def spent(self) -> dict[str, float]:
        begun = self._from or {}
        return {party: seconds - begun.get(party, 0.0) for party, seconds in self._to.items()}

    def moved(self) -> dict[str, tuple[int, int]]:
        none = (0, 0)
        begun = {party: self._bytes_from.get(party, none) for party in self._bytes_to}
        return {
            party: (sent - begun[party][0], given - begun[party][1]) for party, (sent, given) in self._bytes_to.items()
        }


def _adopted(log: Path) -> int:
    """How many versions a node took, by its own log; the last one is not adopted but finished with."""
    return 1 + sum('"version adopted"' in line for line in log.read_text(errors="replace").splitlines())


def _count(directory: Path) -> int:
    """How many versions are logged."""
    try:
        log = open_log(directory / "master", read_only=True)
    except (FileNotFoundError, Damaged, UserError):
        return 0  # not yet
    try:
        return log.count("versioned")
    finally:
        log.close()


def _aggregator(shape: Shape, number: int, state: Path, options: list[str]) -> list[str]:
    """The arguments of one, from 1 on."""
    return ["aggregator", "--shard", f"{number}/{shape.shards}", "--state", str(state), *options]


def _configuration(shape: Shape, url: str, directory: Path, names: list[str]) -> Path:
    update = {**shape.update, "encoding": shape.up, "evaluate_every": 0, "finish": {"what": "none"}}
    lines = [
        f'[broker]\nurl = "{url}"\nnamespace = "bench-{uuid.uuid4().hex[:8]}"',
        f'[master]\nstate_dir = "{directory}/master"\nexport_dir = "{directory}/encoder"\nexit_when_finished = true',
        f'encoding = "{shape.down}"\nshards = {shape.shards}',
        f'[encoder]\nget = "constant"\nmin_nodes = {shape.nodes}\narchitecture = {{parameters = {shape.parameters}}}',
        f"[rule]\n{_toml(shape.rule)}",
        f"[stop]\n{_toml(shape.until)}",
        f"[update]\n{_toml(update)}",
    ]
    lines += [
        f'[nodes.{name}]\nstate_dir = "{directory}/{name}"\nexit_when_finished = true\n'
        'corpus = {entry_point = "tests.benchmarks.constant:samples", type = "constant"}'
        for name in names
    ]
    file = directory / "run.toml"
    file.write_text("\n".join(lines))
    return file


def _toml(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{key} = {_value(value)}" for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)
