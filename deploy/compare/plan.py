"""What is to be computed: the arms, the cells of each, what a cell depends on, and which point of the grid is chosen.

A cell is one training: an arm, one domain of it or all, a seed, and a point of the grid. Pure: nothing is read here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from common.wire.update_rule import UpdateRule
from deploy.compare_settings import ALONE, BASELINES, POOLED, POOLED_ALL, RANDOM, Attack, CompareConfig
from master_service.decisions.rules.model import AggregationRule

#: A federated arm's views: each node's own copy after the finishing phase, the final version within each node's private
#: parts, and the final version within fresh ones. The first is the arm's own column.
FINISHED, VERSION, WITHOUT = "finished", "version", "without private parts"

#: Goes into every digest: another number means that a cell is computed in another way.
_SCHEMA = 2


@dataclass(frozen=True, order=True)
class Point:
    """A point of the grid; `finish_share` is there for federated arms alone."""

    lr: float
    weight_decay: float
    finish_share: float | None = None


@dataclass(frozen=True, order=True)
class Cell:
    """One training. `domain` None: of all domains together; `point` None: nothing is trained."""

    arm: str
    domain: str | None
    seed: int
    point: Point | None

    @property
    def name(self) -> str:
        """A file's name: no two cells have the same."""
        parts = [self.arm, self.domain or "all", f"seed{self.seed}"]
        if self.point is not None:
            parts += [f"lr{self.point.lr:g}", f"decay{self.point.weight_decay:g}"]
            if self.point.finish_share is not None:
                parts.append(f"finish{self.point.finish_share:g}")
        return "_".join(parts)


@dataclass(frozen=True)
class FederatedArm:
    """What the master of an arm decides by, and what it tells its nodes; and what so many `hostile` members do."""

    rule: AggregationRule
    update: UpdateRule
    finish_shares: tuple[float, ...]
    attack: Attack | None = None
    hostile: int = 0


