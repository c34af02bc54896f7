"""A whole federation in this process, for notebooks and tests: the real master and nodes, under a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.encoders import get_encoder_type
from common.errors import UserError
from common.exports import check_writable
from deploy.commands.run import check_node_id
from deploy.config import Config, load_config
from deploy.simulation.configured import ConfiguredFederation
from master_service.decisions.settings import overlaid
from node_service.corpus.corpus import Corpus, CorpusConfig, corpus_of, load_corpus
from node_service.evaluation.evaluate import Domain, finished_model, fresh_model, score, shared_model

#: Steps between two updates, unless said otherwise, and the share of its steps that each node finishes alone with.
_STEPS, _FINISH_SHARE = 10, 0.25
#: Where what comes of it lies, below the folder of a run.
STATE, NODES, ENCODER = "master", "nodes", "encoder"


@dataclass(frozen=True)
class NodeOutcome:
    """What became of a node. Losses are masked losses of its held-out samples (nats for text), with private parts of
    its own: `before` training, `after` with the shared encoder, and `finished` its own copy at the end."""

    directory: Path
    updates: int
    weights: float
    before: float
    after: float
    finished: float


@dataclass(frozen=True)
class Outcome:
    """The encoder that was made, and each node by name."""

    encoder: str
    version: int
    nodes: Mapping[str, NodeOutcome]


def read_corpora(sources: Mapping[str, Any], encoder_type: str) -> dict[str, Corpus]:
    """Each node's samples, which are in memory, or in files that a path or glob names. Raises UserError."""
    if not sources:
        raise UserError("a federation needs a node: give the samples of one at least, by its name")
    corpora = {}
    for name, source in sources.items():
        check_node_id(name)
        if isinstance(source, str | Path):
            read = load_corpus(CorpusConfig(type=encoder_type, path=(str(source),)))
            # labels are for probes, which are `evaluate`'s matter and need an extra
            corpora[name] = replace(read, train_labels=None, test_labels=None)
        else:
            corpora[name] = corpus_of(source, f"the corpus of {name!r}", encoder_type)
    return corpora


def embedded_config(out: Path, corpora: Mapping[str, Corpus], given: Mapping[str, Any], seed: int) -> Config:
    """The configuration of a run into `out`: `given`, shaped as a configuration file, above what a short run wants.
    Raises UserError for a setting that is none, a node that has no samples, and an `out` that is not empty."""
    nodes = {
        name: {"state_dir": out / NODES / name, "seed": seed * len(corpora) + index}
        for index, name in enumerate(corpora)
    }
    if strangers := sorted(set(given.get("nodes", ())) - set(nodes)):
        raise UserError(f"settings.nodes names {strangers[0]!r}, which has no samples; there are: {', '.join(nodes)}")
    check_writable(out, out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give another folder, or none for one that goes with the result")
    table: dict[str, Any] = {
        "master": {"state_dir": out / STATE, "export_dir": out / ENCODER},
        "encoder": {"seed": seed, "min_nodes": len(corpora)},
        "update": {"when": {"steps": _STEPS}, "finish": {"share": _FINISH_SHARE}},
        "nodes": nodes,
    }
    return load_config(None, overlaid(table, given))


def train_embedded(
    config: Config, corpora: Mapping[str, Corpus], speeds: Mapping[str, float], on_version: Callable[[int], None]
) -> Outcome:
    """From the first message to the last finishing phase, and what it is worth on every node's held-out samples.

    `speeds` are steps a second of the virtual clock, by node; `on_version` is given the newest version's number, and
    may raise. Raises UserError if the encoder could not be made.
    """
    steps = (config.update.when.steps or _STEPS) * (config.stop.versions or 1)
    federation = ConfiguredFederation(config, corpora, speeds, seconds=steps / min(speeds.values()))
    newest = -1

    def look(report: object) -> None:
        nonlocal newest
        encoder = federation.master.encoder
        if encoder is not None and encoder.version > newest:
            newest = encoder.version
            on_version(newest)

    federation.train({}, look)
    encoder = federation.master.result
    assert encoder is not None, "train raises otherwise"
    kind, place = get_encoder_type(encoder.encoder_type), config.master.export_dir
    assert place is not None
    first = kind.initial(encoder.architecture, config.encoder.seed)
    _, last = kind.architecture_of(place)
    nodes = {}
    for name, session in federation.sessions.items():
        domain = Domain.of(name, {encoder.encoder_type: corpora[name]}, session.directory)
        after = shared_model(domain, last)
        own = finished_model(domain) or after
        before = fresh_model(domain, first, config.nodes[name].seed)
        losses = (score(domain, model).loss for model in (before, after, own))
        member = encoder.members[name]
        nodes[name] = NodeOutcome(session.directory, member.returns, member.weight, *losses)
    return Outcome(encoder.encoder, encoder.version, nodes)
