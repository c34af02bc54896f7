"""What a shared encoder is worth on one owner's data, next to a random one, one trained alone, and a pooled one.

All of them have the same private spec (vocabulary, image shape), the same architecture and the same seeds, so that
their masked losses are comparable. `pooled` is what nobody may do: one trunk trained centrally on everybody's samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.encoders import get_encoder_type
from common.encoders.base import EncoderModel
from common.errors import NotProbed, UserError
from common.numbers.parameters import ParameterSet
from common.wire.update_rule import InnerOptimizer
from node_service.corpus.corpus import Corpus
from node_service.evaluation.probe import probe
from node_service.training.checkpoint import Facts, read_checkpoint
from node_service.training.finishing import load_finished
from node_service.training.private_parts import load_private, load_spec
from node_service.training.trainer import Trainer

#: Called with (steps done, steps in all) between steps.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Domain:
    """One owner's corpus and the private parts that its node saved. `steps` is what the node trained."""

    name: str
    corpus: Corpus
    directory: Path
    pinned: Facts

    @classmethod
    def of(cls, name: str, corpora: Mapping[str, Corpus], directory: Path) -> Domain:
        """The domain of a node's directory, with the one of `corpora` (by encoder type) that the node trained on.

        Raises UserError if no node has finished there, if its corpus is not among them, or holds no samples out.
        """
        checkpoint = read_checkpoint(directory)
        if checkpoint is None:
            raise UserError(f"{directory}: node {name!r} has not saved private parts there; has it been trained?")
        kind = checkpoint.facts.type
        if kind not in corpora:
            have = ", ".join(corpora) or "nothing"
            raise UserError(f"node {name!r} was trained on samples of type {kind}, and its configuration names {have}")
        if len(corpora[kind].test) == 0:
            raise UserError(f"node {name!r} holds no samples out; set test_path, or held_out above 0")
        return cls(name, corpora[kind], directory, checkpoint.facts)

    @property
    def steps(self) -> int:
        return self.pinned.steps


@dataclass(frozen=True)
class Scores:
    """Masked loss on held-out samples (nats for text), and probe accuracies where there are labels that serve;
    `not_probed` says why they do not."""

    loss: float
    probe: float | None = None
    knn: float | None = None
    majority: float | None = None
    not_probed: str | None = None

    def plain(self) -> dict[str, float | None]:
        figures = asdict(self)
        del figures["not_probed"]
        return figures


def score(domain: Domain, model: EncoderModel, *, seed: int = 0, probe_rows: int = 2000) -> Scores:
    """Evaluate a whole model on all of a domain's held-out samples, with the masks of the seed: without labels, by its
    loss alone. It is the loss that `compare` tests by: of two models with one private spec, on equal terms."""
    corpus = domain.corpus
    model.eval()
    sums, counts = model.held_out_losses(corpus.test, torch.Generator().manual_seed(seed))
    loss = float(sums.sum() / counts.sum()) if counts.sum() else math.nan
    if corpus.train_labels is None or corpus.test_labels is None:
        return Scores(loss)
    try:
        result = probe(
            model,
            (corpus.train, corpus.train_labels),
            (corpus.test, corpus.test_labels),
            train_rows=probe_rows,
            test_rows=max(1, probe_rows // 2),
        )
    except NotProbed as reason:
        return Scores(loss, not_probed=str(reason))
    return Scores(loss, result.linear, result.knn, result.majority)


def shared_model(domain: Domain, encoder: Mapping[str, Tensor]) -> EncoderModel:
    """The node's private parts around the finished shared encoder."""
    model = fresh_model(domain, encoder)
    if load_private(domain.directory, model) is None:
        raise UserError(f"{domain.directory}: no private parts")
    return model


def finished_model(domain: Domain) -> EncoderModel | None:
    """The node's own copy after its finishing phase; None if it had none. Raises UserError for a damaged one."""
    model = fresh_model(domain)
    return model if load_finished(domain.directory, model, domain.pinned.version) else None


def fresh_model(domain: Domain, encoder: Mapping[str, Tensor] | None = None, seed: int = 0) -> EncoderModel:
    """The node's vocabulary and architecture with fresh private parts, around a fresh or a given shared encoder.

    Raises UserError for an encoder of another architecture.
    """
    encoder_type = get_encoder_type(domain.pinned.type)
    architecture = domain.pinned.architecture
    spec = load_spec(domain.directory)
    if spec is None:
        raise UserError(f"{domain.directory}: spec.json is missing; has the node been trained?")
    model = encoder_type.build(architecture, spec, seed)
    shared = {name: parameter.data for name, parameter in model.shared_parameters().items()}
    parameters = ParameterSet.from_tensors(encoder or encoder_type.initial(architecture, seed))
    difference = parameters.layout.difference(ParameterSet.from_tensors(shared).layout)
    if difference is not None:
        raise UserError(f"node {domain.name!r} was trained with another encoder than is to be evaluated: {difference}")
    parameters.scatter(shared)
    return model


def train_alone(domain: Domain, inner: InnerOptimizer, progress: Progress, *, seed: int = 0) -> EncoderModel:
    """As many steps as the node trained, from the same start, on this corpus alone."""
    model = fresh_model(domain, seed=seed)
    trainer = Trainer(model, model.encode(domain.corpus.train), inner, seed=seed, device="cpu")
    for step in range(domain.steps):
        trainer.progress = step / domain.steps
        trainer.step()
        progress(step + 1, domain.steps)
    return model


def train_pooled(
    domains: Sequence[Domain], inner: InnerOptimizer, progress: Progress, *, seed: int = 0
) -> dict[str, EncoderModel]:
    """One trunk under all private parts, trained centrally: each step on the next domain, as many as all nodes took."""
    models = {domain.name: fresh_model(domain, seed=seed) for domain in domains}
    trunk = next(iter(models.values())).shared_parameters()
    for model in models.values():
        tie(model, trunk)
    holder = torch.nn.ModuleList(models.values())
    trainers = [
        Trainer(models[domain.name], models[domain.name].encode(domain.corpus.train), inner, seed=seed, device="cpu")
        for domain in domains
    ]
    optimizer = trainers[0].optimizer_for(list(holder.parameters()))
    total = sum(domain.steps for domain in domains)
    for step in range(total):
        trainer = trainers[step % len(trainers)]
        trainer.optimizer, trainer.steps, trainer.progress = optimizer, step, step / total
        trainer.step()
        progress(step + 1, total)
    return models


def tie(model: EncoderModel, trunk: Mapping[str, torch.nn.Parameter]) -> None:
    """Put the trunk's parameters in the place of the model's own shared ones."""
    by_id = {id(parameter): name for name, parameter in model.shared_parameters().items()}
    places = [(path, by_id[id(p)]) for path, p in model.named_parameters() if id(p) in by_id]
    for path, name in places:
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent).register_parameter(leaf, trunk[name])
