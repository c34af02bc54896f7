"""The report of a comparison: everything as report.json, a page, a picture, and tables in the terminal."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.durable import write_durably
from deploy.commands.display import number
from deploy.compare.attacks import attack_tables
from deploy.compare.picture import draw
from deploy.compare.plan import Comparison, columns
from deploy.compare.run import Outcome
from deploy.compare.transfer.report import tables as transfer_tables
from deploy.compare_settings import ALONE, RANDOM

JSON, HTML, PNG = "report.json", "report.html", "report.png"


def unit_of(encoder_type: str) -> str:
    """What a loss is measured in."""
    return "nats a predicted token" if encoder_type == "text" else "of the masked part"


def described(comparison: Comparison) -> dict[str, Any]:
    """What was compared, as plain values."""
    return {
        "settings": comparison.settings.model_dump(mode="json"),
        "encoder_type": comparison.encoder_type,
        "architecture": comparison.architecture,
        "assets": {name: len(body) for name, body in comparison.assets.items()},
        "generation": comparison.initial[0],
        "source": comparison.initial[1],
        "update": comparison.update.model_dump(mode="json"),
        "arms": {
            arm: {
                "rule": comparison.federated[arm].rule.model_dump(mode="json"),
                "update": comparison.federated[arm].update.model_dump(mode="json"),
                "finish_shares": comparison.federated[arm].finish_shares,
                "attack": comparison.federated[arm].attack,
                "hostile": comparison.federated[arm].hostile,
            }
            if arm in comparison.federated
            else None
            for arm in comparison.arms
        },
        "seeds": comparison.seeds,
        "steps": {domain: comparison.steps(domain) for domain in comparison.domains},
        "private": comparison.private,
        "samples_sha256": comparison.fingerprints,
    }


def marked(name: str, architecture: Mapping[str, Any]) -> str:
    """An arm, a column or a table for people. What was trained with a tokenizer that has seen texts of the nodes says
    so."""
    return f"{name} (agreed vocabulary)" if architecture.get("vocabulary") == "agreed" else name


def versions() -> dict[str, str]:
    """Of what computes."""
    packages = ("shared-encoder", "torch", "transformers", "numpy", "scipy")
    return {**{name: version(name) for name in packages}, "python": platform.python_version()}


def write_report(
    out: Path, comparison: Comparison, outcome: Outcome, *, command: str, seconds: float
) -> dict[str, Any]:
    """Write report.json, report.png and report.html into `out`; gives what is in report.json."""
    report: dict[str, Any] = _plain(
        {
            "comparison": described(comparison),
            "command": command,
            "versions": versions(),
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "seconds": round(seconds, 1),
            "choices": outcome.choices,
            "columns": outcome.columns,
            "cells": outcome.facts,
            "transfer": outcome.transfer,
        }
    )
    write_durably(out / JSON, json.dumps(report, indent=1, allow_nan=False).encode() + b"\n")
    drawn = [name for name, (arm, view) in columns(comparison).items() if name == arm and arm not in (ALONE, RANDOM)]
    draw(
        report["columns"],
        {name: marked(name, comparison.architecture) for name in drawn},
        out / PNG,
        unit=unit_of(comparison.encoder_type),
        seeds=len(comparison.seeds),
        transfer=report["transfer"],
    )
    write_durably(out / HTML, _page(report, (out / PNG).read_bytes()).encode())
    return report


def print_report(report: Mapping[str, Any], screen: Console) -> None:
    """The losses, and the differences to alone, for people."""
    for title, headings, rows in _tables(report):
        table = Table(title=title, title_justify="left")
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        screen.print(table)


def _tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, rows) of the tables, the same on the page and in the terminal."""
    figures = report["columns"]
    domains = list(figures[ALONE]["domains"])
    unit, architecture = unit_of(report["comparison"]["encoder_type"]), report["comparison"]["architecture"]
    losses = []
    for name, column in figures.items():
        cells = [number(column["domains"][domain]["loss"]["mean"], 3) for domain in domains]
        losses.append([marked(name, architecture), *cells, number(column["mean"]["loss"]["mean"], 3)])
    differences = []
    for name, column in figures.items():
        if name == ALONE:
            continue
        cells = [_interval(column["domains"][domain]) for domain in domains]
        counts = column["counts"]
        differences.append(
            [
                marked(name, architecture),
                *cells,
                _interval(column["mean"]),
                column["worst"]["domain"],
                f"{counts['better']}/{counts['worse']}/{counts['undecided']}",
                _gap(column["mean"]["gap_closed"]),
            ]
        )
    chosen = [
        [
            marked(choice["arm"], architecture) + (f", {choice['domain']}" if choice["domain"] else ""),
            f"{choice['lr']:g}",
            f"{choice['weight_decay']:g}",
            "–" if choice["finish_share"] is None else f"{choice['finish_share']:.0%}",
            f"{len(choice['grid'])}",
        ]
        for choice in report["choices"]
    ]
    seeds = len(report["comparison"]["seeds"])
    return [
        (f"held-out loss, mean of {seeds} seeds ({unit}; less is better)", ["arm", *domains, "mean"], losses),
        (
            "difference to alone on the same seed, 95 % interval over seeds (over documents where there is one seed)",
            ["arm", *domains, "mean", "worst", "better/worse/undecided", "gap closed"],
            differences,
        ),
        *attack_tables(report, unit),
        ("chosen by the validation part", ["arm", "rate", "decay", "finishing", "of points"], chosen),
        *(
            (marked(title, architecture), headings, rows)
            for title, headings, rows in (transfer_tables(report["transfer"], unit) if report["transfer"] else [])
        ),
    ]


