"""What is held out is measured whole: every token of every text once, and each text's loss is its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.encoders import get_encoder_type
from common.encoders.base import Batch, EncoderModel
from common.encoders.windows import NOT_MASKED, in_order


class Numbers:
    """A model whose tokens are given, and which predicts every position."""

    def __init__(self, window: int) -> None:
        self.span, self.lead = window, 0

    def encode(self, samples: list[list[int]]) -> NDArray[np.int64]:  # type: ignore[override]
        return np.array([token for sample in samples for token in sample], dtype=np.int64)

    def batch(self, encoded: NDArray[np.int64], size: int, generator: torch.Generator) -> Batch:
        ids = torch.from_numpy(encoded.copy())[None]
        return {"input_ids": ids, "labels": ids.clone()}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7))
def test_every_token_of_every_text_is_predicted_once_in_whole_windows(lengths: list[int], window: int) -> None:
    tokens = iter(range(1, 1000))
    texts = [[next(tokens) for _ in range(length)] for length in lengths]
    found: dict[int, list[int]] = {index: [] for index in range(len(texts))}
    for batch, owners in in_order(Numbers(window), texts, torch.Generator()):  # type: ignore[arg-type]
        predicted = batch["labels"] != NOT_MASKED
        assert batch["input_ids"].shape[1] == min(window, sum(lengths))
        for owner, label in zip(owners[predicted].tolist(), batch["labels"][predicted].tolist(), strict=True):
            found[owner].append(label)
    assert list(found.values()) == texts


@pytest.fixture(scope="module")
def model() -> EncoderModel:
    kind = get_encoder_type("text")
    architecture = kind.architecture(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "vocabulary": "private",
        }
    )
    private = kind.fit_private(["the quick brown fox", "over the lazy dog"], architecture, {"vocabulary": "bytes"}, {})
    return kind.build(architecture, private, 0).eval()


def test_the_texts_losses_add_up_to_that_of_the_windows(model: EncoderModel) -> None:
    """Weighed by their positions; the same generator gives the same masks, another one others."""
    texts = ["a short one", "and one that is quite a bit longer than a window of this model is, by far", "x"]

    def measured(seed: int) -> tuple[list[float], list[float]]:
        sums, counts = model.held_out_losses(texts, torch.Generator().manual_seed(seed))
        return sums.tolist(), counts.tolist()

    stream = model.encode(texts)
    generator, whole, predicted = torch.Generator().manual_seed(0), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(stream) - 32 + 1, 32):
            batch = model.batch(stream[start : start + 32], 1, generator)
            positions = int((batch["labels"] != NOT_MASKED).sum())
            whole, predicted = whole + float(model.loss(batch)) * positions, predicted + positions
    sums, counts = measured(0)
    assert len(stream) % 32 and predicted < sum(counts) < predicted + 8, "the last window adds its tail alone"
    tail = (sum(sums) - whole) / (sum(counts) - predicted)
    assert 3 < tail < 9, "about that of guessing among 259"
    assert measured(0) == (sums, counts) and measured(1) != (sums, counts)


def test_a_texts_loss_is_that_of_its_own_positions(model: EncoderModel) -> None:
    """Against each position's loss by itself, in batches that are filled and cut anew."""
    texts = [f"a text of some length, number {index}, " * (1 + index % 4) for index in range(60)]
    sums, counts = model.held_out_losses(texts, torch.Generator().manual_seed(3))
    slow_sums, slow_counts = np.zeros(60), np.zeros(60)
    with torch.no_grad():
        for batch, owners in in_order(model, texts, torch.Generator().manual_seed(3)):  # type: ignore[arg-type]
            for window in range(len(owners)):
                for place in (batch["labels"][window] != NOT_MASKED).nonzero().flatten().tolist():
                    alone = torch.full_like(batch["labels"][window : window + 1], NOT_MASKED)
                    alone[0, place] = batch["labels"][window, place]
                    ids = batch["input_ids"][window : window + 1]
                    slow_sums[owners[window, place]] += float(model.loss({"input_ids": ids, "labels": alone}))
                    slow_counts[owners[window, place]] += 1
    assert counts.tolist() == slow_counts.tolist() and (counts > 0).all()
    np.testing.assert_allclose(sums, slow_sums, rtol=1e-5)
