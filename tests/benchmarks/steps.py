"""Steps a second of a node's trainer, by what it computes in, and whether it is compiled.

    python -m tests.benchmarks.steps [--parameters 10M] [--device cpu] [--seconds 10] [--only "bfloat16 compiled"]

A real masked language model on one device, with nobody else there. Each variant is warmed up, then measured; what the
warming up took stands beside it, because that is where compiling goes. `looks`: how often a step of the GPU waits for a
number (torch's own count of such places), which ought to be never.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.encoders import get_encoder_type
from common.wire.update_rule import InnerOptimizer
from node_service.training.trainer import Trainer
from tests.benchmarks.time_lost import ARCHITECTURES

#: By name: what the trainer is given.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "float32 compiled": {"precision": "float32", "compiled": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16 compiled": {"precision": "bfloat16", "compiled": True},
}
_WARM_STEPS = 8


def trainer_of(
    parameters: str, texts: Sequence[str], device: str, *, batch: int, window: int, **options: Any
) -> Trainer:
    """The whole model of a node around a fresh encoder, with its private parts, and what trains it."""
    text = get_encoder_type("text")
    sizes = {**ARCHITECTURES[parameters], "sequence_length": window, "initializer_range": 0.02}
    architecture, assets = text.assets(text.architecture(sizes), {})
    model = text.build(architecture, text.fit_private(texts, architecture, {}, assets), 0)
    inner = InnerOptimizer(batch_size=batch, lr=3e-4)
    return Trainer(model, model.encode(texts), inner, seed=0, device=device, **options)  # type: ignore[arg-type]


def measured(trainer: Trainer, device: str, seconds: float) -> dict[str, float]:
    """After a few steps: steps a second of so many seconds, in the long run and at the median of fifths of it."""
    begun = time.monotonic()
    for _ in range(_WARM_STEPS):
        trainer.step()
    trainer.settle()
    warm = time.monotonic() - begun
    rates = []
    for _ in range(5):
        begun, steps = time.monotonic(), 0
        while time.monotonic() < begun + seconds / 5:
            trainer.step()
            steps += 1
        trainer.settle()
        rates.append(steps / (time.monotonic() - begun))
    found = {"steps_per_second": round(statistics.median(rates), 2), "slowest_fifth": round(min(rates), 2)}
    return {**found, "warm_up_seconds": round(warm, 1), **_looks(trainer, device)}


def _looks(trainer: Trainer, device: str) -> dict[str, float]:
    """Places in a step at which the GPU is waited for."""
    if torch.device(device).type != "cuda":
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"looks": sum("synchroniz" in str(each.message) for each in caught)}


def _texts(place: str) -> list[str]:
    files = sorted(Path().glob(place)) if not place.startswith("/") else sorted(Path("/").glob(place[1:]))
    return [paragraph for file in files for paragraph in file.read_text("utf-8").split("\n\n") if paragraph.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", choices=ARCHITECTURES, default="10M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each variant")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="variants, by name")
    parser.add_argument("--corpus", default=f"{Path(__file__).parents[2]}/docs/*.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    texts = _texts(chosen.corpus)
    for name in chosen.only:
        made = trainer_of(
            chosen.parameters, texts, chosen.device, batch=chosen.batch, window=chosen.window, **VARIANTS[name]
        )
        print(json.dumps({"variant": name, **measured(made, chosen.device, chosen.seconds)}), flush=True)
        del made


if __name__ == "__main__":
    main()
