"""A panel of report.png: how far the final versions are from the best single organisation, in every column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.compare.transfer.figures import UNSEEN
from deploy.compare.transfer.plan import AT_ONCE

_COLOURS = {AT_ONCE: "#8c8c8c", "frozen": "#0072B2", "free": "#D55E00"}
_SHAPES = {AT_ONCE: "o", "frozen": "s", "free": "D"}
_FADED = 0.45


def rows_of(found: Mapping[str, Any]) -> list[str]:
    """The rows of the panel: the unseen columns first, their mean, and then the nodes' own. None without a final
    version or an organisation alone, where there is nothing to compare."""
    if not found["judged"] or not found["best_single"]:
        return []
    columns = {name: column["seen"] for name, column in found["columns"].items() if column["loss"]}
    unseen = [name for name, seen in columns.items() if not seen]
    return [*unseen, *([UNSEEN] if len(unseen) > 1 else []), *(name for name, seen in columns.items() if seen)]


def draw(found: Mapping[str, Any], axes: Any, unit: str, height: float) -> None:
    """Draw the panel into `axes`, of so many inches: the first final version against the best single organisation of
    each column."""
    judged, rows, modes = found["judged"][0], rows_of(found), list(found["losses"])
    for row in range(0, len(rows), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", zorder=0)
    axes.axvline(0, color="#444444", linewidth=2, zorder=1)
    for index, mode in enumerate(modes):
        differences = found["losses"][mode]["differences"][judged]
        colour, shape = _COLOURS[mode], _SHAPES[mode]
        for row, name in enumerate(rows):
            difference = differences[name]["best_single"]
            if difference is None or difference["mean"] is None:
                continue
            place = row + (index - (len(modes) - 1) / 2) * 0.8 / len(modes)
            if difference["low"] is not None:
                span = [difference["low"], difference["high"]]
                axes.plot(span, [place, place], color=colour, linewidth=7, alpha=_FADED, solid_capstyle="butt")
            axes.plot(difference["mean"], place, shape, color=colour, markersize=11, zorder=4)
        label = mode if mode == AT_ONCE else f"after {found['steps']} steps, {mode}"
        axes.plot([], [], shape, color=colour, markersize=11, label=label)
    axes.set_yticks(range(len(rows)), [_named(found, name) for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"loss minus that of the best single organisation's encoder ({unit}); left of 0 is better")
    axes.grid(axis="x", color="#cccccc", linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"Transfer: {judged} against the best single organisation", fontsize=18, loc="left", pad=14)
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -1.0 / height), ncols=len(modes), frameon=False)


def _named(found: Mapping[str, Any], name: str) -> str:
    return name if name == UNSEEN or found["columns"][name]["seen"] else f"{name} (unseen)"
