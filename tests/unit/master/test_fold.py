"""Log, aggregator, fold and snapshot: the same entries make the same bits, and damage is found."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch

from common.errors import Damaged
from common.numbers.encodings import encode_vector
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import EncodingName
from common.wire.assets import asset_entry
from common.wire.to_master import Get, InstructionAck, Join, UpdateManifest
from common.wire.transfer import payload_digest
from master_service.arithmetic.aggregator import Aggregator, Target
from master_service.arithmetic.arithmetic import PayloadsLost
from master_service.arithmetic.measuring import Measurement, scratch
from master_service.decisions.effects import Contribution, Generate, Step
from master_service.decisions.records import Configured, Generated, Loggable, Provided, Started, UpdateFacts
from master_service.decisions.rules.model import OuterOptimizer, aggregation_rule
from master_service.decisions.settings import Settings
from master_service.history.fold import Fold
from master_service.history.replay import rebuild, verify
from master_service.history.snapshot import read_snapshot, write_snapshot
from master_service.log.message_log import MessageLog, open_log
from master_service.log.payload_files import FilePayloads, payload_path
from tests.builders import update_manifest


def checkpoint_wal(log: MessageLog) -> None:
    """Bring what stands in the ledger's WAL into its main file, as SQLite does by itself now and then."""
    db = sqlite3.connect(log.directory / "ledger.sqlite", isolation_level=None)
    [(busy, *_)] = db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    assert not busy


class Federation:
    """A log and a fold without a broker: what the shell does, in a few lines."""

    def __init__(
        self, directory: Path, preset: str, size: int = 700, assets: Mapping[str, bytes] | None = None
    ) -> None:
        self.directory = directory
        self._assets = dict(assets or {})
        self.log = open_log(directory)
        self.fold = Fold(Aggregator(self.log.payloads))
        self.layout = Layout([("w", (size,))])
        self.random = torch.Generator().manual_seed(5)
        self.at = 0.0
        self.record(Started(epoch=1, fingerprint={}))
        self.record(Configured(settings=Settings(rule=aggregation_rule(preset))))
        self.record(Get(sender="operator", encoder_type="text"))
        self.encoder = next(iter(self.fold.coordinator.state.encoders))
        for node in "abc":
            self.join(node)

    def join(self, node: str) -> None:
        self.record(Join(node=node, incarnation="i", types=["text"]))
        self.record(InstructionAck(node=node, incarnation="i", encoder=self.encoder, accepted=True, samples=10))

    def record(self, body: Loggable, facts: UpdateFacts | None = None, payload: str | None = None) -> None:
        self.at += 1.0
        entry = self.log.append(body, message_id=f"m{self.log.last_offset}", at=self.at, facts=facts, payload=payload)
        assert entry is not None
        for effect in self.fold.apply(entry):
            if isinstance(effect, Step):
                self.record(self.fold.compute(effect.encoder))
            if isinstance(effect, Generate):
                for name, content in self._assets.items():
                    provided = Provided(encoder=effect.encoder, **asset_entry(name, content).model_dump())
                    self.record(provided, payload=self.log.payloads.write(content))
                start = ParameterSet(self.layout, torch.randn(self.layout.size, generator=self.random))
                digest = self.log.payloads.write(start.to_bytes())
                body = Generated(
                    encoder=effect.encoder,
                    architecture={},
                    layout=self.layout.plain(),
                    layout_digest=self.layout.digest,
                    digest=digest,
                    assets=list(self._assets),
                )
                self.record(body, payload=digest)

    def update(self, node: str, sequence: int, loss: float = 3.0) -> None:
        bodies = encode_vector(torch.randn(self.layout.size, generator=self.random) * 0.01, "int8")
        payload = b"".join(bodies)
        finite, norm = measured(bodies, self.layout.size, "int8")
        digest = self.log.payloads.write(payload)
        assert digest == payload_digest(bodies)
        changes = {"incarnation": "i", "encoder": self.encoder, "base_version": self.state.version}
        changes |= {"steps": 5, "samples": 50, "loss": loss}
        manifest = update_manifest(node, sequence, of=self.layout, bodies=bodies, **changes)
        self.record(manifest, UpdateFacts(digest=digest, size=len(payload), finite=finite, norm=norm), digest)

    @property
    def state(self):  # type: ignore[no-untyped-def]
        return self.fold.coordinator.state.encoders[self.encoder]


def snapshot(run: Federation) -> Path:
    return write_snapshot(run.directory / "snapshots", run.fold, run.log.checksum(run.fold.offset) or "")


@pytest.mark.parametrize("preset", ["return-count", "fedavg", "fedasync", "diloco"])
def test_the_log_alone_rebuilds_every_version_bit_for_bit(tmp_path: Path, preset: str) -> None:
    run = Federation(tmp_path, preset)
    order = [node for node in "aabbcabc" for _ in range(3)]
    random.Random(preset).shuffle(order)
    digests = {0: run.state.digest}
    snapshot_after = len(order) // 2
    for sequence, node in enumerate(order):
        run.update(node, sequence)
        digests[run.state.version] = run.state.digest
        if sequence == snapshot_after:
            snapshot(run)
    assert run.state.version >= 3
    reader = open_log(tmp_path, read_only=True)
    for version, digest in digests.items():
        assert rebuild(reader, run.encoder, version)[1].digest() == digest
    assert rebuild(reader, run.encoder)[1].digest() == run.state.digest
    with pytest.raises(KeyError):
        rebuild(reader, run.encoder, run.state.version + 1)

    # a snapshot and the log after it lead to the same state and the same bits
    fold = read_snapshot(tmp_path / "snapshots", reader)
    assert 0 < fold.offset < reader.last_offset
    assert all(check is None or check.identical for _, check in verify(reader, fold))
    assert fold.coordinator.state == run.fold.coordinator.state
    assert fold.arithmetic.targets[run.encoder].parameters.digest() == run.state.digest


