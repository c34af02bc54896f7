"""What a node spends on an update besides training: adopting a version, handing in, encoding, decoding, a checkpoint
(for how long training stands still, and until it is on disk); and what the master does to add four updates.

    python -m tests.benchmarks.node_arithmetic [--parameters 25e6] [--runs 5] [--threads 1] [--device cuda]

A model that has no samples and needs no step, but is as large as it is told; its optimiser has its moments. Prints
medians in milliseconds, and how far the process grew above model, optimiser and gradients, in float32 sets of all
shared parameters. `measured` gives the same as a dictionary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn

from common.encoders.base import Batch, EncoderModel
from common.numbers.compiled import add_slice, kernels
from common.numbers.encodings import decode_vector, encode_vector
from common.numbers.layout import Layout
from common.numbers.slicing import BLOCKS, SLICE, EncodingName, slices
from common.wire.to_node import Instruction, ParameterChunk, Receipt
from common.wire.transfer import CompleteVersion
from common.wire.update_rule import ReturnWhen, UpdateRule
from common.workers import OneBeside
from node_service.handover.receipt_book import Ledger
from node_service.training.session import Session
from node_service.training.training import update_manifest

_ENCODINGS: tuple[EncodingName, ...] = get_args(EncodingName)
_SIDE = 1024


class Constant(EncoderModel):
    """Square matrices and one vector, of so many numbers together, whose loss pulls every one of them the same way."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        matrices, rest = divmod(parameters, _SIDE * _SIDE)
        shapes = [(_SIDE, _SIDE)] * matrices + [(rest,)] * bool(rest)
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def encode(self, samples: Any) -> Any:
        return samples

    def batch(self, encoded: Any, size: int, generator: torch.Generator) -> Batch:
        return {}

    def loss(self, batch: Batch) -> Tensor:
        return torch.stack([part.sum() for part in self.parts]).sum()

    def features(self, samples: Any) -> Tensor:
        raise NotImplementedError

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)


class ConstantType:
    """Builds a `Constant`."""

    def __init__(self, parameters: int) -> None:
        self._parameters = parameters

    def fit_private(self, samples: Any, architecture: Any, settings: Any, assets: Any) -> dict[str, Any]:
        return {}

    def build(self, architecture: Any, private: Any, seed: int) -> EncoderModel:
        return Constant(self._parameters)


def measured(parameters: int, runs: int = 5, device: str = "cpu") -> dict[str, float]:
    """Medians in milliseconds by what was done (`adopt bfloat16`, `hand in int8`), and the highest growth in float32
    sets while an encoding was in use both ways, and in a checkpoint (`peak sets int8`, `peak sets checkpoint`)."""
    figures: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("node_service.training.session.get_encoder_type", lambda name: ConstantType(parameters)),
    ):
        for encoding in _ENCODINGS:
            one = _Bench(parameters, Path(folder) / encoding, encoding, device)
            figures |= one.updates(runs)
        figures |= one.state(runs)
    figures |= _encodings(parameters, runs)
    return figures


