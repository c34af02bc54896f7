"""What an aggregation rule consists of, and the named presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.errors import UserError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightRule(_Part):
    """weight = samples^`samples_power` × staleness factor × return-count factor; see `weights`."""

    samples_power: Annotated[float, Field(ge=0, le=2)] = 0.0
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"
    staleness_exponent: Annotated[float, Field(ge=0)] = 0.5
    hinge_start: Annotated[int, Field(ge=0)] = 4
    count: Literal["balanced", "sqrt", "newcomer", "increasing", "none"] = "balanced"
    count_bound: Annotated[float, Field(ge=1)] = 4.0
    count_scale: Annotated[float, Field(gt=0)] = 10.0
    target_share: Literal["uniform", "samples"] = "uniform"


class BufferRule(_Part):
    """When the updates at hand become the next version; see `buffer`. `grace_seconds` flushes what waits that long."""

    kind: Literal["arrival", "count", "half", "cohort"] = "half"
    size: Annotated[int, Field(ge=1)] = 3
    grace_seconds: Annotated[float, Field(gt=0)] = 60.0


class OuterOptimizer(_Part):
    """How the weighted mean of pseudo-gradients moves the target parameter set; see `outer`.

    `lr` is the step's rate, and with `rho` its least: then the rate is such that each direction in which updates move
    is moved by that share of what the nodes moved; see `rate`."""

    optimizer: Literal["sgd", "nesterov"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 1.0
    rho: Annotated[float, Field(gt=0, le=2)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class GuardRule(_Part):
    """What is refused (`max_staleness`, versions) or cut (`norm_clip`, a multiple of the median over nodes of the usual
    norm of each one's updates, for a single step; None: nothing is cut)."""

    max_staleness: Annotated[int, Field(ge=0)] = 50
    norm_clip: Annotated[float, Field(gt=0)] | None = 2.0


class CombineRule(_Part):
    """What becomes of the updates of a version: their weighted mean, or a robust statistic over the distinct nodes that
    `liars` of them, whatever they send, cannot move far; see `arithmetic/robust` for the formulas.

    Of a node with several updates at hand the mean counts. A robust rule needs 2·`liars` + 3 distinct nodes for every
    version, and waits for them, without a grace time. `iterations`: of the two that iterate (None: 32 of the geometric
    median, 3 of centred clipping). `smoothing`: the least distance of the geometric median, as a share of the nodes'
    median norm. `radius`: the L2 norm that centred clipping cuts to; None: the nodes' median distance.
    """

    how: Literal["mean", "median", "trimmed-mean", "geometric-median", "centered-clip"] = "mean"
    liars: Annotated[int, Field(ge=0, le=10_000)] = 1
    iterations: Annotated[int, Field(ge=1, le=1000)] | None = None
    smoothing: Annotated[float, Field(gt=0, le=1)] = 1e-6
    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def robust(self) -> bool:
        return self.how != "mean"

    @property
    def needs_all_parameters(self) -> bool:
        """Whether updates are compared as a whole, and not coordinate by coordinate."""
        return self.how in ("geometric-median", "centered-clip")

    @property
    def needs(self) -> int:
        """The distinct nodes without which there is no version: with 2f + 1 a majority is honest, with two more the
        honest ones are more than one around whatever is in the middle."""
        return 2 * self.liars + 3 if self.robust else 1


class AggregationRule(_Part):
    """The first preset rule: how updates and weights make the next target parameter set."""

    preset: str = "return-count"
    weights: WeightRule = WeightRule()
    buffer: BufferRule = BufferRule()
    outer: OuterOptimizer = OuterOptimizer()
    guards: GuardRule = GuardRule()
    combine: CombineRule = CombineRule()

    @model_validator(mode="after")
    def _goes_together(self) -> AggregationRule:
        if self.combine.robust and self.outer.rho is not None:
            raise ValueError(
                f"outer.rho is for a mean of updates: with combine.how = {self.combine.how!r} set outer.lr instead"
            )
        if self.combine.robust and self.weights.samples_power > 0:
            raise ValueError(
                f"with combine.how = {self.combine.how!r} every node counts once, whatever samples it claims: "
                "set weights.samples_power = 0"
            )
        return self

    @property
    def synchronous(self) -> bool:
        """Whether nodes wait for the next version after they returned."""
        return self.buffer.kind == "cohort"


_PLAIN = {"staleness": "constant", "count": "none"}

#: Each preset by what differs from the defaults, with its source.
PRESETS: dict[str, dict[str, Any]] = {
    # patents CN110909875B / US12229667B2: a node's weight follows how often it has returned
    "return-count": {},
    # McMahan et al. 2017: the cohort's mean, weighted by samples
    "fedavg": {"weights": {"samples_power": 1.0, **_PLAIN}, "buffer": {"kind": "cohort"}},
    # Xie et al. 2019, in its pseudo-gradient form: every arrival, mixed with α (1+τ)^-½
    "fedasync": {"weights": {"count": "none"}, "buffer": {"kind": "arrival"}, "outer": {"lr": 0.6}},
    # Nguyen et al. 2022: K arrivals, each scaled by (1+τ)^-½
    "fedbuff": {"weights": {"count": "none"}, "buffer": {"kind": "count", "size": 3}},
    # Douillard et al. 2023: the cohort's mean through an outer Nesterov step
    "diloco": {
        "weights": _PLAIN,
        "buffer": {"kind": "cohort"},
        "outer": {"optimizer": "nesterov", "lr": 0.7, "momentum": 0.9},
    },
}


def aggregation_rule(preset: str, changes: Mapping[str, Any] | None = None) -> AggregationRule:
    """A preset with some numbers changed. Raises UserError for an unknown preset."""
    if preset not in PRESETS:
        raise UserError(f"no aggregation rule {preset!r}; there are: {', '.join(PRESETS)}")
    merged: dict[str, Any] = {"preset": preset}
    for source in (PRESETS[preset], changes or {}):
        for section, values in source.items():
            merged[section] = {**merged.get(section, {}), **values}
    return AggregationRule.model_validate(merged)


def check_nodes(rule: AggregationRule, nodes: int, where: str) -> None:
    """Raises UserError if so many nodes, of which `where` speaks, are too few for a robust rule."""
    combine = rule.combine
    if nodes < combine.needs:
        raise UserError(
            f"rule.combine.how = {combine.how!r} with liars = {combine.liars} needs {combine.needs} distinct nodes, "
            f"and {where} {nodes}; more nodes, fewer liars, or how = 'mean'"
        )


def warnings(rule: AggregationRule) -> list[str]:
    """What is known to go wrong with this combination, one line each."""
    found = []
    if rule.outer.momentum > 0 and rule.buffer.kind == "arrival":
        found.append("outer momentum with every single arrival is known to diverge: use a buffer, or momentum 0")
    return found
