"""The coordinator's state: plain numbers and words, so that a snapshot is its JSON."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from common.numbers.slicing import EncodingName
from common.wire.fields import AssetEntries, LayoutEntries
from master_service.decisions.settings import Claims, Settings, unsaid

Status = Literal["generating", "gathering", "running", "finished", "failed"]


class _State(BaseModel):
    # a loss may be NaN, and a snapshot must bring it back
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class NodeState(_State):
    """A node as it introduced itself."""

    node: str
    incarnation: str
    types: list[str] = Field(default_factory=list)
    present: bool = True


class Counted(NamedTuple):
    """What a receipt that accepts says, beyond what a duplicate of its update says too. `digest`: its beginning."""

    digest: str
    previous: str
    version: int
    staleness: int
    weight: float
    return_count: int


class TurnedDown(NamedTuple):
    """What a receipt that refuses says, beyond what a duplicate of its update says too. `digest`: its beginning."""

    digest: str
    previous: str
    version: int
    reason: str
    detail: str


class Settled(_State):
    """What is settled of one incarnation's updates: all numbers below `below`, and those in `above`. `answers`: by
    number, the newest of the final answers, in the order in which they were given."""

    below: int = 0
    above: list[int] = Field(default_factory=list)
    answers: dict[int, Counted | TurnedDown] = Field(default_factory=dict)


class Measured(NamedTuple):
    """What a member said of its validation samples: the version that it measured, and the loss."""

    version: int
    loss: float


class Member(_State):
    """A node in the training of one encoder. `weight` is the sum over its accepted updates.

    `accepted`: it acked the instruction and has not left since. `present`: it gives signs of life. `settled` is kept by
    incarnation, because one may come back (from a backup) after another. `may_owe`: the most updates without an answer
    that a rule has ever allowed it. `pending`: its updates that wait for a version, or are being made one, by
    `incarnation/sequence`, with their digests; `buffered` is how many of them wait. `held_out`: its newest measurement.
    `named`: its owner agrees that the name is published. `norms` and `made_of` are of its newest counted updates, as
    `guarding` has them: the norm for a single step, and the steps; `usual_norm` and `usual_steps` are
    their medians. `claimed_loss`: the newest training loss that is one.
    """

    node: str
    incarnation: str
    samples: int
    accepted: bool = True
    present: bool = True
    returns: int = 0
    refused: int = 0
    duplicates: int = 0
    weight: float = 0.0
    last_weight: float = 0.0
    last_staleness: int = 0
    steps: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    payload_bytes: int = 0
    loss: float | None = None
    version: int = 0
    held_out: Measured | None = None
    may_owe: int = 0
    buffered: int = 0
    named: bool = False
    norms: list[float] = Field(default_factory=list)
    made_of: list[int] = Field(default_factory=list)
    usual_norm: float | None = None
    usual_steps: int | None = None
    claimed_loss: float | None = None
    pending: dict[str, str] = Field(default_factory=dict)
    settled: dict[str, Settled] = Field(default_factory=dict)

    @property
    def active(self) -> bool:
        return self.accepted and self.present


class Buffered(_State):
    """An accepted update that waits for the next version."""

    node: str
    incarnation: str
    sequence: int
    digest: str
    payload: str
    encoding: EncodingName
    base_version: int
    attempt: int
    steps: int
    samples: int
    seconds: float
    size: int
    norm: float
    loss: float


class Weighed(_State):
    """An update of the version that is being computed. `coefficient` is its share of the step, `weight` is for people:
    the coefficient times the number of updates. `norm`: for a single step; `made_of`: the steps that
    are believed of it; both 0 where claims are taken as facts."""

    item: Buffered
    weight: float
    coefficient: float
    staleness: int
    norm: float = 0.0
    made_of: int = 0


class Tally(_State):
    """Sums that `tally` keeps. Of the active members: how many, their returns, their samples (each at least 1), how
    many have an update in the buffer, and in order the `usual_norm`, the `usual_steps` and the `claimed_loss` of those
    that have one. `returned`: how many members have an update in the buffer, active or not."""

    active: int = 0
    returns: int = 0
    samples: int = 0
    active_returned: int = 0
    returned: int = 0
    norms: list[float] = Field(default_factory=list)
    steps: list[int] = Field(default_factory=list)
    losses: list[float] = Field(default_factory=list)


class EncoderState(_State):
    """One shared encoder being made. `run_…` counts from the start of this run: an `update` request starts another.
    `paused_at`: since when no version is made, because an operator has said so; what counts time stands still.

    `stepping`: the updates of the version that is being computed. `last_receipt`: the hash of the newest receipt.
    `waiting`: the nodes that want the next version, in the order in which they said so. `norms` and `steps` are of the
    newest counted updates: the norm for a single step, and the steps (where claims are taken as facts).
    `agreement`: the running mean cosine between two updates of a version.
    `shards`: so many aggregators have a part of it each.
    `has_stream`: a version was published, and its stream is not deleted. Of a finished encoder, `readers` are the nodes
    that have not said yet that they have the last version, in the order in which they began to read; `observed`:
    somebody who does not say so may be reading it too. `assets`: what nodes need beside the architecture; they were
    written to their stream at `provided_at`, and stay there while `has_assets`.

    Where the vocabulary is made of words that nodes contribute: `answered`: which nodes have answered, and whether with
    words, whose number of documents is summed up in `gathered` from when they are asked for (None: they are not) until
    the encoder is made. They are waited for until `gathering_until`.

    Held-out losses, of this run, as `stopping` has them: `measured`: what members have measured in windows that are not
    closed yet, by the first version of the window and by member; `held_out`, `held_out_version`: the mean over the
    window that was compared last; `best_held_out`, `best_version`, `best_measured`: the best, and what it was made of.
    """

    encoder: str
    encoder_type: str
    architecture: dict[str, Any]
    status: Status = "generating"
    reason: str = ""
    layout: LayoutEntries = Field(default_factory=list)
    layout_digest: str = ""
    size: int = 0
    shards: int = 1
    version: int = 0
    digest: str = ""
    members: dict[str, Member] = Field(default_factory=dict)
    tally: Tally = Field(default_factory=Tally)
    waiting: dict[str, None] = Field(default_factory=dict)
    started: bool = False
    buffer: list[Buffered] = Field(default_factory=list)
    buffer_since: float = 0.0
    stepping: list[Weighed] = Field(default_factory=list)
    last_receipt: str = ""
    updates: int = 0
    published_version: int = -1
    published_at: float = 0.0
    has_stream: bool = False
    readers: dict[str, None] = Field(default_factory=dict)
    observed: bool = False
    assets: AssetEntries = Field(default_factory=list)
    provided_at: float = 0.0
    has_assets: bool = False
    answered: dict[str, bool] = Field(default_factory=dict)
    gathered: dict[str, int] | None = None
    gathering_until: float = 0.0
    run_started_at: float = 0.0
    run_first_version: int = 0
    run_first_update: int = 0
    stop_requested: str = ""
    paused_at: float | None = None
    norms: list[float] = Field(default_factory=list)
    steps: list[int] = Field(default_factory=list)
    agreement: float | None = None
    best_loss: float | None = None
    versions_without_gain: int = 0
    measured: dict[int, dict[str, Measured]] = Field(default_factory=dict)
    held_out: float | None = None
    held_out_version: int | None = None
    best_held_out: float | None = None
    best_version: int | None = None
    best_measured: dict[str, float] = Field(default_factory=dict)
    askers: list[str] = Field(default_factory=list)

    def public_names(self) -> dict[str, str]:
        """What may be published of each member's name: the name where its owner agreed, else its number in the order of
        joining."""
        return {
            node: member.node if member.named else f"node {number}"
            for number, (node, member) in enumerate(self.members.items(), 1)
        }

    def active(self) -> dict[str, Member]:
        """The members that the rules count on, in the order in which they joined."""
        return {node: member for node, member in self.members.items() if member.active}


class State(_State):
    """Everything that the log has led to. `claims`: what is made of what members say of themselves. `kept_failed`: so
    many encoders that could not be made are remembered; None: all of them.

    `settings` are those that hold. If operators have changed some while it ran, those are `live`, by path, and
    `configured` are the ones that the master was started with. `own`: what was changed for one node alone, by node.
    `kicked`: the nodes that an operator has taken out, and why.
    """

    settings: Settings = Field(default_factory=unsaid)
    configured: Settings | None = None
    live: dict[str, Any] = Field(default_factory=dict)
    own: dict[str, dict[str, Any]] = Field(default_factory=dict)
    kicked: dict[str, str] = Field(default_factory=dict)
    claims: Claims = "taken"
    kept_failed: int | None = None
    epoch: int = 0
    nodes: dict[str, NodeState] = Field(default_factory=dict)
    encoders: dict[str, EncoderState] = Field(default_factory=dict)
