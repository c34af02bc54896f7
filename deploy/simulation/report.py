"""What came of a simulation: figures from the log, the nodes' receipts and the lines, as plain values and as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from common.numbers.slicing import slice_count
from common.wire.to_master import UpdateManifest
from deploy.commands.display import number, size
from deploy.simulation.simulation import Simulation
from master_service.log.message_log import MessageLog

#: The key that says of a report.json whose it is: the arguments of the simulation.
ARGUMENTS = "simulation"
#: Of the updates, whose losses are shown as those of the beginning and of the end.
_PART = 0.1


def summary(run: Simulation, log: MessageLog) -> dict[str, Any]:
    """The figures of a run that has ended. The same plan gives the same figures."""
    encoder, plan = run.master.result, run.plan
    receipts = [receipt for node in run.nodes for receipt in node.receipts()]
    counted = [receipt for receipt in receipts if receipt.accepted]
    losses = [body.loss for body in log.bodies("update") if isinstance(body, UpdateManifest)]
    part = math.ceil(_PART * len(losses))
    dead_letters = run.server.find(run.topology.dead_letters)
    return {
        ARGUMENTS: plan.arguments(),
        "encoder": encoder.encoder if encoder else "",
        "ended": encoder.reason if encoder else "",
        "given_up": run.given_up,
        "versions": encoder.version if encoder else 0,
        "updates": encoder.updates if encoder else 0,
        "refused": dict(sorted(Counter(receipt.reason for receipt in receipts if not receipt.accepted).items())),
        "unanswered": sum(node.owed() for node in run.nodes),
        "dead_letters": dead_letters.next_offset if dead_letters else 0,
        "staleness": {str(key): count for key, count in sorted(Counter(each.staleness for each in counted).items())},
        "speeds": _by_speed(run),
        "loss": {"first": _mean(losses[:part]), "last": _mean(losses[len(losses) - part :])},
        "traffic": {
            "bytes_up": sum(node.bytes_up for node in run.nodes),
            "bytes_down": sum(node.bytes_down for node in run.nodes),
            "versions_published": run.master.stream_chunks // slice_count(plan.parameters),
            "versions_read": sum(node.versions_read for node in run.nodes),
        },
        "left": sum(node.left for node in run.nodes),
        "killed": sum(node.killed for node in run.nodes),
        "master_killed": run.master.killed,
        "virtual_seconds": run.ended_at,
        "ledger": {"rows": log.last_offset + 1, "checksum": log.checksum(log.last_offset)},
    }


def _by_speed(run: Simulation) -> list[dict[str, Any]]:
    """One row for each speed class, the slowest first; weights are sums."""
    members = run.master.result.members if run.master.result else {}
    rows = []
    for speed in sorted({node.speed for node in run.nodes}):
        names = [node.name for node in run.nodes if node.speed == speed]
        known = [members[name] for name in names if name in members]
        rows.append(
            {
                "steps_per_second": speed,
                "nodes": len(names),
                "returns": sum(member.returns for member in known),
                "refused": sum(member.refused for member in known),
                "weight": math.fsum(member.weight for member in known),
                "loss": _mean([member.loss for member in known if member.loss is not None]),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def print_summary(report: Mapping[str, Any], screen: Console) -> None:
    """The report for people."""
    classes = Table(title=f"{report['encoder']}: {report['ended']}", title_justify="left")
    for heading in ("steps/s", "nodes", "returns", "a node", "refused", "weight", "a return", "loss"):
        classes.add_column(heading, justify="right")
    for row in report["speeds"]:
        classes.add_row(
            f"{row['steps_per_second']:g}",
            str(row["nodes"]),
            f"{row['returns']:,}",
            number(row["returns"] / row["nodes"], 1),
            f"{row['refused']:,}",
            number(row["weight"], 1),
            number(row["weight"] / row["returns"]) if row["returns"] else "–",
            number(row["loss"], 3),
        )
    screen.print(classes)
    screen.print(_staleness(report["staleness"]))
    traffic, loss = report["traffic"], report["loss"]
    refused = ", ".join(f"{count:,} {reason}" for reason, count in report["refused"].items()) or "none"
    lines = {
        "versions": f"{report['versions']:,}, {traffic['versions_published']:,} published, "
        f"{traffic['versions_read']:,} read",
        "updates": f"{report['updates']:,} counted; refused: {refused}; unanswered: {report['unanswered']:,}",
        "away": f"{report['left']:,} left, {report['killed']:,} nodes and {report['master_killed']} masters killed",
        "loss": f"{number(loss['first'], 3)} → {number(loss['last'], 3)}",
        "traffic": f"{size(traffic['bytes_up'])} up, {size(traffic['bytes_down'])} down",
        "time": f"{number(report['virtual_seconds'], 1)} s virtual, {number(report['real_seconds'], 1)} s real",
        "log": f"{report['ledger']['rows']:,} rows, checksum {report['ledger']['checksum']}",
    }
    for name, words in lines.items():
        screen.print(f"{name:<10}{words}", highlight=False, soft_wrap=True)


def _staleness(histogram: Mapping[str, int]) -> Table:
    """How many counted updates were how many versions behind, in powers of two."""
    table = Table(title="staleness, versions", title_justify="left")
    buckets: Counter[int] = Counter()
    for versions, count in histogram.items():
        buckets[int(versions).bit_length()] += count
    for power in sorted(buckets):
        low, high = (1 << power) // 2, (1 << power) - 1
        table.add_column(str(low) if low == high else f"{low}–{high}", justify="right")
    table.add_row(*(f"{buckets[power]:,}" for power in sorted(buckets)))
    return table
