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
from common.encoders.windows import NOT_MASKED, documents


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
    found: dict[int, list[int]] = {}
    for index, batch, predicted in documents(Numbers(window), texts, torch.Generator()):  # type: ignore[arg-type]
        labels = batch["labels"][batch["labels"] != NOT_MASKED].tolist()
        assert len(labels) == predicted
        assert batch["input_ids"].shape[1] == min(window, sum(lengths))
        found.setdefault(index, []).extend(labels)
    assert [found[index] for index in range(len(texts))] == texts


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

    def total(seed: int) -> tuple[float, int]:
        sums, counts = 0.0, 0
        with torch.no_grad():
            for _, batch, predicted in model.held_out(texts, torch.Generator().manual_seed(seed)):
                sums, counts = sums + float(model.loss(batch)) * predicted, counts + predicted
        return sums, counts

    stream = model.encode(texts)
    generator, sums, counts = torch.Generator().manual_seed(0), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(stream) - 32 + 1, 32):
            batch = model.batch(stream[start : start + 32], 1, generator)
            predicted = int((batch["labels"] != NOT_MASKED).sum())
            sums, counts = sums + float(model.loss(batch)) * predicted, counts + predicted
    whole, predicted = total(0)
    assert len(stream) % 32 and counts < predicted < counts + 8, "the last window adds its tail alone"
    tail = (whole - sums) / (predicted - counts)
    assert 3 < tail < 9, "about that of guessing among 259"
    assert total(0) == (whole, predicted) and total(1) != (whole, predicted)
