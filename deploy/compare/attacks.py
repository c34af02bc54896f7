"""The table of attacks and rules: what the honest nodes have left under each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.commands.display import number
from deploy.compare.plan import VERSION
from deploy.compare_settings import NOBODY


def attack_tables(report: Mapping[str, Any], unit: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, rows): of the shared version, and of what the nodes keep after finishing. Each cell is the mean
    loss of the honest nodes, and that of the domain that is worst off. None where no table was asked for."""
    asked, columns = report["comparison"]["settings"]["attacks"], report["columns"]
    if asked is None:
        return []
    kinds = [kind for kind in (NOBODY, *asked["kinds"]) if any(f"{rule}-{kind}" in columns for rule in asked["rules"])]
    hostile = f"{asked['hostile']} hostile member{'s' if asked['hostile'] > 1 else ''} more than nodes"
    found = []
    for view, suffix in (("shared version", f", {VERSION}"), ("after finishing", "")):
        rows = [
            [rule, *(_cell(columns.get(f"{rule}-{kind}{suffix}")) for kind in kinds)]
            for rule in asked["rules"]
            if any(f"{rule}-{kind}" in columns for kind in kinds)
        ]
        title = f"{view}: mean loss of the honest nodes, and the worst domain's; {hostile} ({unit})"
        found.append((title, ["rule", *kinds], rows))
    return found


def _cell(column: Mapping[str, Any] | None) -> str:
    if column is None:
        return "–"
    losses = [domain["loss"]["mean"] for domain in column["domains"].values()]
    if any(loss is None for loss in losses):
        return "not finite"
    return f"{number(column['mean']['loss']['mean'], 3)} ({number(max(losses), 3)})"
