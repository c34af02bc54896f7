"""Where cells are computed: one after the other, in one process, with one torch thread."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from common.encoders import get_encoder_type
from common.encoders.base import EncoderModel, PrivateSpec, Samples
from common.numbers.parameters import ParameterSet
from common.wire.update_rule import FinishRule, InnerOptimizer
from deploy.compare.cells import CellResult, Cells, ModelOf
from deploy.compare.federation import GRACE_SECONDS, Member, Trained, TrainedFederation
from deploy.compare.held_out import bounded, document_losses, fingerprint
from deploy.compare.hostile import foreign
from deploy.compare.plan import FINISHED, VERSION, WITHOUT, Cell, Comparison, FederatedArm, Point
from deploy.compare.training import (
    Best,
    Pace,
    Parts,
    State,
    Validation,
    around_one_trunk,
    load_state,
    parts,
    state_of,
    train_one,
    train_pooled,
)
from deploy.compare_settings import ALONE, RANDOM
from master_service.decisions.settings import Settings, StopRule
from node_service.corpus.corpus import Corpus
from node_service.training.trainer import Trainer


class Bench:
    """Computes cells of a comparison into `cells`. `on_step` is called between steps, and may raise to end a cell."""

    def __init__(
        self,
        comparison: Comparison,
        corpora: Mapping[str, Corpus],
        cells: Cells,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.comparison = comparison
        self._corpora = corpora
        self._cells = cells
        self._on_step = on_step
        self._type = get_encoder_type(comparison.encoder_type)
        # what a domain has in a seed is the same in every cell
        self.parts = cache(self._make_parts)
        self._spec = cache(self._make_spec)
        self._initial = cache(self._make_initial)
        self._fingerprint = cache(lambda domain: fingerprint(self._test(domain)))

    # --- training --------------------------------------------------------------------------------------------------

    def train(self, cell: Cell) -> None:
        """Compute a cell and keep it. Reads training and validation samples alone."""
        started = time.monotonic()
        if cell.point is None:
            result, states = self._random(cell)
        elif cell.arm == ALONE:
            result, states = self._alone(cell, cell.point)
        elif cell.arm in self.comparison.federated:
            result, states = self._federated(cell, cell.point)
        else:
            result, states = self._pooled(cell, cell.point)
        result.facts["seconds"] = round(time.monotonic() - started, 2)
        self._cells.write(cell.name, self.comparison.digest(cell), result, states)

    def trained(self, cell: Cell) -> CellResult | None:
        """What `train` kept; None if that is still to be done."""
        return self._cells.read(cell.name, self.comparison.digest(cell))

    def _random(self, cell: Cell) -> tuple[CellResult, dict[str, State]]:
        losses = {name: self.validation(name, cell.seed).loss(self.model(name, cell.seed)) for name in self._domains}
        models = {name: ModelOf(None) for name in self._domains}
        return CellResult({RANDOM: losses}, {RANDOM: models}), {}

    def _alone(self, cell: Cell, point: Point) -> tuple[CellResult, dict[str, State]]:
        domain = cell.domain or ""
        inner = self.inner(point)
        trainer = self.trainer(domain, cell.seed, inner, self.model(domain, cell.seed))
        pace = self._pace(self.comparison.steps(domain))
        best = train_one(trainer, self.validation(domain, cell.seed), pace)
        result = CellResult(
            {ALONE: {domain: best.loss}},
            {ALONE: {domain: ModelOf(domain)}},
            {domain: best.looks},
            {"steps": {domain: trainer.steps}, "best_step": {domain: best.step}},
        )
        return result, {domain: best.state[""]}

    def _pooled(self, cell: Cell, point: Point) -> tuple[CellResult, dict[str, State]]:
        seed, inner, steps = cell.seed, self.inner(point), self.comparison.pooled_steps(cell.arm)
        # where each has its copy of a base makes no difference: by its digest they are the same
        specs = [{**self._spec(name, seed), "base_directory": None} for name in self._domains]
        # with the same private spec everywhere nothing keeps the domains apart: one model on the union of the samples
        one = all(spec == specs[0] for spec in specs)
        first = self.model(self._domains[0], seed)
        models = {name: first if one else self.model(name, seed) for name in self._domains}
        if not one:
            around_one_trunk(models)
        trainers = {name: self.trainer(name, seed, inner, models[name]) for name in self._domains}
        validations = {name: self.validation(name, seed) for name in self._domains}
        best = train_pooled(trainers, validations, self._pace(steps), one_model=one)
        keys = {name: "" if one else name for name in self._domains}
        losses = {}
        for name, model in models.items():
            load_state(model, best.state[keys[name]])
            losses[name] = validations[name].loss(model)
        result = CellResult(
            {cell.arm: losses},
            {cell.arm: {name: ModelOf(key) for name, key in keys.items()}},
            {"mean": best.looks},
            {"steps": steps, "best_step": best.step, "one_model": one},
        )
        return result, dict(best.state)

    def _federated(self, cell: Cell, point: Point) -> tuple[CellResult, dict[str, State]]:
        plan, seed = self.comparison, cell.seed
        arm = plan.federated[cell.arm]
        inner = self.inner(point, arm.update.inner)
        members = {
            name: Member(
                plan.encoder_type,
                self.parts(name, seed).train,
                self._spec(name, seed),
                plan.speed(name),
                plan.steps(name) - plan.finishing_steps(name, point),
            )
            for name in self._domains
        }
        honest, members = list(members), members | self._hostile(arm, members, seed)
        settings = Settings(
            rule=arm.rule,
            # here the phase is the comparison's own, so that every arm is measured alike, and at the same moments
            update_rule=arm.update.model_copy(
                update={"inner": inner, "evaluate_every": 0, "finish": FinishRule(what="none")}
            ),
            stop=StopRule(seconds=GRACE_SECONDS + max(each.steps / each.speed for each in members.values())),
            min_nodes=len(members),
            architecture=plan.architecture,
            seed=seed,
        )
        with tempfile.TemporaryDirectory(prefix="shared-encoder-compare-") as folder:
            initial = plan.architecture, self._initial(seed)
            federation = TrainedFederation(
                members,
                settings,
                initial,
                Path(folder),
                seed=seed,
                link=plan.settings.link,
                device=plan.settings.device,
                precision=plan.settings.precision,
            )
            trained = federation.train(self._on_step)
        validation: dict[str, dict[str, float]] = {view: {} for view in (FINISHED, VERSION, WITHOUT)}
        states: dict[str, State] = {}
        best: dict[str, Best] = {}
        together = {name: trainer.steps for name, trainer in trained.trainers.items()}
        for name, trainer in trained.trainers.items():
            looks = self.validation(name, seed)
            shared = states[f"{VERSION} {name}"] = state_of(trainer.model)
            fresh = self.model(name, seed)
            load_state(fresh, shared, shared_only=True)
            validation[WITHOUT][name] = looks.loss(fresh)
            best[name] = train_one(trainer, looks, self._pace(plan.finishing_steps(name, point)))
            states[f"{FINISHED} {name}"] = best[name].state[""]
            validation[VERSION][name] = best[name].looks[0][1]
            validation[FINISHED][name] = best[name].loss
        models = {
            FINISHED: {name: ModelOf(f"{FINISHED} {name}") for name in honest},
            VERSION: {name: ModelOf(f"{VERSION} {name}") for name in honest},
            WITHOUT: {name: ModelOf(f"{VERSION} {name}", shared_only=True) for name in honest},
        }
        facts = {
            "steps": {name: trainer.steps for name, trainer in trained.trainers.items()},
            "steps_together": together,
            "best_step": {name: each.step for name, each in best.items()},
            "versions": trained.encoder.version,
            "updates": trained.encoder.updates,
            "virtual_seconds": trained.virtual_seconds,
            **self._counted(trained, [name for name in members if name not in honest]),
        }
        return CellResult(validation, models, {name: each.looks for name, each in best.items()}, facts), states

    def _hostile(self, arm: FederatedArm, members: Mapping[str, Member], seed: int) -> dict[str, Member]:
        """The arm's hostile members: each has the samples of a node, or what nobody can read of them."""
        found = {}
        for index in range(arm.hostile):
            like = members[self._domains[index % len(self._domains)]]
            train = foreign(like.train, seed) if arm.attack == "foreign" else like.train
            found[f"hostile-{index}"] = replace(like, train=train, attack=arm.attack)
        return found

    @staticmethod
    def _counted(trained: Trained, hostile: list[str]) -> dict[str, Any]:
        """What of the hostile members' updates counted, and with what weight."""
        books = {name: trained.encoder.members[name] for name in hostile}
        counted = {name: {"updates": each.returns, "weight": each.weight} for name, each in books.items()}
        return {"hostile": counted} if counted else {}

    # --- the test part, once all choices are made ------------------------------------------------------------------

    def test(self, cell: Cell) -> None:
        """Measure the models of a cell on the test parts of its domains, and keep the losses."""
        result = self.trained(cell)
        assert result is not None, "a cell is trained before it is tested"
        states = self._cells.states(cell.name)
        losses = {
            view: {
                name: document_losses(self._stored(name, cell.seed, model, states), self._test(name), cell.seed)
                for name, model in models.items()
            }
            for view, models in result.models.items()
        }
        self._cells.write_test(cell.name, self.test_digest(cell), losses)

    def test_digest(self, cell: Cell) -> str:
        """Of everything that the held-out losses depend on, the test parts among it."""
        domains = [cell.domain] if cell.domain else list(self._domains)
        on = [self.comparison.digest(cell), *map(self._fingerprint, domains)]
        return hashlib.sha256(" ".join(on).encode()).hexdigest()

    def _test(self, domain: str) -> Samples:
        return bounded(self._corpora[domain].test, self.comparison.settings.test_documents)

    def _stored(self, domain: str, seed: int, stored: ModelOf, states: Mapping[str, State]) -> EncoderModel:
        model = self.model(domain, seed)
        if stored.key is not None:
            load_state(model, states[stored.key], shared_only=stored.shared_only)
        return model

    # --- what a domain has in a seed --------------------------------------------------------------------------------

    @property
    def _domains(self) -> tuple[str, ...]:
        return self.comparison.domains

    def _make_parts(self, domain: str, seed: int) -> Parts:
        return parts(self._corpora[domain], self.comparison.settings.validation, seed)

    def _make_spec(self, domain: str, seed: int) -> PrivateSpec:
        """Fitted to the training samples alone."""
        plan = self.comparison
        return self._type.fit_private(
            self.parts(domain, seed).train, plan.architecture, plan.private[domain], plan.assets
        )

    def _make_initial(self, seed: int) -> ParameterSet:
        """Version 0 of every arm."""
        generation, source = self.comparison.initial
        if generation == "continue":
            tensors = self._type.architecture_of(Path(source or ""), self.comparison.overrides)[1]
        else:
            tensors = self._type.initial(self.comparison.architecture, seed)
        return ParameterSet.from_tensors({name: tensor.float() for name, tensor in tensors.items()})

    def model(self, domain: str, seed: int) -> EncoderModel:
        """As every arm begins: version 0 within fresh private parts."""
        model = self._type.build(self.comparison.architecture, self._spec(domain, seed), seed)
        self._initial(seed).scatter({name: parameter.data for name, parameter in model.shared_parameters().items()})
        return model.to(self.comparison.settings.device)

    def trainer(self, domain: str, seed: int, inner: InnerOptimizer, model: EncoderModel) -> Trainer:
        """Of a model on the domain's training samples; the windows and masks are the seed's."""
        settings, encoded = self.comparison.settings, model.encode(self.parts(domain, seed).train)
        return Trainer(model, encoded, inner, seed=seed, device=settings.device, precision=settings.precision)

    def validation(self, domain: str, seed: int) -> Validation:
        """The domain's validation part, by which everything is chosen."""
        windows = self.comparison.settings.look_windows
        return Validation(self.model(domain, seed), self.parts(domain, seed).validation, windows, seed)

    def inner(self, point: Point, inner: InnerOptimizer | None = None) -> InnerOptimizer:
        """The inner optimiser at a point of the grid."""
        rates = {"lr": point.lr, "weight_decay": point.weight_decay}
        return (inner or self.comparison.update.inner).model_copy(update=rates)

    @property
    def corpora(self) -> Mapping[str, Corpus]:
        """By name: of the domains, and of those that no node holds."""
        return self._corpora

    @property
    def cells(self) -> Cells:
        """Where results are kept."""
        return self._cells

    def on_step(self) -> None:
        """To be called between steps; may raise."""
        self._on_step()

    def _pace(self, steps: int) -> Pace:
        return Pace(steps, self.comparison.settings.look_every, self._on_step)
