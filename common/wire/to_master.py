"""What nodes and operators say to the master."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    Strict,
    model_validator,
)

from common.numbers.slicing import EncodingName
from common.wire.base import Message, NodeMessage, update_id
from common.wire.fields import (
    MAX_COUNT,
    MAX_WORD_BYTES,
    MAX_WORDS,
    Amount,
    Architecture,
    Attempt,
    Checksum,
    ChunkCount,
    ChunkData,
    Count,
    Digest,
    HeldOut,
    Id,
    InlineData,
    LayoutEntries,
    Loss,
    Seconds,
    SettingChanges,
    SettingPath,
    Shards,
    Text,
    Word,
    at_the_door,
)

# --- requests -------------------------------------------------------------------------------------------------------


class Join(NodeMessage):
    """A node is here and may have samples of these types; answered with the running instructions."""

    kind: Literal["request.join"] = "request.join"
    types: list[Id] = Field(default_factory=list, max_length=64)


class Get(Message):
    """Somebody wants an encoder of a type: joins a running one, is answered with a finished one, or starts one."""

    kind: Literal["request.get"] = "request.get"
    sender: Id
    encoder_type: Id
    architecture: Architecture = Field(default_factory=dict)
    fresh: bool = False


class Continue(Message):
    """Somebody wants a known encoder to be trained further."""

    kind: Literal["request.update"] = "request.update"
    sender: Id
    encoder: Id


class Fetch(NodeMessage):
    """A node waits for a version newer than the one it has. `sought`: it was told of that one, and the stream does not
    hold it, as after a broker that lost what it had confirmed."""

    kind: Literal["request.fetch"] = "request.fetch"
    encoder: Id
    have_version: int = Field(ge=-1)
    sought: int | None = Field(default=None, ge=0)


class FetchAssets(NodeMessage):
    """A node was told of assets of an encoder, and their stream does not hold them, as after a broker that lost what it
    had confirmed."""

    kind: Literal["request.assets"] = "request.assets"
    encoder: Id


class Words(NodeMessage):
    """The answer to WordsWanted: words of a node's training samples, and in how many of its `documents` each is, never
    less than `min_documents`. None at all from a node that takes part without contributing."""

    kind: Literal["request.words"] = "request.words"
    encoder: Id
    documents: Count = 0
    min_documents: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 2
    words: Annotated[
        list[Annotated[tuple[Word, Count], Strict(False)]], Field(max_length=MAX_WORDS, fail_fast=True)
    ] = Field(default_factory=list)

    @model_validator(mode="after")
    def _bounded(self) -> Words:
        if sum(len(word.encode()) for word, _ in self.words) > MAX_WORD_BYTES:
            raise ValueError(f"words of more than {MAX_WORD_BYTES} bytes")
        if len({word for word, _ in self.words}) < len(self.words):
            raise ValueError("a word is there twice")
        if any(not self.min_documents <= count <= self.documents for _, count in self.words):
            raise ValueError("a word is in fewer documents than it must be, or in more than there are")
        return self


class Finished(NodeMessage):
    """A node has the last version of an encoder whose training has ended: it reads no more of the encoder's stream."""

    kind: Literal["request.finished"] = "request.finished"
    encoder: Id
    version: Count


class Leave(NodeMessage):
    """A node goes; what it handed in stays."""

    kind: Literal["request.leave"] = "request.leave"


class Alive(NodeMessage):
    """A node's sign of life with what it is doing now; shown, never decided upon, not logged. `held_out` as in an
    update's manifest. Of the time in which it could train, `step_seconds` went into steps, and it lost what went into
    handing in, adopting versions, checkpoints and everything else."""

    kind: Literal["request.alive"] = "request.alive"
    encoder: Id | None = None
    version: Annotated[int, Field(ge=-1, le=MAX_COUNT)] = -1
    steps: Count = 0
    steps_per_second: Annotated[Amount, at_the_door(1e12)] = 0.0
    loss: Loss | None = None
    waiting_seconds: Seconds = 0.0
    step_seconds: Seconds = 0.0
    hand_in_seconds: Seconds = 0.0
    adoption_seconds: Seconds = 0.0
    checkpoint_seconds: Seconds = 0.0
    other_seconds: Seconds = 0.0
    bytes_sent: Count = 0
    note: Text = ""
    held_out: HeldOut | None = None
    held_out_version: Count | None = None