@dataclass(frozen=True)
class Comparison:
    """Everything that a cell depends on, but for the samples; `fingerprints` are those of the training samples.

    `architecture` and `assets` are the encoder's, `initial` where its first version comes from (generation and source),
    `overrides` what was asked for of the architecture, all of which is in it.
    """

    settings: CompareConfig
    encoder_type: str
    architecture: dict[str, Any]
    assets: dict[str, bytes]
    initial: tuple[str, str | None]
    overrides: dict[str, Any]
    base_seed: int
    update: UpdateRule
    federated: dict[str, FederatedArm]
    arms: tuple[str, ...]
    private: dict[str, dict[str, Any]]
    fingerprints: dict[str, str]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.private)

    @property
    def seeds(self) -> list[int]:
        return [self.base_seed + index for index in range(self.settings.seeds)]

    @property
    def tune_seeds(self) -> list[int]:
        """Those on which the grid is run."""
        return self.seeds[: self.settings.tune_seeds]

    def speed(self, domain: str) -> float:
        """Steps a second of the domain's node."""
        return self.settings.speeds.get(domain, self.settings.speed)

    def steps(self, domain: str) -> int:
        """The training steps of the domain's node, the same in every arm but the pooled ones: as many as it takes in
        the time in which all nodes together take `settings.steps` each."""
        mean = fmean(self.speed(each) for each in self.domains)
        return max(1, round(self.settings.steps * self.speed(domain) / mean))

    def pooled_steps(self, arm: str) -> int:
        """Of a pooled arm: as many as one node, or as all together unless the settings say otherwise."""
        if arm == POOLED:
            return self.settings.steps
        return self.settings.pooled_steps or sum(map(self.steps, self.domains))

    def finishing_steps(self, domain: str, point: Point) -> int:
        """How many of the node's steps are of the finishing phase."""
        return round(self.steps(domain) * (point.finish_share or 0.0))

    def cost(self, cell: Cell) -> int:
        """Training steps of a cell."""
        if cell.point is None:
            return 0
        if cell.domain is not None:
            return self.steps(cell.domain)
        if cell.arm in BASELINES:
            return self.pooled_steps(cell.arm)
        return sum(map(self.steps, self.domains))

    def points(self, arm: str) -> list[Point]:
        """The grid of an arm, in order."""
        if arm == RANDOM:
            return []
        shares: Sequence[float | None] = self.federated[arm].finish_shares if arm in self.federated else [None]
        rates, decays = self.settings.learning_rates, self.settings.weight_decays
        return [Point(lr, decay, share) for lr in rates for decay in decays for share in shares]

    def parts(self, arm: str) -> list[str | None]:
        """What is trained, and chosen, apart from the others: each domain where it is alone, else all together."""
        return list(self.domains) if arm == ALONE else [None]

    def tuning(self) -> list[Cell]:
        """The cells that the choice rests on; and those without a grid, which have no choice."""
        found = []
        for arm in self.arms:
            points = self.points(arm)
            for part in self.parts(arm):
                found += [Cell(arm, part, seed, point) for point in points for seed in self.tune_seeds]
                found += [] if points else [Cell(arm, part, seed, None) for seed in self.seeds]
        return found

    def chosen(self, choices: Mapping[tuple[str, str | None], Point]) -> list[Cell]:
        """The cells that are reported: every seed, at the point that was chosen for the arm and part."""
        return [
            Cell(arm, part, seed, choices.get((arm, part)))
            for arm in self.arms
            for part in self.parts(arm)
            for seed in self.seeds
        ]

    def choose(self, validation: Callable[[Cell], float]) -> dict[tuple[str, str | None], Point]:
        """For each arm and part the point of the least `validation` loss (of a cell), mean over the seeds of the grid;
        the first of equals. A loss that is not finite is the worst. Knows nothing of the test part."""

        def mean(arm: str, part: str | None, point: Point) -> float:
            found = fmean(validation(Cell(arm, part, seed, point)) for seed in self.tune_seeds)
            return found if math.isfinite(found) else math.inf

        return {
            (arm, part): min(points, key=lambda point: mean(arm, part, point))  # called at once
            for arm in self.arms
            if (points := self.points(arm))
            for part in self.parts(arm)
        }

    def digest(self, cell: Cell) -> str:
        """Of everything that the cell's result depends on. Two cells with the same digest have the same result."""
        settings = self.settings
        domains = [cell.domain] if cell.domain else list(self.domains)
        arm = self.federated.get(cell.arm)
        on: dict[str, Any] = {
            "schema": _SCHEMA,
            "cell": asdict(cell),
            "type": self.encoder_type,
            "architecture": self.architecture,
            "assets": {name: hashlib.sha256(body).hexdigest() for name, body in sorted(self.assets.items())},
            "initial": self.initial,
            "domains": {name: [self.fingerprints[name], self.private[name], self.steps(name)] for name in domains},
            "validation": settings.validation,
        }
        if (settings.device, settings.precision) != ("cpu", "float32"):
            on["computed"] = [settings.device, settings.precision]
        if cell.point is not None:
            on["looks"] = [settings.look_every, settings.look_windows]
            inner = (arm.update if arm else self.update).inner.model_dump(mode="json")
            on["inner"] = inner | {"lr": cell.point.lr, "weight_decay": cell.point.weight_decay}
        if cell.arm in (POOLED, POOLED_ALL):
            on["steps"] = self.pooled_steps(cell.arm)
        if arm is not None:
            update = arm.update.model_dump(mode="json", exclude={"inner"})
            on["federated"] = [arm.rule.model_dump(mode="json"), update]
            on["world"] = [{name: self.speed(name) for name in domains}, settings.link]
            if arm.attack is not None:
                on["attack"] = [arm.attack, arm.hostile]
        return hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()


def columns(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """The columns of the report in order: name → (arm, view). A federated arm's own is that after finishing."""
    found: dict[str, tuple[str, str]] = {}
    for arm in comparison.arms:
        if arm in comparison.federated:
            found[arm] = (arm, FINISHED)
            found[f"{arm}, {VERSION}"] = (arm, VERSION)
            found[f"{arm}, {WITHOUT}"] = (arm, WITHOUT)
        else:
            found[arm] = (arm, arm)
    return found
