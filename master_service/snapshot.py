"""Snapshots: the fold's state at a log offset, so that a start need not fold the whole log again.

Written beside, synced, renamed; the newest two are kept. One that is damaged is skipped, and the older one is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.durable import sync
from common.layout import Layout
from common.parameters import ParameterSet
from master_service.aggregator import Target
from master_service.fold import Fold
from master_service.message_log import PayloadStore
from master_service.state import State

_KEPT = 2


def write_snapshot(directory: Path, fold: Fold, offset: int) -> Path:
    """Write a snapshot of `fold`, which has folded the log up to and including `offset`."""
    directory.mkdir(parents=True, exist_ok=True)
    final, beside = directory / f"{offset:012d}", directory / f"{offset:012d}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for encoder, target in fold.aggregator.targets.items():
        tensors[f"{encoder}/target"] = target.parameters.vector
        if target.momentum is not None:
            tensors[f"{encoder}/momentum"] = target.momentum
    save_file(tensors, beside / "tensors.safetensors")
    state = fold.coordinator.state.model_dump_json()
    (beside / "state.json").write_text(state)
    digests = {name: _digest(beside / name) for name in ("state.json", "tensors.safetensors")}
    (beside / "manifest.json").write_text(json.dumps({"offset": offset, "sha256": digests}, indent=1))
    for path in (*beside.iterdir(), beside):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    sync(directory)
    # what a master that died while it wrote has left is no snapshot, and must not push out one that is
    found = sorted(path for path in directory.iterdir() if path.is_dir())
    kept = [path for path in found if path.suffix != ".part"][-_KEPT:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path)
    return final


def read_snapshot(directory: Path, payloads: PayloadStore) -> tuple[Fold, int]:
    """The newest whole snapshot as a fold and its offset; an empty fold and -1 if there is none."""
    found = sorted((path for path in directory.glob("*") if path.suffix != ".part"), reverse=True)
    for path in found:
        try:
            return _read(path, payloads)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            structlog.get_logger().warning(
                "snapshot damaged, taking the one before", path=str(path), problem=str(error)
            )
    return Fold(payloads), -1


def _read(path: Path, payloads: PayloadStore) -> tuple[Fold, int]:
    manifest = json.loads((path / "manifest.json").read_text())
    if manifest["offset"] != int(path.name):
        raise ValueError(f"its manifest names offset {manifest['offset']}")
    for name, digest in manifest["sha256"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
    state = State.model_validate_json((path / "state.json").read_text())
    tensors = load_file(path / "tensors.safetensors")
    fold = Fold(payloads, state)
    for name, encoder in state.encoders.items():
        if encoder.layout:
            parameters = ParameterSet(Layout(encoder.layout), tensors[f"{name}/target"])
            fold.aggregator.targets[name] = Target(parameters, tensors.get(f"{name}/momentum"))
    return fold, int(manifest["offset"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
