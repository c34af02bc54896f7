"""What the coordinator decides by: settings as they stand in the log, and how a start with others is judged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.wire.messages import UpdateRule
from master_service.decisions.rules.model import AggregationRule


class LossPlateau(BaseModel):
    """Stop when the mean loss of the last `patience` versions is no better than `min_change` (nats) below the best."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patience: Annotated[int, Field(ge=1)] = 20
    min_change: Annotated[float, Field(ge=0)] = 0.005


#: How many versions are made where no limit is given.
DEFAULT_VERSIONS = 400


class StopRule(BaseModel):
    """Ends the training as soon as any given limit is reached; counted from the start of this run of the encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Annotated[int, Field(ge=1)] | None = None
    updates: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None
    plateau: LossPlateau | None = None


class Settings(BaseModel):
    """The settings that the coordinator decides by; in the log, so that replay decides alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: AggregationRule = AggregationRule()
    update_rule: UpdateRule = UpdateRule()
    stop: StopRule = StopRule(versions=DEFAULT_VERSIONS)
    min_nodes: Annotated[int, Field(ge=1)] = 1
    publish_every_seconds: Annotated[float, Field(gt=0)] = 60.0
    generation: Literal["fresh", "continue"] = "fresh"
    source: str | None = None
    architecture: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
