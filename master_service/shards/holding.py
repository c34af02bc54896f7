"""An aggregator's part of every encoder: where it stands after a start, and what a step makes of it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.crash_points import reached
from common.durable import save_tensors, sync
from common.errors import Damaged
from common.numbers.encodings import encoded_slices
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import EncodingName, elements, shard_slices, slice_count, slices
from master_service.arithmetic.aggregator import Aggregator, Target
from master_service.arithmetic.arithmetic import PayloadsLost
from master_service.decisions.effects import Contribution, Step
from master_service.shards.store import Begun, ShardStore, Stepped
from master_service.wire.orders import Compute, packed

log = structlog.get_logger()

#: Snapshots of an encoder that are kept.
_KEPT = 2


def part_of(size: int, number: int, shards: int) -> range:
    """The slices of a vector of `size` numbers that this shard has."""
    return shard_slices(slice_count(size), shards)[number]


class Holding:
    """Aggregator `number` of `shards`, as a Target for each encoder: its slices of the parameter set, and of the outer
    optimiser's momentum. Made: it stands where its store ends. Raises Damaged."""

    def __init__(self, store: ShardStore, number: int, shards: int) -> None:
        self._store = store
        self._number, self._shards = number, shards
        self._aggregator = Aggregator(store.payloads)
        #: Held while a target changes, or is copied; and while a snapshot is written.
        self._still, self._writing = threading.Lock(), threading.Lock()
        self.versions: dict[str, int] = {}
        #: By encoder: the newest version that a snapshot is of.
        self._written: dict[str, int] = {}
        for begun in store.encoders():
            self._restore(begun)

    def begin(self, encoder: str, size: int, payload: str) -> None:
        """Version 0 is here, as a payload that was kept."""
        begun = Begun(encoder, size, payload)
        reached("shard before begun")
        self._store.begin(begun)
        self._restore(begun)

    def step(self, order: Compute) -> Stepped | None:
        """Compute the version that comes next; or give it as it was computed, None if that was another step. The newest
        is taken back then: another aggregator had lost something of it, and nobody has seen it. Raises PayloadsLost."""
        plain = _plain(order)
        if (before := self._store.version(order.encoder, order.version)) is not None:
            if Compute.model_validate_json(before.step) == plain:
                return before
            if order.version < self.versions[order.encoder]:
                return None
            self._take_back(order.encoder)
        with self._still:
            made = self._aggregator.step(_step(order))
            stepped = Stepped(order.version, plain.model_dump_json(), made.digest, packed(list(made.squares)))
            reached("shard before stepped")
            self._store.step(order.encoder, stepped)
            self.versions[order.encoder] = order.version
        return stepped

    def _take_back(self, encoder: str) -> None:
        """Go back to the version before the newest. Raises Damaged."""
        with self._writing, self._still:
            log.warning("a version is computed of other updates", encoder=encoder, version=self.versions[encoder])
            self._store.unstep(encoder, self.versions[encoder])
            reached("shard after taking back")
            self._written.pop(encoder, None)
            self._restore(next(begun for begun in self._store.encoders() if begun.encoder == encoder))

    def encoded(self, encoder: str, encoding: EncodingName) -> list[bytes]:
        """The slices that are held here."""
        vector = self._vector(encoder)
        return list(encoded_slices(vector, encoding)) if vector.numel() else []

    def slice(self, encoder: str, index: int) -> bytes:
        """One of them, by its number in the whole, float32."""
        size = next(begun.size for begun in self._store.encoders() if begun.encoder == encoder)
        first = part_of(size, self._number, self._shards).start
        start, stop = list(slices(self._vector(encoder).numel()))[index - first]
        return self._vector(encoder)[start:stop].numpy().tobytes()

    @property
    def changed(self) -> list[str]:
        """The encoders that were stepped since a snapshot of them was written."""
        versions = list(self.versions.items())  # at once: in another thread one may begin
        return [encoder for encoder, version in versions if version > self._written.get(encoder, 0)]

    def snapshot(self) -> None:
        """Write what has changed, in whatever thread: a step waits until the operating system has it. Raises
        OSError."""
        for encoder in self.changed:
            with self._writing:
                self._write(encoder)

    def _write(self, encoder: str) -> None:
        folder = self._store.directory / "snapshots" / encoder
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / "newest.part"
        with self._still:
            target, version = self._aggregator.targets[encoder], self.versions[encoder]
            tensors, momentum = {"target": target.parameters.vector}, ""
            if target.momentum is not None:
                tensors["momentum"], momentum = target.momentum, _digest(target.momentum)
            digests = {"target": target.parameters.digest(), "momentum": momentum}
            save_tensors(beside, tensors, digests, synced=False)
        reached("shard during snapshot")
        sync(beside)
        path = folder / f"{version:012d}.safetensors"
        beside.replace(path)
        sync(folder)
        reached("shard after snapshot")
        self._written[encoder] = version
        for _, old in self._store.snapshots(encoder)[:-_KEPT]:
            old.unlink()

    def _restore(self, begun: Begun) -> None:
        count = elements(begun.size, part_of(begun.size, self._number, self._shards))
        layout, version = Layout([("part", (count,))]), 0
        for number, path in reversed(self._store.snapshots(begun.encoder)):
            if (target := _read(path, layout)) is not None:
                self._aggregator.targets[begun.encoder], version = target, number
                self._written[begun.encoder] = version
                break
        else:
            with self._whole():
                self._aggregator.begin(begun.encoder, layout, begun.part)
        self.versions[begun.encoder] = version
        for stepped in self._store.versions(begun.encoder, version):
            with self._whole():
                made = self._aggregator.step(_step(Compute.model_validate_json(stepped.step)))
            if made.digest != stepped.digest:
                raise Damaged(
                    f"version {stepped.version} of {begun.encoder} is not what {self._store.directory} says it was: "
                    "that is damaged, or another torch or processor computed it"
                )
            self.versions[begun.encoder] = stepped.version

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """What is computed again needs what it was computed of. Raises Damaged."""
        try:
            yield
        except PayloadsLost as error:
            raise Damaged(f"{error}, in {self._store.directory / 'payloads'}: restore it from a backup") from None

    def _vector(self, encoder: str) -> Tensor:
        return self._aggregator.targets[encoder].parameters.vector


def _step(order: Compute) -> Step:
    contributions = tuple(
        Contribution(each.payload, each.encoding, each.coefficient, each.part) for each in order.contributions
    )
    return Step(order.encoder, order.version, contributions, order.outer, order.combine)


def _plain(order: Compute) -> Compute:
    """The same whenever it is given."""
    return order.model_copy(update={"request": "kept"})


def _digest(vector: Tensor) -> str:
    return hashlib.sha256(vector.numpy().data).hexdigest()


def _read(path: Path, layout: Layout) -> Target | None:
    """What a snapshot holds; None if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            said, names = file.metadata() or {}, set(file.keys())
            parameters = ParameterSet(layout, file.get_tensor("target").clone())
            momentum = file.get_tensor("momentum").clone() if "momentum" in names else None
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("snapshot damaged, taking another", path=str(path), problem=str(error))
        return None
    is_whole = parameters.digest() == said.get("target")
    if not is_whole or ("" if momentum is None else _digest(momentum)) != said.get("momentum"):
        log.warning("snapshot damaged, taking another", path=str(path), problem="it does not match its checksum")
        return None
    return Target(parameters, momentum)
