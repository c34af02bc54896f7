"""What is simulated, and everything that is left to chance, drawn from the seed before the run begins."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ByteSize, Field

from common.config import Section
from common.wire.update_rule import UpdateRule
from master_service.decisions.rules.model import AggregationRule
from master_service.decisions.settings import Settings, StopRule

#: The encoder type of a simulation: nobody can load one, because there is no model.
ENCODER_TYPE = "simulated"

#: Of the whole run as it is estimated: when the first and the last late node joins, node leaves or is killed, and for
#: how long it is away at least and at most. The master is away for less.
_HAPPENS = (0.05, 0.6)
_AWAY = (0.05, 0.2)
_MASTER_AWAY = (0.01, 0.05)

Share = Annotated[float, Field(ge=0, le=1)]


class Plan(Section):
    """The arguments of a simulation. Speeds in steps a second, the link in bytes a second each way; the shares are of
    the nodes that join late, leave and return, or are killed and started again, each once."""

    nodes: Annotated[int, Field(ge=1)] = 200
    returns: Annotated[int, Field(ge=1)] = 50
    speeds: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)] = (1.0,)
    steps: Annotated[int, Field(ge=1)] = 10
    parameters: Annotated[int, Field(ge=1)] = 64
    link: Annotated[ByteSize, Field(ge=1)] = ByteSize(10_000_000)
    late: Share = 0.0
    leave: Share = 0.0
    crash: Share = 0.0
    crash_master: bool = False
    seed: int = 0
    rule: AggregationRule = AggregationRule()
    update: UpdateRule = UpdateRule()

    @property
    def updates(self) -> int:
        """How many counted updates end the run."""
        return self.nodes * self.returns

    @property
    def estimated_seconds(self) -> float:
        """The virtual time of the run if no node ever waited; at least 1."""
        speed = sum(self.speed(index) for index in range(self.nodes))
        return max(1.0, self.updates * self.steps / speed)

    def speed(self, index: int) -> float:
        """Steps a second of a node."""
        return self.speeds[index % len(self.speeds)]

    def settings(self, on_time: int) -> Settings:
        """What the master decides by: training begins once all nodes are there that are not late."""
        when = self.update.when.model_copy(update={"steps": self.steps})
        return Settings(
            rule=self.rule,
            update_rule=self.update.model_copy(update={"when": when}),
            stop=StopRule(updates=self.updates),
            min_nodes=on_time,
            architecture={"parameters": self.parameters},
            seed=self.seed,
        )

    def arguments(self) -> dict[str, Any]:
        """As they are written into the report."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Absence:
    """From when to when a node or the master is away, virtual seconds. `killed`: it does not say goodbye."""

    begins: float
    ends: float
    killed: bool


@dataclass(frozen=True)
class Fate:
    """What happens to one node: when it joins, and whether it is away later."""

    joins: float = 0.0
    absence: Absence | None = None


def node_name(index: int) -> str:
    return f"node-{index:04d}"


def fates(plan: Plan) -> list[Fate]:
    """One for each node. The shares are of different nodes as long as they add up to no more than all."""
    chance, whole = random.Random(f"{plan.seed}/fates"), plan.estimated_seconds
    order = list(range(plan.nodes))
    chance.shuffle(order)
    chosen, begin = [], 0
    for share in (plan.late, plan.leave, plan.crash):
        count = round(share * plan.nodes)
        chosen.append({order[(begin + place) % plan.nodes] for place in range(count)})
        begin += count
    late, leaving, crashing = chosen
    if len(late) == plan.nodes:
        late.discard(order[0])  # one has to begin
    found = []
    for index in range(plan.nodes):
        joins = whole * chance.uniform(*_HAPPENS) if index in late else 0.0
        away = index in leaving or index in crashing
        absence = _absence(chance, whole, _AWAY, joins, killed=index in crashing) if away else None
        found.append(Fate(joins, absence))
    return found


def master_fate(plan: Plan) -> Absence | None:
    """When the master is killed, if it is."""
    chance = random.Random(f"{plan.seed}/master")
    return _absence(chance, plan.estimated_seconds, _MASTER_AWAY, killed=True) if plan.crash_master else None


def _absence(
    chance: random.Random, whole: float, away: tuple[float, float], after: float = 0.0, *, killed: bool
) -> Absence:
    begins = after + whole * chance.uniform(*_HAPPENS)
    return Absence(begins, begins + whole * chance.uniform(*away), killed)
