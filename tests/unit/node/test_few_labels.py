"""Few-label accuracy on data whose answer is known: what is drawn, what is chosen by, and that nothing else is read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from common.encoders import get_encoder_type
from common.encoders.base import Batch, EncoderModel
from common.errors import NotProbed
from node_service.evaluation.few_labels import FewLabels, draws, few_label_accuracy
from node_service.evaluation.tfidf import tfidf_accuracy, tfidf_few_labels
from tests.unit.node.test_probe import Toy

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL = FewLabels(per_class=(4, 16), draws=2, test_rows=200, steps=15, rates=(1e-4, 1e-2))
KINDS = ("wind", "bank", "court")


class Hidden(EncoderModel):
    """Samples are rows of two numbers; the label is the product of their signs, which no linear classifier can read."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.drop, self.second = nn.Linear(2, 32), nn.Dropout(0.1), nn.Linear(32, 2)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.second.named_parameters())

    def encode(self, samples: Sequence[Any]) -> Any:
        return torch.tensor(np.asarray(samples), dtype=torch.float32)

    def batch(self, encoded: Any, size: int, generator: torch.Generator) -> Batch:
        return {"x": encoded[torch.randint(len(encoded), (size,), generator=generator)]}

    def loss(self, batch: Batch) -> Tensor:
        return self.second(self.drop(torch.tanh(self.first(batch["x"])))).square().mean()

    def pooled(self, samples: Sequence[Any]) -> Tensor:
        return self.second(self.drop(torch.tanh(self.first(self.encode(samples)))))

    def features(self, samples: Sequence[Any]) -> Tensor:
        return self.pooled(samples).detach()

    def export(self, directory: Path) -> None: ...


def crossed(seed: int, rows: int) -> tuple[np.ndarray, list[str]]:
    x = np.random.default_rng(seed).uniform(-2, 2, size=(rows, 2))
    return x, ["same" if a * b > 0 else "other" for a, b in x]


def texts(seed: int, rows: int) -> tuple[list[str], list[str]]:
    """Each kind has a word of its own among many that say nothing."""
    random = np.random.default_rng(seed)
    labels = [KINDS[random.integers(len(KINDS))] for _ in range(rows)]
    noise = [" ".join(f"word{random.integers(9)}" for _ in range(3)) for _ in labels]
    return [f"{words} {label}ing {words}" for words, label in zip(noise, labels, strict=True)], labels


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=60), st.integers(1, 3))
def test_draws_follow_from_labels_and_seed_and_grow_within_a_seed(labels: list[str], seeds: int) -> None:
    budget = FewLabels(per_class=(1, 4, 9), draws=seeds)
    if len(set(labels)) < 2:
        with pytest.raises(NotProbed, match="two different labels"):
            draws(labels, budget)
        return
    found = draws(labels, budget)
    assert found == draws(labels, budget) and len(found) == 3 * seeds
    by = {(draw.per_class, draw.seed): set(draw.rows) for draw in found}
    for (count, seed), rows in by.items():
        for name in set(labels):
            wanted = min(count, labels.count(name))
            assert sum(labels[row] == name for row in rows) == wanted, "every class alike, as far as it has rows"
        assert by[(1, seed)] <= rows <= by[(9, seed)]


def test_fine_tuning_finds_what_a_linear_classifier_on_top_cannot() -> None:
    budget = FewLabels(per_class=(64,), draws=1, test_rows=300, steps=120, rates=(0.0, 3e-2))
    train, test = crossed(0, 400), crossed(1, 400)
    [tuned] = list(few_label_accuracy(Hidden(0), train, test, budget))
    [stuck] = list(few_label_accuracy(Hidden(0), train, test, FewLabels(**{**vars(budget), "rates": (0.0,)})))
    assert tuned.rate == 3e-2 and stuck.rate == 0.0
    assert tuned.accuracy > 0.85 and tuned.accuracy > stuck.accuracy + 0.1
    assert (tuned.rows, tuned.test_rows) == (128, 300)