class AskStatus(Message):
    """`shared-encoder status`: answered with a StatusReport, not logged."""

    kind: Literal["request.status"] = "request.status"
    sender: Id


class Stop(Message):
    """The operator ends the training of an encoder, or of all."""

    kind: Literal["request.stop"] = "request.stop"
    sender: Id
    encoder: Id | None = None


class Operation(Message):
    """What an operator wants done while it runs; answered by an Answer with what came of it."""

    sender: Id


class Change(Operation):
    """Settings are to be others from now on: `changes` by their paths in the configuration; those in `back` are to be
    again what the master was started with. `member`: of that node alone."""

    kind: Literal["request.set"] = "request.set"
    changes: SettingChanges = Field(default_factory=dict)
    back: Annotated[list[SettingPath], Field(max_length=64, fail_fast=True)] = Field(default_factory=list)
    member: Id | None = None


class Pause(Operation):
    """The training of an encoder, or of all that are being trained, is to rest: no version is made, and
    nothing runs out."""

    kind: Literal["request.pause"] = "request.pause"
    encoder: Id | None = None


class Resume(Operation):
    """The training of an encoder that was paused, or of all of them, is to go on."""

    kind: Literal["request.resume"] = "request.resume"
    encoder: Id | None = None


class Kick(Operation):
    """A node is no member of any training until it is let in again."""

    kind: Literal["request.kick"] = "request.kick"
    member: Id
    reason: Text = ""


class Admit(Operation):
    """A node that was taken out is let in again."""

    kind: Literal["request.admit"] = "request.admit"
    member: Id


# --- node → master: the training -------------------------------------------------------------------------------------


class InstructionAck(NodeMessage):
    """The answer to an instruction: accepted with the number of matching samples, or refused with the reason.

    `named`: whether the node's name may stand in what is published of the encoder.
    """

    kind: Literal["ack"] = "ack"
    encoder: Id
    accepted: bool
    samples: Count = 0
    reason: Text = ""
    named: bool = False


class UpdateManifest(NodeMessage):
    """An update whose chunks are all confirmed by the broker, or which carries the whole payload as its `data`.

    The payload is the pseudo-gradient of the shared encoder (base − local), encoded. `steps`, `samples` and `seconds`
    are those of this update alone; `loss` is the mean training loss over its steps. `layout` is sent only by a node
    whose layout is not the instruction's, so that the refusal can name the tensor. `order` numbers what an incarnation
    has sent, repeats included: in a node's chunk queue the chunks of lower orders come first. `held_out`: the masked
    loss of the node's validation samples under version `held_out_version` as it came, with the node's private parts:
    its newest measurement, in every update until there is a newer one. `shards`: to so many aggregators a part of the
    chunks goes each, and `digest` is `combined` of the parts.
    """

    kind: Literal["update"] = "update"
    encoder: Id
    sequence: Count
    attempt: Attempt = 0
    order: Count = 0
    base_version: Count
    steps: Count
    samples: Count
    seconds: Seconds
    loss: Loss
    wants_version: bool = True
    encoding: EncodingName
    layout_digest: Digest
    layout: LayoutEntries | None = None
    size: Count
    chunks: ChunkCount
    digest: Digest
    held_out: HeldOut | None = None
    held_out_version: Count | None = None
    data: InlineData | None = None
    shards: Shards = 1

    @property
    def update_id(self) -> str:
        return update_id(self)

    def bare(self) -> UpdateManifest:
        """Without what is not needed to name it, and may be long."""
        return self.model_copy(update={"layout": None, "data": None})


class UpdateChunk(NodeMessage):
    """A slice of an encoded update, of the `order` of its manifest; `checksum` is xxh3-64 of `data`, hexadecimal."""

    kind: Literal["chunk"] = "chunk"
    encoder: Id
    sequence: Count
    attempt: Count
    order: Count = 0
    index: Count
    checksum: Checksum
    data: ChunkData
