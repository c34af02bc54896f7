"""The results of cells on disk: one JSON file each, written whole, and beside it the models that it speaks of.

What is there with the digest that is wanted need not be computed again; anything else is computed anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from common.durable import save_tensors, write_durably
from deploy.compare.statistics import DocumentLosses
from deploy.compare.training import State

TRAINED, TESTED, TRANSFERRED = "cells", "tests", "transfer"


@dataclass(frozen=True)
class ModelOf:
    """Where a view's model of a domain is: the tensors stored under `key`, of which `shared_only` says that the private
    parts are fresh ones; None: nothing was trained."""

    key: str | None
    shared_only: bool = False


@dataclass(frozen=True)
class CellResult:
    """What a cell gives: by view and domain the validation loss and the model. `looks` by what was looked at: steps
    and losses; `facts` are for people."""

    validation: dict[str, dict[str, float]]
    models: dict[str, dict[str, ModelOf]]
    looks: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Cells:
    """The folder of a comparison's results."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for folder in (TRAINED, TESTED, TRANSFERRED):
            (directory / folder).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, digest: str, result: CellResult, states: Mapping[str, State]) -> None:
        """Keep a result: the models first, so that a cell that is there has them."""
        if states:
            tensors = {f"{key}/{path}": each for key, state in states.items() for path, each in state.items()}
            beside = self._models(name).with_suffix(".part")
            save_tensors(beside, tensors, {"digest": digest})
            beside.replace(self._models(name))
        self._write(TRAINED, name, {"digest": digest, **asdict(result)})

    def read(self, name: str, digest: str) -> CellResult | None:
        """The result of this digest; None if there is none."""
        found = self._read(TRAINED, name, digest)
        if found is None:
            return None
        models = {
            view: {domain: ModelOf(**each) for domain, each in by_domain.items()}
            for view, by_domain in found["models"].items()
        }
        looks = {what: [(step, loss) for step, loss in each] for what, each in found["looks"].items()}
        result = CellResult(found["validation"], models, looks, found["facts"])
        stored = any(model.key is not None for views in models.values() for model in views.values())
        return None if stored and not self._models(name).exists() else result

    def states(self, name: str) -> dict[str, State]:
        """The models of a cell by key."""
        found: dict[str, State] = {}
        for path, tensor in self._tensors(name).items():
            key, _, parameter = path.partition("/")
            found.setdefault(key, {})[parameter] = tensor
        return found

    def write_test(self, name: str, digest: str, losses: Mapping[str, Mapping[str, DocumentLosses]]) -> None:
        """Keep the held-out losses of a cell's models, by view and domain."""
        plain = {
            view: {domain: {"sums": each.sums.tolist(), "counts": each.counts.tolist()} for domain, each in row.items()}
            for view, row in losses.items()
        }
        self._write(TESTED, name, {"digest": digest, "losses": plain})

    def read_test(self, name: str, digest: str) -> dict[str, dict[str, DocumentLosses]] | None:
        """What `write_test` kept under this digest; None if there is nothing."""
        found = self._read(TESTED, name, digest)
        if found is None:
            return None
        return {
            view: {
                domain: DocumentLosses(np.asarray(each["sums"], float), np.asarray(each["counts"], float))
                for domain, each in row.items()
            }
            for view, row in found["losses"].items()
        }

    def write_plain(self, folder: str, name: str, digest: str, content: Mapping[str, Any]) -> None:
        """Keep plain values in one of the folders."""
        self._write(folder, name, {"digest": digest, **content})

    def read_plain(self, folder: str, name: str, digest: str) -> dict[str, Any] | None:
        """What `write_plain` kept under this digest; None if there is nothing."""
        return self._read(folder, name, digest)

    def _models(self, name: str) -> Path:
        return self.directory / TRAINED / f"{name}.safetensors"

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self._models(name)
        return load_file(path) if path.exists() else {}

    def _write(self, folder: str, name: str, content: Mapping[str, Any]) -> None:
        write_durably(self.directory / folder / f"{name}.json", json.dumps(content).encode())

    def _read(self, folder: str, name: str, digest: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.directory / folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("digest") == digest else None
