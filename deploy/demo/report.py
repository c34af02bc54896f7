"""The demo's results, from the message log and the last status report: report.json, report.png, the table of nodes."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from common.wire.messages import Receipt, UpdateManifest
from deploy.commands.display import console, number, size
from deploy.commands.evaluate import Figures
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Send
from master_service.decisions.records import Versioned
from master_service.log.message_log import open_log
from master_service.status import Report


@dataclass
class Series:
    """The training over time: (seconds since the first update, value) per node, and for the versions."""

    loss: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    staleness: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    weight: dict[str, list[float]] = field(default_factory=dict)
    versions: list[tuple[float, int]] = field(default_factory=list)


def series(state_dir: Path) -> Series:
    """Read the series from a master's message log. The coordinator folds it again, without tensors, for receipts."""
    log, coordinator, found = open_log(state_dir, read_only=True), Coordinator(), Series()
    start: float | None = None
    for entry in log.entries():
        body = entry.body
        if isinstance(body, UpdateManifest):
            start = entry.at if start is None else start
            found.loss.setdefault(body.node, []).append((entry.at - start, body.loss))
        if isinstance(body, Versioned) and start is not None:
            found.versions.append((entry.at - start, body.version))
        for effect in coordinator.handle(entry):
            if isinstance(effect, Send) and isinstance(effect.message, Receipt) and effect.message.accepted:
                receipt = effect.message
                at = entry.at - (start or entry.at)
                found.staleness.setdefault(receipt.node, []).append((at, receipt.staleness))
                found.weight.setdefault(receipt.node, []).append(receipt.weight)
    log.close()
    return found


def write_report(out: Path, state_dir: Path, report: Report, figures: Figures, seconds: float) -> dict[str, Any]:
    """Write report.json and report.png; the content of report.json."""
    found = series(state_dir)
    encoder = next(iter(report.encoders.values()))
    nodes = {}
    for name, member in encoder.members.items():
        weights = found.weight.get(name, [])
        nodes[name] = {
            "returns": member.returns,
            "weight": sum(weights),
            "mean_weight": sum(weights) / len(weights) if weights else 0.0,
            "refused": member.refused,
            "steps": member.steps,
            "samples": member.samples,
            "bytes_sent": member.bytes_sent,
            "waiting_seconds": member.waiting_seconds,
        }
    summary = {
        "domains": figures,
        "versions": encoder.version,
        "updates": encoder.updates,
        "nodes": nodes,
        "seconds": seconds,
        "parameters": encoder.parameters,
        "bytes_published": report.bytes_published,
        "digest": encoder.digest,
        "rule": report.rule,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
    }
    (out / "report.json").write_text(json.dumps(summary, indent=1))
    draw(found, out / "report.png")
    return summary


def print_nodes(summary: dict[str, Any]) -> None:
    """Print a table with the updates, weights and traffic of each node."""
    table = Table(title="nodes and traffic", title_justify="left")
    for heading in ("node", "samples", "steps", "returns", "weight, mean", "weight, sum", "sent", "waited"):
        table.add_column(heading, justify="left" if heading == "node" else "right")
    for name, node in summary["nodes"].items():
        table.add_row(
            name,
            str(node["samples"]),
            str(node["steps"]),
            str(node["returns"]),
            number(node["mean_weight"]),
            number(node["weight"]),
            size(node["bytes_sent"]),
            f"{node['waiting_seconds']:.1f} s",
        )
    console().print(table)
    console().print(
        f"{summary['versions']} versions of {summary['updates']} updates; {summary['parameters']:,} shared parameters; "
        f"the master published {size(summary['bytes_published'])} once, for everybody to read",
        highlight=False,
    )


def draw(found: Series, path: Path) -> None:
    """Plot training loss per node, version, and staleness of each accepted update, one panel each, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(9, 9), sharex=True, height_ratios=(3, 1, 1))
    for index, (node, points) in enumerate(sorted(found.loss.items())):
        colour = f"C{index}"
        top.plot(*zip(*points, strict=True), label=node, color=colour)
        late = found.staleness.get(node, [])
        if late:
            # nodes side by side within one step of staleness, so that none hides another
            bottom.scatter([t for t, _ in late], [s + 0.08 * index for _, s in late], s=10, color=colour)
    top.set_ylabel("masked loss while training (nats)")
    top.legend(title="node")
    top.set_title("one shared encoder, trained by nodes that never show their samples")
    if found.versions:
        middle.step(*zip(*found.versions, strict=True), where="post", color="black")
    middle.set_ylabel("version")
    bottom.set_ylabel("staleness (versions)")
    bottom.set_xlabel("seconds since the first update")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
