"""What stands in the message log: messages of nodes as they came, and the master's own records.

Everything that decides is an entry, so that the log alone rebuilds every version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from common.config import suggestion
from common.errors import UserError
from common.wire.base import Message
from common.wire.fields import MAX_ASSETS, AssetEntry, AssetName, AssetSize, Digest, Id, LayoutEntries, SettingChanges
from common.wire.to_master import (
    Admit,
    Change,
    Continue,
    Fetch,
    FetchAssets,
    Finished,
    Get,
    InstructionAck,
    Join,
    Kick,
    Leave,
    Pause,
    Resume,
    Stop,
    UpdateManifest,
    Words,
)
from master_service.decisions.settings import Claims, Settings


class Configured(Message):
    """The settings from here on, what is made of members' claims, and how many failed encoders are remembered. A row
    that does not say so was written by a master that took claims as facts, or remembered all, and is decided as that
    master did.

    `configured`: those that the master was started with, if operators have changed some while it ran: `live`, by path.
    """

    kind: Literal["configured"] = "configured"
    settings: Settings
    claims: Claims = "taken"
    kept_failed: Annotated[int, Field(ge=1)] | None = None
    configured: Settings | None = None
    live: SettingChanges = Field(default_factory=dict)


class Started(Message):
    """The master started; epochs order the masters that wrote to a stream."""

    kind: Literal["started"] = "started"
    epoch: int
    fingerprint: dict[str, str]


class Provided(Message):
    """An asset of an encoder that is being made; its bytes are the payload of this entry. Comes before the encoder's
    Generated, and again if the master died before that."""

    kind: Literal["provided"] = "provided"
    encoder: Id
    name: AssetName
    digest: Digest
    size: AssetSize

    @property
    def entry(self) -> AssetEntry:
        """As nodes are told of it."""
        return AssetEntry(name=self.name, digest=self.digest, size=self.size)


class Gathering(Message):
    """The encoder type makes its assets of words that nodes contribute: they are asked for."""

    kind: Literal["gathering"] = "gathering"
    encoder: Id


class Generated(Message):
    """Version 0 of an encoder, whose parameters are the payload of this entry. `assets`: the names of what it has, out
    of what was provided before."""

    kind: Literal["generated"] = "generated"
    encoder: Id
    architecture: dict[str, Any]
    layout: LayoutEntries
    layout_digest: Digest
    digest: Digest
    assets: list[AssetName] = Field(default_factory=list, max_length=MAX_ASSETS)


class GenerationFailed(Message):
    """The encoder could not be made; those who asked are told why."""

    kind: Literal["generation-failed"] = "generation-failed"
    encoder: Id
    reason: str


class Versioned(Message):
    """A version was computed; its digest is here before its first chunk leaves. `norm` is the L2 norm of the weighted
    sum of its updates (Σ coefficient·Δ), before the outer optimiser."""

    kind: Literal["versioned"] = "versioned"
    encoder: Id
    version: int
    digest: Digest
    norm: float | None = None


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
    Configured
    | Started
    | Gathering
    | Provided
    | Generated
    | GenerationFailed
    | Versioned
    | StepFailed
    | Skipped
    | Repaired
    | Presence
    | Tick
)
#: What nodes and observers say that is decided upon.
Said = (
    Join
    | Get
    | Continue
    | Fetch
    | FetchAssets
    | Words
    | Finished
    | Leave
    | Stop
    | Change
    | Kick
    | Admit
    | Pause
    | Resume
    | InstructionAck
    | UpdateManifest
)
Loggable = Said | Record
_KINDS = sorted(each.model_fields["kind"].default for each in get_args(Loggable))
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


def check_kind(kind: str) -> None:
    """Raises UserError for a kind that no row can have, with the nearest one."""
    if kind not in _KINDS:
        raise UserError(f"no row is of kind {kind!r}; {suggestion(kind, _KINDS)}")
