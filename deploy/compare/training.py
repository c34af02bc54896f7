"""Training to the best moment by a validation part: what an organisation alone, a pooled encoder and a finishing phase
have in common. The test part does not come in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.encoders.base import EncoderModel, Samples
from common.encoders.words import summed
from node_service.corpus.corpus import Corpus, taken
from node_service.evaluation.evaluate import tie
from node_service.evaluation.probe import masked_loss
from node_service.handover.contributing import contribution
from node_service.training.looks import Looks
from node_service.training.trainer import Trainer

#: Windows of a validation part that go through a model at once.
_LOOK_BATCH = 128

#: All parameters of a model by name (one that is tied to another is there once), float32 copies.
State = dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """A domain's training samples, and the validation samples that choices go by."""

    train: Samples
    validation: Samples


def parts(corpus: Corpus, share: float, seed: int) -> Parts:
    """The corpus's own validation part where it has one; else a `share` of its training samples, drawn by the seed."""
    if len(corpus.validation):
        return Parts(corpus.train, corpus.validation)
    order = np.random.default_rng([seed, 1]).permutation(len(corpus.train))
    count = min(max(1, round(share * len(order))), len(order) - 1)
    return Parts(*(taken(corpus.train, np.sort(rows)) for rows in (order[count:], order[:count])))


def agreed_words(
    corpora: Mapping[str, Corpus], private: Mapping[str, Mapping[str, Any]], share: float, seeds: Sequence[int]
) -> dict[str, int]:
    """What the domains' nodes would contribute to an agreed vocabulary, added up: those whose private settings allow
    it, of training samples that no seed sets aside for validation. The test part has no part in it."""
    lists = []
    for name, corpus in corpora.items():
        if corpus.type != "text":
            continue
        set_aside = {text for seed in seeds for text in parts(corpus, share, seed).validation}
        trained = replace(corpus, train=[text for text in corpus.train if text not in set_aside])
        lists.append(contribution(trained, private[name]))
    return summed(each for each in lists if each is not None)


class Validation:
    """A validation part as one model has it; the same windows and masks at every look, for every arm of a seed."""

    def __init__(self, model: EncoderModel, samples: Samples, windows: int, seed: int) -> None:
        self._encoded = model.encode(samples)
        self._size = min(_LOOK_BATCH, windows)
        self._batches = math.ceil(windows / self._size)
        self._seed = seed

    def loss(self, model: EncoderModel) -> float:
        """The mean loss of its windows, nats for text."""
        return masked_loss(model, self._encoded, self._seed, self._batches, self._size)


@dataclass(frozen=True)
class Pace:
    """How many steps, and how many from one look at the validation part to the next; `on_step` is called before each,
    and may raise to end the training."""

    steps: int
    look_every: int
    on_step: Callable[[], None] = lambda: None


@dataclass
class Best:
    """The best moment of a training: its `state` after `step` steps, the validation `loss`, and all looks at it."""

    state: Mapping[str, State]
    step: int
    loss: float
    looks: list[tuple[int, float]] = field(default_factory=list)


def best_of(
    take: Callable[[int], Any],
    look: Callable[[], float],
    keep: Callable[[], Mapping[str, State]],
    pace: Pace,
) -> Best:
    """Take the steps, numbered from 0, and keep what `look` finds best: before the first, every `look_every`, and
    after the last. A loss that is not finite is never best, unless it is the first."""
    best = Best(keep(), 0, look())
    best.looks.append((0, best.loss))
    for step in range(1, pace.steps + 1):
        pace.on_step()
        take(step - 1)
        if step % pace.look_every and step != pace.steps:
            continue
        loss = look()
        best.looks.append((step, loss))
        if loss < best.loss or not math.isfinite(best.loss):
            best.state, best.step, best.loss = keep(), step, loss
    return best


def state_of(model: EncoderModel) -> State:
    """A copy of all parameters."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def load_state(model: EncoderModel, state: Mapping[str, Tensor], *, shared_only: bool = False) -> None:
    """Put a state, or the shared parameters of it alone, into a model of the same build."""
    shared = {id(parameter) for parameter in model.shared_parameters().values()}
    for name, parameter in model.named_parameters():
        if not shared_only or id(parameter) in shared:
            parameter.copy_(state[name])


def train_one(trainer: Trainer, validation: Validation, pace: Pace) -> Best:
    """One model on one corpus, as the trainer stands: an organisation alone, or a node that finishes its own copy. At
    the full rate first, then down a cosine; the moment before the first step counts too."""
    return best_of(
        _falling(trainer, pace), lambda: validation.loss(trainer.model), lambda: {"": state_of(trainer.model)}, pace
    )


def _falling(trainer: Trainer, pace: Pace) -> Callable[[int], None]:
    """Takes a step of so many, at the rate that warms up with the trainer's first steps and falls in the last two
    fifths of these."""
    planned = Looks(pace.steps, pace.look_every, patience=None)

    def take(step: int) -> None:
        planned.steps = step
        trainer.step(planned.rate(trainer.inner) * trainer.warm_up)

    return take


def around_one_trunk(models: Mapping[str, EncoderModel]) -> None:
    """Put the first model's shared parameters into all of them; before trainers are made of them."""
    first, *others = models.values()
    for model in others:
        tie(model, first.shared_parameters())


def train_pooled(
    trainers: Mapping[str, Trainer],
    validations: Mapping[str, Validation],
    pace: Pace,
    *,
    one_model: bool,
) -> Best:
    """One encoder on all corpora, each step on the next domain; the best moment by the mean of the validation losses.

    `one_model`: the trainers share one model, whose state is that of the key ""; else each domain has private parts of
    its own around one trunk (see `around_one_trunk`), and a state.
    """
    models = {domain: trainer.model for domain, trainer in trainers.items()}
    domains = list(trainers)
    everything = torch.nn.ModuleList(models.values()).parameters()  # each once, however many models it is in
    optimizer = trainers[domains[0]].optimizer_for(list(everything))
    falling = {trainer: _falling(trainer, pace) for trainer in trainers.values()}

    def take(step: int) -> None:
        trainer = trainers[domains[step % len(domains)]]
        trainer.optimizer, trainer.steps = optimizer, step
        falling[trainer](step)

    def look() -> float:
        return float(np.mean([validations[domain].loss(models[domain]) for domain in domains]))

    def keep() -> Mapping[str, State]:
        return {"": state_of(models[domains[0]])} if one_model else {name: state_of(models[name]) for name in domains}

    return best_of(take, look, keep, pace)
