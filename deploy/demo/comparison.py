"""What the demo's encoder is worth in each topic, beside a random one and one that was trained alone.

The one alone takes as many steps on its topic as the node did, finishing included, from the same start, and keeps its
best moment by the same validation part; its rate and decay are its own (docs/learning.md says where from).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.encoders import get_encoder_type
from common.encoders.base import EncoderModel, PrivateSpec
from common.wire.update_rule import InnerOptimizer
from deploy.compare.held_out import bounded, document_losses
from deploy.compare.training import Pace, State, Validation, load_state, state_of, train_one
from deploy.demo.report import Figures
from node_service.corpus.corpus import Corpus
from node_service.evaluation.probe import linear_probe
from node_service.training.trainer import Trainer

#: Rate and decay of the encoder that is trained alone: what `compare --arms alone` chose; see docs/learning.md.
ALONE = InnerOptimizer(lr=6e-3, weight_decay=0.1)
#: Few labels: rows of each label, and how often they are drawn.
_LABELS, _DRAWS = 16, 10


@dataclass(frozen=True)
class Effort:
    """How thoroughly is measured: looks at the validation part and windows in each, documents of the test part at most
    (None: all), and for few labels the rows that may be drawn and those that are tested on."""

    looks: int = 20
    windows: int = 256
    documents: int | None = None
    pool_rows: int = 1000
    test_rows: int = 400


#: In a hurry: to see that it works.
QUICK = Effort(looks=4, windows=64, documents=60, pool_rows=200, test_rows=60)


@dataclass(frozen=True)
class Topic:
    """A node's topic: its samples, the model that it built, and the steps that it took."""

    name: str
    encoder_type: str
    architecture: dict[str, Any]
    spec: PrivateSpec
    corpus: Corpus
    seed: int
    encoder_seed: int
    steps: int

    def fresh(self) -> EncoderModel:
        """The node's model as it was at version 0."""
        kind = get_encoder_type(self.encoder_type)
        model = kind.build(self.architecture, self.spec, self.seed)
        with torch.no_grad():
            initial = kind.initial(self.architecture, self.encoder_seed)
            for name, parameter in model.shared_parameters().items():
                parameter.copy_(initial[name])
        return model


def compared(
    topics: Sequence[Topic],
    trained: Mapping[str, Mapping[str, State]],
    effort: Effort,
    jobs: int,
    on_done: Callable[[str], None],
) -> Figures:
    """Train each topic alone, `jobs` side by side, and measure all encoders on the topics' test parts. `trained`: by
    topic and encoder ("shared", "finished") its parameters; `on_done` is told of what is done."""
    figures: Figures = {}
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(_measured, topic, trained[topic.name], effort): topic.name for topic in topics}
        for future in as_completed(waiting):
            figures[waiting[future]] = future.result()
            on_done(waiting[future])
    return {topic.name: figures[topic.name] for topic in topics}


def _measured(topic: Topic, trained: Mapping[str, State], effort: Effort) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    model = topic.fresh()
    states: dict[str, Mapping[str, Tensor]] = {"random": state_of(model), "alone": _alone(topic, effort), **trained}
    test = bounded(topic.corpus.test, effort.documents)
    found = {}
    for kind, state in states.items():
        load_state(model, state)
        model.eval()
        losses = document_losses(model, test, topic.encoder_seed)
        found[kind] = {
            "loss": losses.mean,
            "few_labels": _few_labels(model, topic.corpus, effort),
        }
    return found


def _alone(topic: Topic, effort: Effort) -> State:
    model = topic.fresh()
    trainer = Trainer(model, model.encode(topic.corpus.train), ALONE, seed=topic.seed, device="cpu")
    validation = Validation(model, topic.corpus.validation, effort.windows, topic.encoder_seed)
    return train_one(trainer, validation, Pace(topic.steps, max(1, topic.steps // effort.looks))).state[""]


def _few_labels(model: EncoderModel, corpus: Corpus, effort: Effort) -> float:
    """Test accuracy of a linear classifier on frozen features of a few rows of each label, the mean of draws that are
    the same for every encoder; NaN without labels."""
    if corpus.train_labels is None or corpus.test_labels is None:
        return float("nan")
    random = np.random.default_rng(0)
    rows = random.permutation(len(corpus.train))[: effort.pool_rows]
    tested = random.permutation(len(corpus.test))[: effort.test_rows]
    labels = np.array([corpus.train_labels[row] for row in rows])
    truth = [corpus.test_labels[row] for row in tested]
    features = model.features([corpus.train[row] for row in rows]).numpy()
    test = model.features([corpus.test[row] for row in tested]).numpy()
    accuracies = []
    for _ in range(_DRAWS):
        chosen = [random.permutation(np.flatnonzero(labels == label))[:_LABELS] for label in np.unique(labels)]
        drawn = np.concatenate(chosen)
        accuracies.append(linear_probe(features[drawn], labels[drawn].tolist(), test, truth))
    return float(np.mean(accuracies))
