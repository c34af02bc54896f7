"""`evaluate` and the demo's last part: random, alone, shared and pooled encoders on every domain, in a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.errors import UserError
from deploy.commands.display import console, number, saying
from deploy.commands.run import load_corpora
from deploy.config import load_config
from deploy.logging import configure_logging

if TYPE_CHECKING:
    from torch import Tensor

    from common.wire.messages import InnerOptimizer
    from node_service.evaluation.evaluate import Domain

#: Domains → kind of encoder → scores, as it stands in report.json.
Figures = dict[str, dict[str, dict[str, float | None]]]


def run_evaluation(
    file: Path | None,
    names: Sequence[str],
    *,
    encoders: Sequence[Path],
    pooled: bool,
    out: Path | None,
    threads: int | None,
) -> None:
    """Evaluate nodes of a configuration and print the table; every encoder after the first is a column of its own.

    Raises UserError for what is not there.
    """
    config = load_config(file, {})
    configure_logging(level="warning")
    unknown = [name for name in names if name not in config.nodes]
    if unknown or not config.nodes:
        known = ", ".join(config.nodes) or "none; give --config FILE"
        raise UserError(f"no node {unknown[0]!r} in the configuration; there are: {known}" if unknown else known)
    directories: Sequence[Path | None] = encoders or [config.master.export_dir]
    for directory in directories:
        if directory is None or not directory.exists():
            raise UserError(f"no shared encoder at {directory}; give it with --encoder DIR")
    with saying("loading torch and transformers, a few seconds"):
        import torch

        from common.encoders import get_encoder_type
        from node_service.evaluation.evaluate import Domain
    torch.set_num_threads(threads or 1)
    domains = []
    for name in names or list(config.nodes):
        node = config.nodes[name]
        state = node.state_dir or Path("node-state") / name
        pinned = sorted((state / "encoders").glob("*/pinned.json"), key=lambda path: path.stat().st_mtime)
        if not pinned:
            raise UserError(f"{state}: node {name!r} has not saved private parts; train it first")
        private = pinned[-1].parent
        corpora = load_corpora(name, node)
        kind = json.loads(pinned[-1].read_text())["type"]
        domains.append(Domain.of(name, corpora[kind], private))
    encoder_type = get_encoder_type(domains[0].pinned.type)
    tensors, *others = [encoder_type.architecture_of(directory)[1] for directory in directories if directory]
    named = dict(zip(_names(encoders[1:]), others, strict=True))
    figures = evaluate_domains(domains, tensors, config.update.inner, others=named, pooled=pooled)
    print_table(figures)
    if out is not None:
        out.write_text(json.dumps({"domains": figures}, indent=1))
        print(f"figures written to {out}")


def evaluate_domains(
    domains: Sequence[Domain],
    encoder: Mapping[str, Tensor],
    inner: InnerOptimizer,
    *,
    others: Mapping[str, Mapping[str, Tensor]] | None = None,
    pooled: bool = False,
    probe_rows: int = 2000,
) -> Figures:
    """Train the baselines and score everything, with a progress bar; takes about as long as the nodes' training.

    `others` are further encoders by name, within the same private parts, which fit the shared one best.
    """
    from node_service.evaluation.evaluate import fresh_model, score, shared_model, train_alone, train_pooled

    total = sum(domain.steps for domain in domains) * (2 if pooled else 1)
    figures: Figures = {domain.name: {} for domain in domains}
    with _progress(total) as advance:
        together = train_pooled(domains, inner, lambda done, of: advance("pooled")) if pooled else {}
        for domain in domains:

            def tell(done: int, of: int, name: str = domain.name) -> None:
                advance(f"{name} alone")

            models = {
                "random": fresh_model(domain),
                "alone": train_alone(domain, inner, tell),
                "shared": shared_model(domain, encoder),
                **{name: shared_model(domain, other) for name, other in (others or {}).items()},
            }
            if domain.name in together:
                models["pooled"] = together[domain.name]
            for kind, model in models.items():
                figures[domain.name][kind] = score(domain, model, probe_rows=probe_rows).plain()
    return figures


def _names(directories: Sequence[Path]) -> list[str]:
    """A column's name for each: the folder's, or all of the path where that is taken."""
    taken = {"random", "alone", "shared", "pooled"}
    names = []
    for directory in directories:
        name = directory.name if directory.name not in taken else str(directory)
        taken.add(name)
        names.append(name)
    return names


def print_table(figures: Figures) -> None:
    """Losses (lower is better) and accuracies (higher is better) per domain; the better of alone and shared is bold."""
    kinds = list(next(iter(figures.values())))
    for key, title, better in (
        ("loss", "masked loss on held-out samples (nats for text; lower is better)", min),
        ("probe", "linear probe on frozen features, accuracy (higher is better)", max),
        ("knn", "10 nearest neighbours on frozen features, accuracy (higher is better)", max),
    ):
        if all(scores["shared"][key] is None for scores in figures.values()):
            continue
        table = Table(title=title, title_justify="left")
        table.add_column("domain")
        for kind in kinds:
            table.add_column(kind, justify="right")
        if key != "loss":
            table.add_column("majority", justify="right")
        for domain, scores in figures.items():
            values = {kind: scores[kind][key] for kind in kinds}
            best = better(value for kind, value in values.items() if value is not None and kind in ("alone", "shared"))
            cells = [
                f"[bold]{number(value, 3)}[/bold]" if value == best else number(value, 3) for value in values.values()
            ]
            if key != "loss":
                cells.append(number(scores["shared"]["majority"], 3))
            table.add_row(domain, *cells)
        console().print(table)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task("baselines", total=total)
        if not errors.is_terminal:
            errors.print(f"training the baselines: {total} steps", highlight=False)
        yield lambda text: bar.update(task, advance=1, description=text)
