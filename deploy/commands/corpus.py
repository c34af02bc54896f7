"""`shared-encoder corpus check`: what a node would train on, for its owner to look at before it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.config import explained, suggestion
from common.errors import UserError
from common.sample_files.refusals import Refusals
from deploy.commands.display import saying
from deploy.config import load_config
from deploy.example_texts import write_corpora
from deploy.logging import configure_logging
from node_service.corpus.corpus import Corpus, CorpusConfig, load_corpus
from node_service.corpus.overview import page

#: Paths in a heading; a shell makes a glob into hundreds.
_PATHS = 3


def check_corpora(given: dict[str, Any], file: Path | None, node: str | None) -> None:
    """Read the corpus that `given` describes, with the keys of a CorpusConfig, or all of the nodes in `file`, and print
    what is there. Reads as a node does, and changes nothing.

    Raises UserError for what a node would refuse, after what can be read was printed; all broken files are in it.
    """
    configure_logging(level="warning")
    refusals = Refusals()
    for name, config, beside in _configured(given, file, node):
        corpus: Corpus | None = None
        with refusals.gathering(), saying(f"reading {name}", quiet=False):
            corpus = load_corpus(config, beside=beside)
        if corpus is not None:
            _print(name, corpus)
    refusals.check()


def write_examples(directory: Path) -> None:
    """Write the demo's corpora, and say where each is and how large. Raises UserError."""
    try:
        written = write_corpora(directory)
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}") from None
    for topic, (train, test) in written.items():
        texts = sum(1 for file in (train, test) for _ in file.open())
        print(
            f"{topic:<12} {texts:>5} texts, {(train.stat().st_size + test.stat().st_size) / 1e6:.1f} MB: {train.parent}"
        )


def _configured(
    given: dict[str, Any], file: Path | None, node: str | None
) -> Iterator[tuple[str, CorpusConfig, Path | None]]:
    """What to read: a name to show, its configuration, and the folder where an entry point's module may lie."""
    if "path" in given or "entry_point" in given:
        if node is not None:
            raise UserError("--node is for the corpora of --config; give it without paths")
        try:
            config = CorpusConfig(**given)
        except ValidationError as error:
            raise explained(error, CorpusConfig, "corpus check") from None
        shown = " ".join(config.path[:_PATHS]) + (
            f" and {len(config.path) - _PATHS} more" if config.path[_PATHS:] else ""
        )
        yield config.entry_point or shown, config, file.parent if file is not None else None
        return
    if file is None:
        raise UserError("nothing to check: give PATH, --entry-point MODULE:FUNCTION, or --config FILE")
    if given:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is for paths; without any, --config says it all")
    nodes = load_config(file, {}).nodes
    if node is not None and node not in nodes:
        raise UserError(f"{file} has no node {node!r}; {suggestion(node, nodes) if nodes else 'it has none'}")
    configured = [(name, config) for name in ([node] if node else nodes) for config in nodes[name].corpus]
    if not configured:
        raise UserError(f"{file} has no corpus for a node; add [nodes.NAME.corpus], or give PATH")
    for name, config in configured:
        yield f"nodes.{name}", config, file.parent


def _print(name: str, corpus: Corpus) -> None:
    print(name)
    for heading, line in page(corpus):
        print(f"  {heading:<9} {line}")