def test_the_model_stays_and_the_same_call_gives_the_same_scores_and_other_encoders_get_the_same_draws() -> None:
    model, train, test = Hidden(0), crossed(0, 200), crossed(1, 100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = list(few_label_accuracy(model, train, test, SMALL))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first == list(few_label_accuracy(model, train, test, SMALL))
    other = list(few_label_accuracy(Hidden(5), train, test, SMALL))
    assert [(score.per_class, score.seed, score.rows) for score in first] == [
        (score.per_class, score.seed, score.rows) for score in other
    ]
    assert [score.accuracy for score in first] != [score.accuracy for score in other]


@pytest.mark.parametrize("choosing", [None, 1, 2])
def test_one_draw_chooses_the_rate_for_its_size_or_each_for_itself_and_the_steps_are_those_that_were_said(
    choosing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    backward = Hidden.backward
    monkeypatch.setattr(Hidden, "backward", lambda model, loss: (steps.append(None), backward(model, loss))[1])
    budget = FewLabels((4, 8), 3, 50, steps=6, rates=(1e-4, 1e-2), first_draw=2, choosing_draws=choosing)
    scores = list(few_label_accuracy(Hidden(0), crossed(0, 200), crossed(1, 100), budget))
    assert len(steps) == budget.steps_in_all == 6 * 2 * (3 + 2 * (choosing or 3))
    assert [(score.per_class, score.seed) for score in scores] == [
        (size, draw) for size in (4, 8) for draw in (2, 3, 4)
    ]
    if choosing is not None:
        assert all(len({score.rate for score in scores if score.per_class == size}) == 1 for size in (4, 8))


def test_no_sample_is_read_beyond_those_of_the_draw() -> None:
    """The rate is chosen within the draw: whatever the other rows hold, the score is the same."""
    (x, labels), test = crossed(0, 200), crossed(1, 100)
    budget = FewLabels(per_class=(4,), draws=1, test_rows=100, steps=20, rates=(1e-3, 1e-2))
    [drawn] = draws(labels, budget)
    read = np.where(np.isin(np.arange(len(x)), drawn.rows)[:, None], x, np.nan)
    [score] = few_label_accuracy(Hidden(0), (x, labels), test, budget)
    assert [score] == list(few_label_accuracy(Hidden(0), (read, labels), test, budget))


def test_what_cannot_be_fine_tuned_says_so() -> None:
    train, test = crossed(0, 50), crossed(1, 20)
    with pytest.raises(NotProbed, match="no pooled output"):
        next(few_label_accuracy(Toy(), train, test, SMALL))
    broken = Hidden(0)
    nn.init.constant_(broken.first.weight, float("nan"))
    with pytest.raises(NotProbed, match="diverged"):
        next(few_label_accuracy(broken, train, test, SMALL))
    with pytest.raises(NotProbed, match="for the test"):
        next(few_label_accuracy(Hidden(0), train, ([], []), SMALL))


def test_tfidf_sees_the_same_rows_and_the_word_that_tells() -> None:
    train, test = texts(0, 300), texts(1, 100)
    scores = list(tfidf_few_labels(train, test, SMALL))
    assert [(score.per_class, score.seed, score.rows) for score in scores] == [
        (draw.per_class, draw.seed, len(draw.rows)) for draw in draws(train[1], SMALL)
    ]
    by_size = {size: [score.accuracy for score in scores if score.per_class == size] for size in (4, 16)}
    assert min(by_size[16]) > 0.8 and np.mean(by_size[16]) >= np.mean(by_size[4])
    everything = tfidf_accuracy(train, test)
    assert everything.accuracy == 1.0 and everything.rows == 300
    shuffled = list(np.random.default_rng(3).permutation(train[1]))
    assert tfidf_accuracy((train[0], shuffled), test).accuracy < 0.6
    with pytest.raises(NotProbed, match="is for texts"):
        tfidf_accuracy(crossed(0, 20), crossed(1, 20))
    with pytest.raises(NotProbed, match="no text has a word"):
        tfidf_accuracy((["?", "!"], ["a", "b"]), test)


@pytest.mark.parametrize("kind", ["private text", "shared text", "image"])
def test_pooled_is_features_with_a_gradient(kind: str) -> None:
    vocabulary, _, name = kind.rpartition(" ")
    encoder_type = get_encoder_type(name)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    given = small | ({"vocabulary": vocabulary} if vocabulary else {})
    architecture, assets = encoder_type.assets(encoder_type.architecture(given), {"tokenizer": "bytes"})
    samples = texts(0, 12)[0] if name == "text" else np.random.default_rng(0).integers(0, 255, (6, 8, 8), np.uint8)
    model = encoder_type.build(architecture, encoder_type.fit_private(samples, architecture, {}, assets), 0).eval()
    pooled = model.pooled(samples)
    assert torch.equal(pooled, model.features(samples)) and not model.features(samples).requires_grad
    pooled.square().sum().backward()
    # a head that is shared too has no part in what is pooled
    encoder = {key: each for key, each in model.shared_parameters().items() if not key.startswith("head.")}
    assert encoder and all(parameter.grad is not None for parameter in encoder.values())


def test_corrections_of_a_shared_vocabulary_are_fine_tuned_with_the_rest_and_the_model_stays() -> None:
    text = get_encoder_type("text")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    architecture, assets = text.assets(text.architecture(small), {"tokenizer": "bytes"})
    train, test = texts(0, 200), texts(1, 60)
    model = text.build(architecture, text.fit_private(train[0], architecture, {}, assets), 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    budget = FewLabels(per_class=(16,), draws=1, test_rows=60, steps=60, rates=(1e-2,))
    [score] = few_label_accuracy(model, train, test, budget)
    assert score.accuracy > 0.6, "a third is guessed"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()), "what was tuned is a copy, corrections too"
    same = copy.deepcopy(model)
    for correction in same.adapters.values():
        torch.nn.init.ones_(correction.up)
    assert not torch.allclose(same.features(test[0]), model.features(test[0]), atol=1e-3)
