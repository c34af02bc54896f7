"""The corpora that no node holds: read as a node reads its own, and seen to be unseen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError
from deploy.compare_settings import TransferConfig
from node_service.corpus.corpus import Corpus, load_corpus

#: Of a test part, what a node may hold: short texts come in several corpora.
_MOST_HELD = 0.1


def read_unseen(
    settings: TransferConfig, encoder_type: str, nodes: Mapping[str, Corpus], beside: Path | None
) -> dict[str, Corpus]:
    """Each corpus of `unseen`; an entry point's module is looked for in `beside` first. Raises UserError for one that
    is not of the type, has no test part, has a node's name, or is held by a node."""
    if settings.pooled_labels in nodes:
        raise UserError(f"compare.transfer.pooled_labels: {settings.pooled_labels!r} is a node's name; take another")
    if isinstance(settings.classes, dict):
        columns = {*nodes, *settings.unseen, settings.pooled_labels}
        for name in settings.classes:
            if name not in columns:
                raise UserError(f"compare.transfer.classes: there is no column {name!r}; name a node or an unseen one")
    found = {}
    for name, config in settings.unseen.items():
        where = f"compare.transfer.unseen.{name}"
        if name in nodes:
            raise UserError(f"{where}: that is a node's name, and it is not unseen; take another")
        if config.type != encoder_type:
            raise UserError(f"{where}: its type is {config.type}, and what is compared is {encoder_type}")
        corpus = load_corpus(config, beside=beside)
        if len(corpus.test) == 0 or len(corpus.train) < 2:
            raise UserError(f"{where}: it needs training samples and a test part; set test_path, or held_out above 0")
        _check_unseen(where, corpus, nodes)
        found[name] = corpus
    return found


def _check_unseen(where: str, corpus: Corpus, nodes: Mapping[str, Corpus]) -> None:
    texts = [sample for sample in corpus.test if isinstance(sample, str)]
    for name, node in nodes.items():
        held = {
            sample for part in (node.train, node.validation, node.test) for sample in part if isinstance(sample, str)
        }
        share = sum(text in held for text in texts) / max(1, len(texts))
        if share > _MOST_HELD:
            raise UserError(f"{where}: node {name!r} holds {share:.0%} of its test part; leave one of them out")