class _Bench:
    """One session that hands in by an encoding, and reads versions of it (of bfloat16 where that has steps)."""

    def __init__(self, parameters: int, directory: Path, encoding: EncodingName, device: str) -> None:
        layout = Layout((name, part.shape) for name, part in Constant(parameters).shared_parameters().items())
        self.parameters, self.encoding = parameters, encoding
        self.down: EncodingName = "bfloat16" if encoding in BLOCKS else encoding
        plain: dict[str, Any] = {"layout": layout.plain(), "layout_digest": layout.digest, "architecture": {}}
        instruction = Instruction(encoder="constant-1", encoder_type="constant", **plain)
        self.beside = OneBeside("checkpoint", lambda error: None)
        self.session = Session(
            instruction,
            ["a"],
            directory,
            private={},
            seed=0,
            device=device,
            ledger=Ledger("i", {}, {}),
            assets={},
            beside=self.beside,
        )
        self.session.retune(UpdateRule(encoding=encoding, when=ReturnWhen(drift=1e9, steps=10**9)), 0.0)
        self.session.step()
        self.digest = layout.digest
        self.payload = b"".join(encode_vector(torch.randn(parameters) * 0.02, self.down))
        self.version = self.sequence = 0

    def read(self) -> CompleteVersion:
        plain: dict[str, Any] = {"layout_digest": self.digest, "size": len(self.payload), "digest": "0" * 64}
        plain |= {"epoch": 1, "index": 0, "chunks": 1, "checksum": "", "data": b"", "encoding": self.down}
        self.version += 1
        return CompleteVersion(ParameterChunk(encoder="constant-1", version=self.version, **plain), self.payload)

    def updates(self, runs: int) -> dict[str, float]:
        adopted, handed_in, digested = [], [], []
        with _growth(self.parameters) as growth:
            self.session.adopt(self.read())
            for _ in range(runs):
                self.session.step()
                self.session.settle()
                begun = time.perf_counter()
                since, bodies = self.session.hand_in(self.sequence)
                self.session.settle()
                handed_in.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                update_manifest(self.session, since, bodies, "n", "i", self.sequence, wants_version=True)
                digested.append(time.perf_counter() - begun)
                del bodies
                self.session.answered(_accepted(self.sequence))
                read = self.read()
                begun = time.perf_counter()
                self.session.adopt(read)
                self.session.settle()
                adopted.append(time.perf_counter() - begun)
                self.sequence += 1
        return {
            f"hand in {self.encoding}": _median(handed_in),
            f"manifest {self.encoding}": _median(digested),
            f"adopt {self.down}": _median(adopted),
            f"peak sets {self.encoding}": growth[0],
        }

    def state(self, runs: int) -> dict[str, float]:
        figures = {"drift": _timed(lambda: self.session.must_return, runs)}
        # by whichever name it goes, what the session takes to look at its own parameters
        figures["shared()"] = _timed(getattr(self.session.trainer, "vector", self.session.trainer.shared), runs)
        stands_still, on_disk = [], []
        with _growth(self.parameters) as growth:
            self.session.hand_in(self.sequence)
            for _ in range(min(runs, 3)):
                begun = time.perf_counter()
                self.session.save("i", self.sequence + 1)
                stands_still.append(time.perf_counter() - begun)
                self.beside.wait()
                on_disk.append(time.perf_counter() - begun)
        figures |= {"checkpoint": _median(stands_still), "checkpoint on disk": _median(on_disk)}
        figures["peak sets checkpoint"] = growth[0]
        return figures


def _encodings(parameters: int, runs: int) -> dict[str, float]:
    vector, figures = torch.randn(parameters), {}
    total, room, loops = torch.zeros(parameters), torch.empty(SLICE), kernels(vector.device, parameters)

    def add_four(bodies: list[bytes], encoding: EncodingName) -> None:
        for body, (start, stop) in zip(bodies, slices(parameters), strict=True):
            for _ in range(4):
                add_slice(total[start:stop], body, encoding, 0.25, room[: stop - start], loops)

    for encoding in _ENCODINGS:
        bodies = encode_vector(vector, encoding)
        payload = b"".join(bodies)
        figures[f"add four {encoding}"] = _timed(lambda name=encoding, data=bodies: add_four(data, name), runs)
        figures[f"encode {encoding}"] = _timed(lambda name=encoding: encode_vector(vector, name), runs)
        figures[f"decode {encoding}"] = _timed(
            lambda name=encoding, data=payload: decode_vector(data, parameters, name), runs
        )
        figures[f"sha256 {encoding}"] = _timed(lambda data=payload: hashlib.sha256(data).digest(), runs)
    return figures


def _accepted(sequence: int) -> Receipt:
    plain: dict[str, Any] = {"encoder": "constant-1", "node": "n", "incarnation": "i", "digest": "0" * 64}
    return Receipt(**plain, sequence=sequence, accepted=True, reason="", version=1)


def _timed(action: Callable[[], object], runs: int) -> float:
    spent = []
    for _ in range(runs):
        begun = time.perf_counter()
        kept = action()
        spent.append(time.perf_counter() - begun)
        del kept
    return _median(spent)


def _median(seconds: list[float]) -> float:
    return round(1000.0 * statistics.median(seconds), 3)


@contextmanager
def _growth(parameters: int) -> Iterator[list[float]]:
    """Afterwards the list has one number: by how many sets the process was larger at most than when it began; nan where
    the system does not say (only Linux does)."""
    found: list[float] = []
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = float("nan")
    yield found
    found.append(round((_resident("VmHWM") - before) / (4 * parameters), 2))


def _resident(which: str) -> float:
    """Bytes of this process, as Linux says under this name."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=25e6)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the model; encodings by themselves are on the CPU")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    figures = measured(int(chosen.parameters), chosen.runs, chosen.device)
    if chosen.json:
        print(json.dumps(figures))
        return
    where = f"{chosen.device}, {chosen.threads} threads, load {os.getloadavg()[0]:.1f}"
    print(f"{int(chosen.parameters):,} parameters on {where}:")
    for name, value in figures.items():
        print(f"{name:>22} {value:10.2f}{'' if 'sets' in name else ' ms'}")


if __name__ == "__main__":
    main()
