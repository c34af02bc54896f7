"""What aggregators beside the master are worth to a larger federation, from what was measured of a few: see `scale`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.wire.fields import MAX_SHARDS
from tests.benchmarks.tables import Table, aggregators

#: How many of them a row says something about.
SHARDS = (1, 2, 4, 8, 16)
#: How many cores, and lines like those of other hosts, the broker may have.
BROKERS = ((1, 1), (8, 10))


@dataclass(frozen=True)
class ShardCosts:
    """`arithmetic`: processor seconds of all aggregators together, by those of a master that does it alone. Of an
    update, processor seconds of the master: `update` whatever its size, and `order` for each aggregator; and of the
    broker, besides its bytes, `broker` for each aggregator. `sets`: an aggregator's memory in float32 sets of its
    part."""

    arithmetic: float
    update: float
    order: float
    broker: float
    sets: float

    @classmethod
    def measured(cls, rows: Sequence[dict[str, Any]]) -> ShardCosts:
        """From the part `shards` of the benchmark: of its rounds, pairs with few aggregators and with more."""
        rounds = [row for row in rows if row["many"]["rule"] == "fedavg" and row["many"]["parameters"] == 25_000_000]
        few, more = sorted(rounds, key=lambda row: int(row["many"]["shards"]))[:2]
        first, second = few["many"], more["many"]
        at_few, at_more = (row["cpu_seconds_a_version"]["master"] / row["nodes"] for row in (first, second))
        order = max(0.0, (at_more - at_few) / (second["shards"] - first["shards"]))
        besides = sum(_spent(row["many"], "broker") - _spent(row["one"], "broker") for row in (few, more))
        together = sum(_spent(first, party) for party in aggregators(first))
        largest = max((row["many"] for row in rows), key=lambda many: int(many["parameters"]))
        return cls(
            arithmetic=together / _spent(few["one"], "master"),
            update=max(0.0, at_few - first["shards"] * order),
            order=order,
            broker=max(0.0, besides) / sum(row["nodes"] * row["shards"] for row in (first, second)),
            sets=max(largest["sets_above"][party] for party in aggregators(largest)),
        )


@dataclass(frozen=True)
class Sharded:
    """A federation whose numbers lie with aggregators, in the time in which each of its `nodes` hands in once. `alone`:
    seconds that the master's core, line and disk are busy without them; `broker`: the broker's core then; `line`: its
    line; `other`: what else is the same with them and without."""

    nodes: int
    alone: dict[str, float]
    broker: float
    line: float
    other: float

    def busiest(self, costs: ShardCosts, shards: int) -> float:
        """Of the master and its aggregators, each on a host of its own: seconds that the narrowest resource is busy."""
        if shards == 1:
            return max(self.alone.values())
        orders = self.nodes * (costs.update + shards * costs.order)
        core = costs.arithmetic * self.alone["core"] / shards
        return max(orders, core, self.alone["line"] / shards, self.alone["disk"] / shards)

    def floor(self, costs: ShardCosts, shards: int, broker: tuple[int, int]) -> float:
        """What no aggregator makes shorter: the broker, with so many cores and lines, and the nodes."""
        orders = self.nodes * shards * costs.broker if shards > 1 else 0.0
        cores, lines = broker
        return max(self.other, self.line / lines, (self.broker + orders) / cores)

    def worth(self, costs: ShardCosts, broker: tuple[int, int]) -> int:
        """With how many the time between two updates of a node is the shortest; the fewest within 5 % of that."""
        bears = {
            shards: max(self.busiest(costs, shards), self.floor(costs, shards, broker))
            for shards in range(1, MAX_SHARDS + 1)
        }
        shortest = min(bears.values())
        return min(shards for shards, seconds in bears.items() if seconds <= 1.05 * shortest)

    def needed(self, costs: ShardCosts, seconds: float) -> int | None:
        """The fewest with which neither master nor aggregator is busy for more than half of so many seconds; None if
        no number of them is enough."""
        enough = (n for n in range(1, MAX_SHARDS + 1) if self.busiest(costs, n) <= seconds / 2)
        return next(enough, None)


def worth(federations: Sequence[tuple[str, Sharded]], costs: ShardCosts, time: Any) -> Table:
    """What so many of them can bear, and how many are worth it. `time`: seconds in words."""
    rows = []
    for name, sharded in federations:
        rows.append(
            [
                name,
                *(time(sharded.busiest(costs, shards)) for shards in SHARDS),
                *(time(sharded.floor(costs, sharded.worth(costs, broker), broker)) for broker in BROKERS),
                *(_words(sharded.worth(costs, broker)) for broker in BROKERS),
            ]
        )
    title = (
        "The shortest time between two updates of a node that master and aggregators can bear, a host each; what "
        "broker and nodes can: a broker of 1 core and 10 Gbit/s, and one of 8 cores and 100 Gbit/s; and for each of "
        f"these, how many aggregators are worth it: more of them gain less than 5 %. {_said(costs)}"
    )
    headings = ["nodes × parameters", "master alone", *(f"{shards} aggregators" for shards in SHARDS[1:])]
    headings += [f"broker ({cores}) or nodes" for cores, _ in BROKERS]
    return Table(title, [*headings, *(f"worth it ({cores})" for cores, _ in BROKERS)], rows)


def _words(shards: int) -> str:
    return "none" if shards == 1 else f"{shards}"


def _said(costs: ShardCosts) -> str:
    milliseconds = [1000 * each for each in (costs.update, costs.order, costs.broker)]
    return (
        f"All aggregators together take {costs.arithmetic:.2f} of the processor seconds of a master alone, the master "
        f"{milliseconds[0]:.1f} ms for an update and {milliseconds[1]:.1f} for each aggregator, the broker "
        f"{milliseconds[2]:.1f} for each; an aggregator's memory is {costs.sets:.1f} sets of its part"
    )


def _spent(run: dict[str, Any], party: str) -> float:
    return float(run["cpu_seconds_a_version"][party])
