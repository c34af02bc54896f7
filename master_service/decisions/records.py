"""What stands in the message log: messages of nodes as they came, and the master's own records.

Everything that decides is an entry, so that the log alone rebuilds every version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from common.wire.messages import (
    Continue,
    Digest,
    Fetch,
    Finished,
    Get,
    Id,
    InstructionAck,
    Join,
    LayoutEntries,
    Leave,
    Message,
    Stop,
    UpdateManifest,
    UpdateRule,
)
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


class Configured(Message):
    """The settings from here on."""

    kind: Literal["configured"] = "configured"
    settings: Settings


class Started(Message):
    """The master started; epochs order the masters that wrote to a stream."""

    kind: Literal["started"] = "started"
    epoch: int
    fingerprint: dict[str, str]


class Generated(Message):
    """Version 0 of an encoder, whose parameters are the payload of this entry."""

    kind: Literal["generated"] = "generated"
    encoder: Id
    architecture: dict[str, Any]
    layout: LayoutEntries
    layout_digest: Digest
    digest: Digest


class GenerationFailed(Message):
    """The encoder could not be made; those who asked are told why."""

    kind: Literal["generation-failed"] = "generation-failed"
    encoder: Id
    reason: str


class Versioned(Message):
    """A version was computed; its digest is here before its first chunk leaves."""

    kind: Literal["versioned"] = "versioned"
    encoder: Id
    version: int
    digest: Digest


class StepFailed(Message):
    """A version could not be computed, because payloads of its updates are damaged or missing; they do not count and
    are asked for again."""

    kind: Literal["step-failed"] = "step-failed"
    encoder: Id
    version: int
    lost: list[Digest]


class Skipped(Message):
    """The entry at `offset` killed the master twice: it has no effect, here and in every replay."""

    kind: Literal["skipped"] = "skipped"
    offset: int


class Repaired(Message):
    """The ledger was damaged, and rows after `last_whole` are lost. The state is that of `resumed_at`: the last whole
    row, or one that a newer snapshot was made of. Then this stands in the place of that row, and `checksum`, which was
    that row's, is what the next row follows."""

    kind: Literal["repaired"] = "repaired"
    last_whole: int
    resumed_at: int
    problem: str
    checksum: str = ""


class Presence(Message):
    """A node gave no sign of life for the presence timeout, or gives one again."""

    kind: Literal["presence"] = "presence"
    node: Id
    present: bool


class Tick(Message):
    """A deadline fired."""

    kind: Literal["tick"] = "tick"


Record = (
    Configured | Started | Generated | GenerationFailed | Versioned | StepFailed | Skipped | Repaired | Presence | Tick
)
#: What nodes and observers say that is decided upon.
Said = Join | Get | Continue | Fetch | Finished | Leave | Stop | InstructionAck | UpdateManifest
Loggable = Said | Record
_ADAPTER: TypeAdapter[Loggable] = TypeAdapter(Annotated[Loggable, Field(discriminator="kind")])


class UpdateFacts(BaseModel):
    """What was computed once when an update's payload arrived. `digest` is that of the bytes that came."""

    model_config = ConfigDict(frozen=True)

    digest: Digest
    size: int
    finite: bool
    norm: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the message log. `at` is seconds since 1970, never smaller than that of the row before.

    `skipped`: a later row says that this one has no effect.
    """

    offset: int
    message_id: str
    at: float
    body: Loggable
    facts: UpdateFacts | None = None
    payload: str | None = None
    skipped: bool = False


def pack(body: Message) -> str:
    """The row's body as JSON; numbers that are not finite as NaN and Infinity."""
    return body.model_dump_json()


def unpack(body: str) -> Loggable:
    """The typed body of a row."""
    return _ADAPTER.validate_json(body)
