"""`evaluate` and the demo's last part: random, alone, shared and pooled encoders on every domain, in a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common import cards
from common.durable import write_durably
from common.errors import UserError
from common.exports import check_file
from common.extras import need
from deploy.commands.display import console, number, saying
from deploy.commands.run import load_corpora
from deploy.config import load_config
from deploy.logging import configure_logging

if TYPE_CHECKING:
    from torch import Tensor

    from common.wire.update_rule import InnerOptimizer
    from node_service.evaluation.evaluate import Domain

log = structlog.get_logger()

#: Domains → kind of encoder → scores, as it stands in report.json.
Figures = dict[str, dict[str, dict[str, float | None]]]


def run_evaluation(
    file: Path | None,
    names: Sequence[str],
    *,
    encoders: Sequence[Path],
    pooled: bool,
    seed: int,
    out: Path | None,
    threads: int | None,
    card: Path | None = None,
) -> None:
    """Evaluate nodes of a configuration and print the table; every encoder after the first is a column of its own.

    The seed is that of what the baselines leave to chance, and of the masks. With `out`, the figures of each node are
    there as soon as they are known. With `card`, they become a section of that export's card at the end. Raises
    UserError for what is not there.
    """
    if card is not None:
        read_card(card)
    if out is not None:
        check_file(out, "JSON file of figures", lambda file: "domains" in json.loads(file.read_bytes()))
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
        domains.append(Domain.of(name, load_corpora(name, node, file), pinned[-1].parent))
    kinds = {domain.pinned.type: domain.name for domain in domains}
    if len(kinds) > 1:
        named = " and ".join(f"{name} of type {kind}" for kind, name in kinds.items())
        raise UserError(f"nodes of different encoder types have no encoder in common: {named}; name those of one type")
    if any(domain.corpus.train_labels is not None for domain in domains):
        need("sklearn", "what evaluate finds by labels needs")
    encoder_type = get_encoder_type(domains[0].pinned.type)
    tensors, *others = [encoder_type.architecture_of(directory)[1] for directory in directories if directory]
    more = dict(zip(_names(encoders[1:]), others, strict=True))

    def keep(figures: Figures) -> None:
        if out is not None:
            missing = [domain.name for domain in domains if domain.name not in figures]
            out.parent.mkdir(parents=True, exist_ok=True)
            write_durably(out, json.dumps({"domains": figures, "missing": missing}, indent=1).encode())

    figures = evaluate_domains(
        domains, tensors, config.update.inner, others=more, pooled=pooled, seed=seed, on_domain=keep
    )
    print_table(figures)
    if out is not None:
        print(f"figures written to {out}")
    if card is not None:
        shown = [name for name in figures if config.nodes[name].named]
        section = evaluation_section(figures, shown)
        write_durably(card / "README.md", cards.with_evaluation(read_card(card), section).encode())
        print(f"figures written into the card of {card}")


def read_card(directory: Path) -> str:
    """The card of an export. Raises UserError for a directory that is none of ours."""
    try:
        text = (directory / "README.md").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if not cards.is_card(text):
        raise UserError(f"{directory} has no card of an exported encoder; name the directory of an export")
    return text


def evaluation_section(figures: Figures, named: Sequence[str]) -> str:
    """The figures for a card: losses and linear probes by domain. A domain is called by its node's name only if that is
    among `named`: its owner agreed to it."""
    names = {domain: domain if domain in named else f"domain {row}" for row, domain in enumerate(figures, 1)}
    kinds = list(next(iter(figures.values())))
    parts = [
        "*random* is an encoder that was never trained, *alone* one that was trained on its domain's samples only, as "
        "many steps as the node took"
        + (", *finished* a node's own copy after its finishing phase" if "finished" in kinds else "")
        + ". All have the same private parts' settings, seeds and held-out samples."
    ]
    for key, heading in (
        ("loss", "masked loss, held-out samples (lower is better)"),
        ("probe", "linear probe, accuracy"),
    ):
        rows = [
            (names[domain], *(number(scores[kind][key], 3) for kind in kinds))
            for domain, scores in figures.items()
            if scores["shared"][key] is not None
        ]
        if rows:
            parts.append(cards.table((heading, *kinds), rows))
    return "\n\n".join(parts)


def evaluate_domains(
    domains: Sequence[Domain],
    encoder: Mapping[str, Tensor],
    inner: InnerOptimizer,
    *,
    others: Mapping[str, Mapping[str, Tensor]] | None = None,
    pooled: bool = False,
    seed: int = 0,
    probe_rows: int = 2000,
    on_domain: Callable[[Figures], None] = lambda figures: None,
) -> Figures:
    """Train the baselines and score everything, with a progress bar; takes about as long as the nodes' training.

    `others` are further encoders by name, within the same private parts, which fit the shared one best; *finished* are
    the nodes' own copies, where all of them have one. `on_domain` is called whenever a domain is done, with the figures
    so far. Raises UserError, before anything is trained, for an encoder that does not fit into a domain's private
    parts.
    """
    from node_service.evaluation.evaluate import (
        finished_model,
        fresh_model,
        score,
        shared_model,
        train_alone,
        train_pooled,
    )

    total = sum(domain.steps for domain in domains) * (2 if pooled else 1)
    figures: Figures = {}
    for domain in domains:
        for tensors in (encoder, *(others or {}).values()):
            fresh_model(domain, tensors)
    finished = {domain.name: model for domain in domains if (model := finished_model(domain)) is not None}
    with _progress(total) as advance:
        together = train_pooled(domains, inner, lambda done, of: advance("pooled"), seed=seed) if pooled else {}
        for domain in domains:

            def tell(done: int, of: int, name: str = domain.name) -> None:
                advance(f"{name} alone")

            models = {
                "random": fresh_model(domain, seed=seed),
                "alone": train_alone(domain, inner, tell, seed=seed),
                "shared": shared_model(domain, encoder),
                **{name: shared_model(domain, other) for name, other in (others or {}).items()},
            }
            if len(finished) == len(domains):
                models["finished"] = finished[domain.name]
            if domain.name in together:
                models["pooled"] = together[domain.name]
            scores = {kind: score(domain, model, seed=seed, probe_rows=probe_rows) for kind, model in models.items()}
            figures[domain.name] = {kind: each.plain() for kind, each in scores.items()}
            for reason in sorted({each.not_probed for each in scores.values() if each.not_probed}):
                log.warning("no probe", domain=domain.name, reason=reason)
            on_domain(figures)
    return figures


def _names(directories: Sequence[Path]) -> list[str]:
    """A column's name for each: the folder's, or all of the path where that is taken."""
    taken = {"random", "alone", "shared", "finished", "pooled"}
    names = []
    for directory in directories:
        name = directory.name if directory.name not in taken else str(directory)
        taken.add(name)
        names.append(name)
    return names


def print_table(figures: Figures) -> None:
    """Losses (lower is better) and accuracies (higher is better) per domain; the best of alone, shared and finished is
    bold."""
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
            # a corpus without labels has no probe: a row of dashes, and nothing that is best
            rivals = [value for kind in ("alone", "shared", "finished") if (value := values.get(kind)) is not None]
            best = better(rivals) if rivals else None
            cells = [
                f"[bold]{number(value, 3)}[/bold]" if value is not None and value == best else number(value, 3)
                for value in values.values()
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
