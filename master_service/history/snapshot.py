"""Snapshots: the fold's state at a log offset, so that a start need not fold the whole log again.

Taken in the thread that decides, which goes on at once; written in another. Until the operating system has the targets,
no step changes them; to hash and to sync them, which takes longer, nobody waits for. Written beside, synced, renamed;
the newest two are kept. One that is damaged is skipped, and the older one is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.crash_points import reached
from common.durable import save_tensors, sync
from common.errors import Damaged
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from master_service.arithmetic.aggregator import Aggregator, Target
from master_service.decisions.state import State
from master_service.history.fold import Fold
from master_service.log.message_log import MessageLog, repair_hint
from master_service.log.payloads import Payloads

#: What the state consists of. A snapshot of another one is not used; the log leads to the same state.
STATE_SCHEMA = 3

_KEPT = 2
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot says of itself. `buffered`: payloads of updates that wait for a version; `checksum`: that of the
    log's row at `offset`."""

    offset: int
    checksum: str
    buffered: tuple[str, ...]
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot of one moment. `write` keeps it, in whatever thread, and raises OSError; whether it was called or not,
    `let_go` is: no step changes a target before. Either lets go, and once is enough."""

    write: Callable[[], None]
    let_go: Callable[[], None] = lambda: None


class Snapshots(Protocol):
    """Where a master keeps its snapshots."""

    def read(self) -> Fold[Any]:
        """The newest whole one as a fold; an empty fold if there is none. Raises Damaged if the log does not hold the
        rows that it was made of."""

    def take(self, fold: Fold[Any], checksum: str) -> Taken:
        """A snapshot of `fold` as it is now; `checksum` is that of the log's row at its offset."""

    def kept(self) -> list[Manifest]:
        """Those that a start may use, oldest first."""


class SnapshotDirectory:
    """The Snapshots of a real master, in the folder `snapshots` beside its log."""

    def __init__(self, log: MessageLog) -> None:
        self._directory = log.directory / "snapshots"
        self._log = log

    def read(self) -> Fold[Aggregator]:
        return read_snapshot(self._directory, self._log, set_aside=True)

    def take(self, fold: Fold[Any], checksum: str) -> Taken:
        writer = _Writer(self._directory, fold, checksum)
        return Taken(writer.write, writer.let_go)

    def kept(self) -> list[Manifest]:
        return kept_snapshots(self._directory)


def write_snapshot(directory: Path, fold: Fold[Aggregator], checksum: str) -> Path:
    """Write a snapshot of `fold`; `checksum` is that of the log's row at its offset."""
    _Writer(directory, fold, checksum).write()
    return directory / _name(fold.offset)


def _name(offset: int) -> str:
    return f"{offset:012d}"


class _Writer:
    """Writes what a fold was when this was made."""

    def __init__(self, directory: Path, fold: Fold[Aggregator], checksum: str) -> None:
        state = fold.coordinator.state
        self._directory = directory
        self._name = _name(fold.offset)
        self._manifest = {
            "schema": STATE_SCHEMA,
            "offset": fold.offset,
            "checksum": checksum,
            "buffered": [item.payload for encoder in state.encoders.values() for item in encoder.buffer],
        }
        self._state = state.model_dump_json()
        self._tensors: dict[str, torch.Tensor] = {}
        for encoder, target in fold.arithmetic.targets.items():
            self._tensors[f"{encoder}/target"] = target.parameters.vector
            if target.momentum is not None:
                self._tensors[f"{encoder}/momentum"] = target.momentum
        self._release: Callable[[], None] | None = fold.arithmetic.hold()

    def let_go(self) -> None:
        """Steps may change the targets."""
        release, self._release, self._tensors = self._release, None, {}
        if release is not None:
            release()

    def write(self) -> None:
        directory = self._directory
        final, beside = directory / self._name, directory / f"{self._name}.part"
        try:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                save_tensors(beside / "tensors.safetensors", self._tensors, synced=False)
            finally:
                self.let_go()
            self._complete(beside)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)  # half a snapshot must not take the room that is missing
            raise
        reached("during snapshot")
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        sync(directory)
        reached("after snapshot")
        # what a master that died while it wrote has left is no snapshot, and must not push out one that is
        found = sorted(path for path in directory.iterdir() if path.is_dir())
        kept = sorted(_snapshots(directory))[-_KEPT:]
        for path in found:
            if path not in kept:
                shutil.rmtree(path)

    def _complete(self, beside: Path) -> None:
        """What says that it is whole; then all of it reaches the disk."""
        (beside / "state.json").write_text(self._state)
        digests = {name: _digest(beside / name) for name in ("state.json", "tensors.safetensors")}
        manifest = {**self._manifest, "sha256": digests}
        (beside / "manifest.json").write_text(json.dumps({**manifest, "seal": _seal(manifest)}, indent=1))
        for path in (*beside.iterdir(), beside):
            sync(path)