def test_replay_finds_a_changed_payload(tmp_path: Path) -> None:
    run = Federation(tmp_path, "fedasync")
    run.update("a", 0)
    run.update("b", 1)
    path = next(entry.payload for entry in run.log.entries() if isinstance(entry.body, UpdateManifest))
    file = payload_path(run.log.directory / "payloads", str(path))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(Damaged, match=rf"row \d+ cannot be replayed: payload {path} is damaged"):
        rebuild(open_log(tmp_path, read_only=True), run.encoder)


def test_a_damaged_snapshot_is_skipped_for_the_one_before(tmp_path: Path) -> None:
    run = Federation(tmp_path, "fedasync")
    places = []
    for sequence in range(3):
        run.update("a", sequence)
        places.append(snapshot(run))
    assert not places[0].exists()  # the newest two are kept
    tensors = places[2] / "tensors.safetensors"
    damaged = bytearray(tensors.read_bytes())
    damaged[-1] ^= 1
    tensors.write_bytes(damaged)
    fold = read_snapshot(tmp_path / "snapshots", run.log)
    assert fold.offset == int(places[1].name)
    (places[1] / "state.json").unlink()
    assert read_snapshot(tmp_path / "snapshots", run.log).offset == -1
    assert fold.coordinator.state.encoders[run.encoder].version == 2


def test_the_ledger_keeps_order_time_and_ids(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    first = log.append(Get(sender="s", encoder_type="text"), message_id="one", at=50.0)
    assert first is not None and log.append(Get(sender="s", encoder_type="text"), message_id="one", at=60.0) is None
    second = log.append(Started(epoch=1, fingerprint={"torch": "x"}), message_id="two", at=40.0)
    assert second is not None and (second.offset, second.at) == (1, 50.0)  # time never goes back
    log.close()
    again = open_log(tmp_path)
    assert list(again.entries()) == [first, second] and again.last_offset == 1
    assert [entry.offset for entry in again.entries(after=0)] == [1]
    with pytest.raises(FileNotFoundError, match="no message log in"):
        open_log(tmp_path / "nowhere", read_only=True)


def test_a_step_is_the_weighted_sum_whatever_the_threads_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    size = (1 << 20) + 777  # more than one slice
    store = FilePayloads(tmp_path)
    torch.manual_seed(3)
    start = torch.randn(size)
    updates = [torch.randn(size) * 0.1 for _ in range(3)]
    weights = [0.5, 0.2, 0.3]
    contributions = tuple(
        Contribution(store.write(b"".join(encode_vector(update, "float32"))), "float32", weight)
        for update, weight in zip(updates, weights, strict=True)
    )
    step = Step("e", 1, contributions, OuterOptimizer(lr=0.7))
    digests = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            aggregator = Aggregator(store)
            aggregator.targets["e"] = Target(ParameterSet(Layout([("w", (size,))]), start.clone()))
            digests.append(aggregator.step(step))
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1] and digests[0].digest == aggregator.digest("e")
    encoded = aggregator.encoded("e", "bfloat16")
    assert encoded.bodies == encode_vector(aggregator.targets["e"].parameters.vector, "bfloat16")
    assert encoded.digest == payload_digest(encoded.bodies)
    mean = sum(update.double() * weight for update, weight in zip(updates, weights, strict=True))
    assert torch.allclose(aggregator.targets["e"].parameters.vector.double(), start.double() - 0.7 * mean, atol=1e-6)
    assert digests[0].norm == pytest.approx(float(mean.norm()), rel=1e-6)
    before = aggregator.targets["e"].parameters.digest()
    gone = Step("e", 2, (contributions[0], Contribution("f" * 64, "float32", 0.5)), OuterOptimizer())
    with pytest.raises(PayloadsLost, match="f" * 64):
        aggregator.step(gone)
    assert aggregator.targets["e"].parameters.digest() == before


def measured(bodies: Sequence[bytes], size: int, encoding: EncodingName) -> tuple[bool, float]:
    measurement = Measurement(size, encoding, scratch())
    for body in bodies:
        measurement.add(body)
    return measurement.result()


def test_measure_sees_what_is_not_finite() -> None:
    vector = torch.full((5000,), 2.0)
    finite, norm = measured(encode_vector(vector, "float32"), 5000, "float32")
    assert finite and norm == pytest.approx(2.0 * 5000**0.5)
    vector[4999] = float("nan")
    for encoding in get_args(EncodingName):
        assert measured(encode_vector(vector, encoding), 5000, encoding) == (False, 0.0)
    for others in (
        [b"short"],
        [],
        encode_vector(torch.ones(5001), "int8"),
        encode_vector(torch.ones(5000), "int8") * 2,
    ):
        assert measured(others, 5000, "int8") == (False, 0.0)
