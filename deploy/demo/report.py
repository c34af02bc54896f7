"""The demo's results, from the message log and the last status report: report.json, report.png, the table of nodes."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt
from deploy.commands.display import console, number, size
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Send
from master_service.decisions.records import Versioned
from master_service.log.message_log import open_log
from master_service.status import Report


@dataclass
class Series:
    """The training over time: (seconds since the first update, value) per node, and for the versions."""

    loss: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
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
                found.weight.setdefault(receipt.node, []).append(receipt.weight)
    log.close()
    return found


#: For each topic, for each encoder: loss (nats) and few-label accuracy.
Figures = dict[str, dict[str, dict[str, float]]]

#: How encoders are called in the table and the picture, in order.
_CALLED = {
    "random": "random",
    "alone": "trained alone",
    "shared": "shared",
    "finished": "shared, then finished alone",
}


def write_report(
    out: Path, state_dir: Path, report: Report, figures: Figures, seconds: float, seed: int
) -> dict[str, Any]:
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
            "step_seconds": member.step_seconds,
            "lost_seconds": member.lost_seconds,
        }
    summary = {
        "domains": figures,
        "seed": seed,
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
    draw(found, figures, out / "report.png")
    return summary


def print_figures(figures: Figures) -> None:
    """Losses and few-label accuracies by topic; the best of those that are no random encoder's is bold."""
    kinds = [kind for kind in _CALLED if kind in next(iter(figures.values()))]
    for key, title, best in (
        ("loss", "masked loss on the whole held-out part (nats; lower is better)", min),
        ("few_labels", "16 labels a class, linear classifier on frozen features, accuracy, mean of 10 draws", max),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("topic")
        for kind in kinds:
            table.add_column(_CALLED[kind], justify="right")
        means = {kind: sum(each[kind][key] for each in figures.values()) / len(figures) for kind in kinds}
        rows = {topic: {kind: each[kind][key] for kind in kinds} for topic, each in figures.items()}
        for topic, values in {**rows, "mean": means}.items():
            wins = best(value for kind, value in values.items() if kind != "random")
            words = (f"[bold]{number(v, 3)}[/bold]" if v == wins else number(v, 3) for v in values.values())
            table.add_row(topic, *words)
        console().print(table)


def print_nodes(summary: dict[str, Any]) -> None:
    """Print a table with the updates, weights and traffic of each node."""
    table = Table(title="nodes and traffic", title_justify="left")
    for heading in ("node", "samples", "steps", "returns", "weight, mean", "weight, sum", "sent", "waited", "lost"):
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
            f"{sum(node['lost_seconds'].values()):.1f} s",
        )
    console().print(table)
    console().print(
        f"{summary['versions']} versions of {summary['updates']} updates; {summary['parameters']:,} shared parameters; "
        f"the master published {size(summary['bytes_published'])} once, for everybody to read",
        highlight=False,
    )


def draw(found: Series, figures: Figures, path: Path) -> None:
    """What came of it, by topic, beside how it was trained: losses of the nodes' updates, and versions, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in _CALLED if kind in next(iter(figures.values())) and kind != "random"]
    # Okabe and Ito's colours, which every eye can tell apart
    colours = dict(zip(_CALLED, ("#999999", "#E69F00", "#56B4E9", "#0072B2"), strict=True))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), width_ratios=(1.15, 1))
    width = 0.8 / len(kinds)
    for place, kind in enumerate(kinds):
        heights = [each[kind]["loss"] for each in figures.values()]
        spots = [index + (place - (len(kinds) - 1) / 2) * width for index in range(len(figures))]
        bars = left.bar(spots, heights, width * 0.92, color=colours[kind], label=_CALLED[kind])
        left.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
    lowest = min(each[kind]["loss"] for each in figures.values() for kind in kinds)
    highest = max(each[kind]["loss"] for each in figures.values() for kind in kinds)
    margin = highest - lowest
    left.set_ylim(lowest - 0.6 * margin, highest + 0.45 * margin)
    left.set_xticks(range(len(figures)), list(figures))
    left.set_ylabel("held-out masked loss (nats; lower is better)")
    left.set_title("each topic's own held-out files, as many steps")
    left.legend(loc="upper center", ncols=len(kinds), fontsize=9, frameon=False)

    for index, (node, points) in enumerate(sorted(found.loss.items())):
        right.plot(*zip(*points, strict=True), label=node, color=f"C{index}", linewidth=1.2)
    right.set_xlabel("seconds of the training since the first update")
    right.set_ylabel("training loss of each update (nats)")
    right.set_title("one shared encoder, trained by nodes that show no sample")
    right.legend(title="node", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