def read_snapshot(
    directory: Path, log: MessageLog, *, oldest: bool = False, at_least: int = -1, set_aside: bool = False
) -> Fold[Aggregator]:
    """The newest whole snapshot (or the oldest that is not before the row `at_least`) as a fold; an empty fold if
    there is none. `set_aside`: one that is damaged is renamed, so that it does not push out one that is whole.

    Raises Damaged if the log does not hold, or no longer holds, the rows that the snapshot was made of.
    """
    for path in sorted(_snapshots(directory), reverse=not oldest):
        try:
            manifest, fold = _read(path, log.payloads)
        except _DAMAGE as error:
            structlog.get_logger().warning("snapshot damaged, taking another", path=str(path), problem=str(error))
            if set_aside:
                path.replace(path.with_suffix(".damaged"))
            continue
        if manifest.offset < at_least:
            continue
        if manifest.offset > log.last_offset:
            raise Damaged(
                f"the ledger in {log.directory} ends at row {log.last_offset}, but the snapshot {path} was made of row "
                f"{manifest.offset}: rows are lost; {repair_hint(log.directory)}"
            )
        if log.checksum(manifest.offset) != manifest.checksum:
            raise Damaged(f"the snapshot {path} was made of another ledger; {repair_hint(log.directory)}")
        return fold
    return Fold(Aggregator(log.payloads))


def kept_snapshots(directory: Path) -> list[Manifest]:
    """The manifests of the snapshots that a start may use, oldest first; of those that cannot be read none."""
    return [manifest for _, manifest in usable_snapshots(directory)]


def usable_snapshots(directory: Path) -> list[tuple[Path, Manifest]]:
    """The same with the folder of each."""
    found = []
    for path in sorted(_snapshots(directory)):
        try:
            found.append((path, _manifest(path)))
        except _DAMAGE:
            continue  # a start skips it too
    return found


def whole_snapshots(directory: Path, payloads: Payloads) -> list[tuple[Path, Manifest | str]]:
    """Every snapshot, oldest first, read as a whole: its manifest, or what is wrong with it in words."""
    found: list[tuple[Path, Manifest | str]] = []
    for path in sorted(_snapshots(directory)):
        try:
            found.append((path, _read(path, payloads)[0]))
        except _DAMAGE as error:
            found.append((path, str(error)))
    return found


def _snapshots(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*") if path.suffix == ""]


def _manifest(path: Path) -> Manifest:
    plain = json.loads((path / "manifest.json").read_text())
    if plain.pop("seal") != _seal(plain):
        raise ValueError("its manifest does not match its checksum")
    if plain.get("schema") != STATE_SCHEMA:
        raise ValueError(f"another release has written it (state schema {plain.get('schema', 1)}, not {STATE_SCHEMA})")
    manifest = Manifest(int(plain["offset"]), str(plain["checksum"]), tuple(plain["buffered"]), dict(plain["sha256"]))
    if manifest.offset != int(path.name):
        raise ValueError(f"its manifest names offset {manifest.offset}")
    return manifest


def _read(path: Path, payloads: Payloads) -> tuple[Manifest, Fold[Aggregator]]:
    manifest = _manifest(path)
    for name, digest in manifest.sha256.items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
    state = State.model_validate_json((path / "state.json").read_text())
    tensors = load_file(path / "tensors.safetensors")
    fold = Fold(Aggregator(payloads), state, manifest.offset)
    for name, encoder in state.encoders.items():
        if encoder.layout and encoder.shards == 1:  # else the numbers lie with its aggregators
            parameters = ParameterSet(Layout(encoder.layout), tensors[f"{name}/target"])
            fold.arithmetic.targets[name] = Target(parameters, tensors.get(f"{name}/momentum"))
    return manifest, fold


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