def _interval(row: Mapping[str, Any]) -> str:
    difference = row["difference"]
    if difference["mean"] is None:
        return "not finite"
    bounds = difference if difference["low"] is not None else row.get("documents", difference)
    if bounds["low"] is None:
        return f"{difference['mean']:+.3f}"
    return f"{difference['mean']:+.3f} ({bounds['low']:+.3f}, {bounds['high']:+.3f})"


def _gap(gaps: Mapping[str, float | None]) -> str:
    known = [f"{share:.0%} of {name}" for name, share in gaps.items() if share is not None]
    return ", ".join(known) or "–"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; margin: 0.5em 0 1.5em; font-size: 14px }
caption { text-align: left; font-weight: 600; padding: 0.3em 0 } .wide { overflow-x: auto }
th, td { padding: 0.3em 0.7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
"""


_TRANSFER = """<p>Transfer: every encoder enters a column without private parts, gets the same steps there, and the rate
that the column's validation part finds best. <em>Frozen</em>: the shared parameters stay, and the column's own private
parts are trained. The <em>best single</em> organisation of a column is the one of the least validation loss, mean over
the seeds. Few labels: the encoder and a linear classifier are fine-tuned on the same draws as every other row.</p>"""


def _page(report: Mapping[str, Any], picture: bytes) -> str:
    """One file that needs nothing else."""
    tables = []
    for title, headings, rows in _tables(report):
        body = "".join(_row("td", row) for row in rows)
        caption = f"<caption>{html.escape(title)}</caption>"
        tables.append(f'<div class="wide"><table>{caption}{_row("th", headings)}{body}</table></div>')
    settings = json.dumps({key: report[key] for key in ("comparison", "versions", "machine")}, indent=1)
    encoded = base64.b64encode(picture).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Comparison of encoders</title><style>{_STYLE}</style></head><body>
<h1>One encoder together, or one alone?</h1>
<p>Every arm has the same grid of rates and decays and the same training steps a node, finishing included. All choices,
the moment at which a training is taken too, go by a validation part; the test part was read once, after them. Initial
weights, splits, windows and masks of a seed are the same for every arm.</p>
<img alt="Differences of the held-out loss to training alone, by domain" src="data:image/png;base64,{encoded}">
{"".join(tables)}
<p>An arm's own row is that after the finishing phase. <em>version</em>: the final one within each node's private
parts; <em>without private parts</em>: within fresh ones. Gap closed: (alone − arm) / (alone − pooled), where pooling is
better than alone beyond the interval.</p>
{_of_the_vocabulary(report["comparison"]["architecture"])}
{_TRANSFER if report["transfer"] else ""}
<details><summary>Settings and versions</summary><pre>{html.escape(settings)}</pre></details>
<p>Made by</p><pre>{html.escape(report["command"])}</pre></body></html>
"""


def _of_the_vocabulary(architecture: Mapping[str, Any]) -> str:
    if architecture.get("vocabulary") != "agreed":
        return ""
    return (
        "<p>The vocabulary is an agreed one, the same for every arm and seed: made of words that nodes contributed of "
        "their training parts, and of no text of a validation or test part. An arm alone would not have it.</p>"
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _plain(value: Any) -> Any:
    """JSON knows no NaN: what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
