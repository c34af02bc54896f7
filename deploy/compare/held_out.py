"""The held-out loss of a model on a domain's test part, document by document. Called once all choices are made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common.encoders.base import EncoderModel, Samples
from deploy.compare.statistics import DocumentLosses
from node_service.corpus.corpus import taken


def document_losses(model: EncoderModel, samples: Samples, seed: int) -> DocumentLosses:
    """The masked loss of all of the samples, each once. The masks are the seed's, the same for every model of one
    spec."""
    was_training = model.training
    model.eval()
    losses = DocumentLosses(*model.held_out_losses(samples, torch.Generator().manual_seed(seed)))
    model.train(was_training)
    return losses


def bounded(samples: Samples, most: int | None) -> Samples:
    """The test part that is measured: all of it, or its first `most` samples in an order that is drawn once for all."""
    if most is None or len(samples) <= most:
        return samples
    rows = np.sort(np.random.default_rng(0).permutation(len(samples))[:most])
    chosen: Samples = taken(samples, rows)
    return chosen


def fingerprint(samples: Sequence[Any]) -> str:
    """The sha256 of samples in their order: other samples have another one."""
    digest = hashlib.sha256()
    if isinstance(samples, np.ndarray):
        digest.update(f"{samples.dtype}{samples.shape}".encode())
        digest.update(np.ascontiguousarray(samples).tobytes())
        return digest.hexdigest()
    for sample in samples:
        raw = sample.encode("utf-8", "surrogatepass") if isinstance(sample, str) else repr(sample).encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()
