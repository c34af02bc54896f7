"""What federations of other sizes need, from what was measured of small ones.

    python -m tests.benchmarks.scale bench.json shards.json --check

What is counted: bytes, as the protocol moves them (see `Federation`), and processor seconds for an update, a parameter
and a byte, as `make bench` found them, without aggregators and with. What it gives is, for each resource, the shortest
time between two updates of a node that it can bear; the longest of these is where the federation breaks first.
`--check` simulates a small one, and puts its bytes beside those that are counted here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console

from common.errors import EXIT_USER_ERROR, UserError
from common.numbers.slicing import payload_size, slice_count
from tests.benchmarks.scale_shards import ShardCosts, Sharded, worth
from tests.benchmarks.tables import Table, placed, provenance

NODES = (10, 100, 1_000, 10_000)
PARAMETERS = (100_000_000, 1_000_000_000)
#: Bytes a second: a member's line, that of the master's and of the broker's host, and what a disk writes for long.
LINE, HOST_LINE, DISK = 12.5e6, 1.25e9, 0.5e9
#: Beside an update's chunks and a version's: manifest, receipt, notice, and each chunk's header, bytes.
_SMALL, _CHUNK_HEAD = 2_000, 500


@dataclass(frozen=True)
class Costs:
    """Processor seconds. `update`, `version`: of the master, for a parameter of an update and of a version; `fixed`: of
    the master, for an update beside its parameters; `broker`: for a byte, in or out; `node`: for a parameter, of
    handing in and adopting. `master_sets`: the master's memory in float32 sets. `shards`: what aggregators cost, each
    beside the master."""

    fixed: float
    update: float
    version: float
    broker: float
    node: float
    master_sets: float
    shards: ShardCosts

    @classmethod
    def measured(cls, figures: dict[str, Any]) -> Costs:
        """From the parts synchronous, asynchronous, fixed-cost and shards of the benchmark. Raises UserError without
        them."""
        parts = figures["parts"]
        if lacking := {"synchronous", "asynchronous", "fixed-cost", "shards"} - parts.keys():
            raise UserError(
                f"these figures lack {', '.join(sorted(lacking))}; make bench measures all but shards, and with "
                'ARGS="--only shards --out shards.json" those'
            )
        # a round: `nodes` updates and a version; in the asynchronous one, half as many updates to a version
        round_ = next(row for row in parts["synchronous"] if row["parameters"] == 25_000_000 and row["up"] == "int8")
        free = max(parts["asynchronous"], key=lambda row: row["parameters"])
        fixed = parts["fixed-cost"][0]["cpu_milliseconds"] / 1000
        many, few = round_["nodes"], free["nodes"] / 2
        of_many = (round_["cpu_seconds_a_version"]["master"] - many * fixed) / round_["parameters"]
        of_few = (free["cpu_seconds_a_version"]["master"] - few * fixed) / free["parameters"]
        update = min(max((of_many - of_few) / (many - few), 0.0), of_many / many)
        up, down = (payload_size(round_["parameters"], encoding) for encoding in (round_["up"], round_["down"]))
        moved = many * up * 2 + down * (1 + many)
        largest = max(parts["synchronous"], key=lambda row: row["parameters"])
        return cls(
            fixed=fixed,
            update=update,
            version=max(of_many - many * update, 0.0),
            broker=round_["cpu_seconds_a_version"]["broker"] / moved,
            node=round_["cpu_seconds_a_version"]["n0"] / round_["parameters"],
            master_sets=largest["sets_above"]["master"],
            shards=ShardCosts.measured(parts["shards"]),
        )


@dataclass(frozen=True)
class Federation:
    """`nodes` of one encoder of so many parameters, by default rule and encodings: an update is int8, a version is
    bfloat16, half of the nodes' updates make a version, and each node takes one with each of its updates."""

    nodes: int
    parameters: int

    @property
    def up(self) -> int:
        """Bytes of an update on a node's line."""
        return payload_size(self.parameters, "int8") + slice_count(self.parameters) * _CHUNK_HEAD

    @property
    def down(self) -> int:
        """Bytes of a version on a node's line."""
        return payload_size(self.parameters, "bfloat16") + slice_count(self.parameters) * _CHUNK_HEAD

    @property
    def versions(self) -> float:
        """Versions in the time in which every node hands in once."""
        return self.nodes / max(2, -(-self.nodes // 2))

    @property
    def broker_in(self) -> float:
        """Bytes into the broker in that time."""
        return self.nodes * (self.up + _SMALL) + self.versions * self.down

    @property
    def broker_out(self) -> float:
        """Bytes out of it: every update to the master, a version to every node."""
        return self.nodes * (self.up + self.down + 2 * _SMALL)

    def shortest(self, costs: Costs, replicas: int = 1) -> dict[str, float]:
        """By resource: the shortest time between two updates of a node that it can bear, seconds."""
        master = self.nodes * (costs.fixed + costs.update * self.parameters)
        return {
            "node's line": max(self.up, self.down) / LINE,
            "node's core": costs.node * self.parameters,
            "master's core": master + self.versions * costs.version * self.parameters,
            "master's line": max(self.nodes * self.up, self.versions * self.down) / HOST_LINE,
            "master's disk": self.nodes * self.up / DISK,
            "broker's core": costs.broker * (self.broker_in + self.broker_out),
            "broker's line": max(self.broker_in, self.broker_out) / HOST_LINE,
            # of one server the chunk queues are transient
            "broker's disk": replicas * (self.nodes * self.up * (replicas > 1) + self.versions * self.down) / DISK,
        }

    def sharded(self, costs: Costs) -> Sharded:
        """What aggregators change, and what they do not."""
        bears = self.shortest(costs)
        alone = {each: bears.pop(f"master's {each}") for each in ("core", "line", "disk")}
        core, line = bears.pop("broker's core"), bears.pop("broker's line")
        return Sharded(self.nodes, alone, core, line, max(bears.values()))


def table(costs: Costs) -> Table:
    """For each size what each resource can bear, the narrowest in bold; then what an update every so often needs."""
    resources = list(Federation(1, 1).shortest(costs))
    rows = []
    for parameters in PARAMETERS:
        for nodes in NODES:
            bears = Federation(nodes, parameters).shortest(costs)
            narrowest = max(bears.values())
            rows.append(
                [
                    f"{nodes:,} × {parameters / 1e6:,.0f} M",
                    *(
                        f"**{_time(bears[each])}**" if bears[each] == narrowest else _time(bears[each])
                        for each in resources
                    ),
                ]
            )
    title = (
        "The shortest time between two updates of a node that each resource can bear, alone; lines of 100 Mbit/s at "
        "the nodes and 10 Gbit/s at master and broker, disks of 500 MB/s, one core each"
    )
    return Table(title, ["nodes × parameters", *resources], rows)


def needs(costs: Costs, every: Sequence[tuple[int, float]] = ((100_000_000, 600.0), (1_000_000_000, 3600.0))) -> Table:
    """What an update of every node each so many seconds needs."""
    rows = []
    for parameters, seconds in every:
        for nodes in NODES:
            federation = Federation(nodes, parameters)
            bears = federation.shortest(costs)
            tripled = federation.shortest(costs, replicas=3)
            kept = nodes * federation.up * 86_400 / seconds
            master, broker, written = bears["master's core"], bears["broker's core"], DISK * tripled["broker's disk"]
            rows.append(
                [
                    f"{nodes:,} × {parameters / 1e6:,.0f} M, every {_time(seconds)}",
                    f"{master / seconds:,.2f}",
                    f"{costs.master_sets * 4 * parameters / 1e9:,.1f} GB",
                    f"{_rate(nodes * federation.up / seconds)}",
                    f"{kept / 1e12:,.2f} TB",
                    _aggregators(federation, costs, seconds),
                    f"{broker / seconds:,.2f}",
                    f"{_rate(federation.broker_in / seconds)}",
                    f"{_rate(federation.broker_out / seconds)}",
                    f"{_rate(written / seconds)}",
                    f"{nodes * 4:,} and {nodes * 2:,}",
                ]
            )
    headings = [
        "federation",
        "master's cores",
        "its memory",
        "its disk",
        "payloads a day",
        "aggregators",
        "broker's cores",
        "in",
        "out",
        "three replicas write",
        "queues and connections",
    ]
    title = (
        "What a pace needs; as many aggregators as neither they nor the master are busy for more than half of the time "
        'with; payloads are what `retention = "all"` keeps'
    )
    return Table(title, headings, rows)


def _aggregators(federation: Federation, costs: Costs, seconds: float) -> str:
    """How many are needed, and the memory of each."""
    needed = federation.sharded(costs).needed(costs.shards, seconds)
    if needed is None:
        return "not enough"
    memory = costs.shards.sets * 4 * federation.parameters / needed
    return "none" if needed == 1 else f"{needed} of {memory / 1e9:,.1f} GB"


def shards(costs: Costs) -> Table:
    """How many aggregators are worth what."""
    federations = [
        (f"{nodes:,} × {parameters / 1e6:,.0f} M", Federation(nodes, parameters).sharded(costs))
        for parameters in PARAMETERS
        for nodes in NODES
    ]
    return worth(federations, costs.shards, _time)


def checked(nodes: int = 40, returns: int = 5, parameters: int = 20_000) -> Table:
    """The bytes of a simulated federation beside those that are counted here."""
    from deploy.simulation.plan import Plan
    from deploy.simulation.report import summary
    from deploy.simulation.simulation import Simulation
    from master_service.log.message_log import open_log

    federation = Federation(nodes, parameters)
    with tempfile.TemporaryDirectory() as directory:
        run = Simulation(Plan(nodes=nodes, returns=returns, parameters=parameters, steps=2), Path(directory))
        run.run()
        with closing(open_log(Path(directory), read_only=True)) as log:
            traffic = summary(run, log)["traffic"]
            versions = log.count("versioned")
    updates = nodes * returns
    rows = [
        ["up, bytes an update", traffic["bytes_up"] / updates, federation.up + _SMALL / 2],
        ["down, bytes a version taken", traffic["bytes_down"] / traffic["versions_read"], federation.down + _SMALL],
        ["versions an update", versions / updates, federation.versions / nodes],
        ["versions taken an update, with the first", traffic["versions_read"] / updates, 1.0 + 1.0 / returns],
    ]
    lines = [[str(name), f"{found:,.2f}", f"{said:,.2f}", f"{found / said:.2f}"] for name, found, said in rows]
    title = f"{nodes} simulated nodes × {returns} returns, {parameters:,} parameters"
    return Table(title, ["", "simulated", "counted here", "ratio"], lines)


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:,.0f} ms"
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e6:,.1f} MB/s"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.scale", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "figures", type=Path, nargs="+", help="bench.json, or several that have what is needed together"
    )
    parser.add_argument("--check", action="store_true", help="simulate a small one too, and compare")
    parser.add_argument("--document", type=Path, help="write the tables into this file, where its marks are")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    try:
        read = [json.loads(file.read_text()) for file in given.figures]
        together = {"parts": {name: rows for each in read for name, rows in each["parts"].items()}}
        costs = Costs.measured(together)
        made = {"scale": table(costs), "shards": shards(costs), "needs": needs(costs)}
        made |= {"check": checked()} if given.check else {}
        console = Console(width=200)
        for each in made.values():
            console.print(each.rich())
        if given.document is not None:
            words = " ".join(provenance(each["run"]) for each in read)
            said = {name: f"{each.title}. From {words}" for name, each in made.items() if name != "check"}
            said |= {name: f"{each.title}." for name, each in made.items() if name == "check"}
            print(
                "written:", *placed(given.document, {name: f"{made[name].markdown()}\n{said[name]}" for name in made})
            )
    except (OSError, ValueError) as error:
        print(f"error: {error}; make bench writes figures", file=sys.stderr)
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
