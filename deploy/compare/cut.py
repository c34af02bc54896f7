"""One organisation's samples dealt out to several: what is gained by many small owners, tried with the data of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from common.errors import UserError
from node_service.corpus.corpus import Corpus, taken


def dealt(corpora: Mapping[str, Corpus], parts: int) -> dict[str, Corpus]:
    """Each corpus as `parts` nodes NAME-1, NAME-2, …, whose training samples were drawn once for all and differ in
    number by one at most. Test and validation part stay whole: they are measures of the same thing.

    Raises UserError where a node would be left with fewer than two samples.
    """
    if parts == 1:
        return dict(corpora)
    found = {}
    for name, corpus in corpora.items():
        count = len(corpus.train)
        if count < 2 * parts:
            raise UserError(f"compare.cut {parts}: node {name!r} has {count} training samples, too few; lower it")
        order = np.random.default_rng(0).permutation(count)
        for part in range(parts):
            rows = np.sort(order[part::parts])
            labels = corpus.train_labels and [corpus.train_labels[row] for row in rows]
            found[f"{name}-{part + 1}"] = replace(corpus, train=taken(corpus.train, rows), train_labels=labels)
    return found


def owner(name: str, parts: int) -> str:
    """Whose section of the configuration a node of `dealt` has."""
    return name if parts == 1 else name.rpartition("-")[0]
