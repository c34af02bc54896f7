"""report.png: by domain, how far each arm's held-out loss is from that of training alone, with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.compare.transfer import picture as transfer_panel
from deploy.compare_settings import ALONE, POOLED, POOLED_ALL

#: Okabe & Ito's colours, which the colour-blind tell apart, and a shape for each: no arm is known by its colour alone.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SHAPES = ("o", "s", "D", "^", "v", "P", "X")
#: What nobody may do stands back.
_GREYS = {POOLED: "#8c8c8c", POOLED_ALL: "#4d4d4d"}
_ROW_INCHES = 0.25


def draw(
    figures: Mapping[str, Any],
    arms: Mapping[str, str],
    path: Path,
    *,
    unit: str,
    seeds: int,
    transfer: Mapping[str, Any] | None = None,
) -> None:
    """Draw the differences of `arms` (columns of `figures`, and what people call them) to the baseline: a row for each
    domain, and the mean. Below it, the panel of `transfer`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [*next(iter(figures.values()))["domains"], "mean"]
    height = 2.6 + _ROW_INCHES * len(rows) * (len(arms) + 1)
    with pyplot.rc_context({"font.size": 16, "font.family": "DejaVu Sans", "axes.axisbelow": True}):
        below = transfer_panel.rows_of(transfer) if transfer else []
        heights = [height, *([2.0 + 0.8 * len(below)] if below else [])]
        figure, panels = pyplot.subplots(
            len(heights), figsize=(16, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
        )
        axes = panels[0, 0]
        if transfer and below:
            transfer_panel.draw(transfer, panels[1, 0], unit, heights[1])
        for row in range(len(rows)):
            if row % 2 == 0:
                axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", zorder=0)
        axes.axvline(0, color="#444444", linewidth=2, zorder=1)
        axes.text(0, 1.005, ALONE, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=15)
        colours = itertools.cycle(_COLOURS)
        for index, arm in enumerate(arms):
            colour, shape = _GREYS.get(arm) or next(colours), _SHAPES[index % len(_SHAPES)]
            shift = (index - (len(arms) - 1) / 2) * 0.8 / len(arms)
            column = figures[arm]
            for row, name in enumerate(rows):
                place, domain = row + shift, column["mean"] if name == "mean" else column["domains"][name]
                if domain["difference"]["mean"] is None:
                    continue  # it diverged; the table says so
                _bar(axes, domain.get("documents"), place, colour, 2.0, caps=True)
                _bar(axes, domain["difference"], place, colour, 7.0, alpha=0.45)
                axes.plot(domain["difference"]["mean"], place, shape, color=colour, markersize=11, zorder=4)
            axes.plot([], [], shape, color=colour, markersize=11, label=f"{arms[arm]}: {_counts(column['counts'])}")
        axes.set_yticks(range(len(rows)), rows)
        axes.get_yticklabels()[-1].set_fontweight("bold")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"held-out loss minus that of training alone ({unit}); left of 0 is better")
        axes.grid(axis="x", color="#cccccc", linewidth=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        figure.suptitle("What training together changes, for each organisation", fontsize=22, x=0.02, ha="left")
        ncols = 1 if len(arms) < 3 else 2
        if arms and below:  # each panel has its own
            axes.legend(loc="upper left", bbox_to_anchor=(0.0, -1.0 / height), ncols=ncols, frameon=False)
        elif arms:
            figure.legend(loc="outside lower left", ncols=ncols, frameon=False)
        bars = "thin: 95 % over held-out documents"
        if seeds > 1:
            bars = f"broad: 95 % over {seeds} seeds; {bars}"
        axes.set_title(bars, fontsize=14, loc="left", color="#444444", pad=24)
        figure.savefig(path, dpi=120, facecolor="white")
        pyplot.close(figure)


def _bar(
    axes: Any,
    interval: Mapping[str, Any] | None,
    place: float,
    colour: str,
    width: float,
    *,
    alpha: float = 1.0,
    caps: bool = False,
) -> None:
    if interval is None or interval["low"] is None:
        return
    low, high = interval["low"], interval["high"]
    axes.plot([low, high], [place, place], color=colour, linewidth=width, alpha=alpha, solid_capstyle="butt", zorder=2)
    if caps:
        axes.plot([low, high], [place, place], "|", color=colour, markersize=10, markeredgewidth=2, zorder=3)


def _counts(counts: Mapping[str, int]) -> str:
    """How many domains gained, in a few words."""
    whole = sum(counts.values())
    words = [f"{counts[verdict]} {verdict}" for verdict in ("worse", "undecided") if counts[verdict]]
    return ", ".join([f"better in {counts['better']} of {whole}", *words])
