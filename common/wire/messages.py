"""Every message that travels, typed. Frozen, told apart by `kind`, validated once where bytes come in.

Evolution: a new field gets a default, an unknown field is ignored, a kind or a field is never reused for another thing;
`schema_version` changes only when an old reader would misread a new message.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal, TypeGuard, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from common.numbers.slicing import EncodingName
from common.wire.bounds import MAX_FLOAT, MAX_WHOLE
from common.wire.fields import (
    ASSET_CHUNK_BYTES,
    MAX_COUNT,
    MAX_WORD_BYTES,
    MAX_WORDS,
    Amount,
    Architecture,
    AssetEntries,
    AssetName,
    AssetSize,
    Attempt,
    Checksum,
    ChunkCount,
    ChunkData,
    Count,
    Digest,
    Fraction,
    HeldOut,
    Id,
    LayoutEntries,
    Loss,
    Seconds,
    Term,
    Text,
    Word,
    at_the_door,
)
from common.wire.update_rule import UpdateRule, known_fields

SCHEMA_VERSION = 1

#: So many of the fields that are not known are named.
_NAMED = 8


class Message(BaseModel):
    """What all messages share."""

    # messages are kept as JSON too (owed updates, snapshots): a loss that is NaN stays NaN there. Strict: no digits as
    # strings, which would be numbers of any length
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, ser_json_inf_nan="constants")

    schema_version: Literal[1] = 1


class NodeMessage(Message):
    """From a node. `incarnation` is a random id that changes when a node loses its state directory."""

    node: Id
    incarnation: Id


# --- node → master: requests -----------------------------------------------------------------------------------------


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
    update's manifest."""

    kind: Literal["request.alive"] = "request.alive"
    encoder: Id | None = None
    version: Annotated[int, Field(ge=-1, le=MAX_COUNT)] = -1
    steps: Count = 0
    steps_per_second: Annotated[Amount, at_the_door(1e12)] = 0.0
    loss: Loss | None = None
    waiting_seconds: Seconds = 0.0
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
    """An update whose chunks are all confirmed by the broker.

    The payload is the pseudo-gradient of the shared encoder (base − local), encoded. `steps`, `samples` and `seconds`
    are those of this update alone; `loss` is the mean training loss over its steps. `layout` is sent only by a node
    whose layout is not the instruction's, so that the refusal can name the tensor. `order` numbers what an incarnation
    has sent, repeats included: in a node's chunk queue the chunks of lower orders come first. `held_out`: the masked
    loss of the node's validation samples under version `held_out_version` as it came, with the node's private parts:
    its newest measurement, in every update until there is a newer one.
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

    @property
    def update_id(self) -> str:
        return update_id(self)


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


# --- master → nodes --------------------------------------------------------------------------------------------------


class Instruction(Message):
    """We train this encoder, of this type, with this architecture; `layout` is what travels of it. `assets` are on a
    stream of their own, in any order and perhaps more than once."""

    kind: Literal["instruction"] = "instruction"
    encoder: Id
    encoder_type: Id
    architecture: Architecture
    layout: LayoutEntries
    layout_digest: Digest
    assets: AssetEntries = Field(default_factory=list)


class WordsWanted(Message):
    """A vocabulary for this encoder is to be made of words that nodes of its type contribute; every node answers with
    Words, one that contributes nothing too."""

    kind: Literal["words-wanted"] = "words-wanted"
    encoder: Id
    encoder_type: Id


class Rule(Message):
    """The update rule of one node, and where the current parameter set is to be read; `stream_digest` as of a Notice.

    A rule in a file may have no field that is not known, because it would be a misspelt one. In a message it is a newer
    master's: like any other of a message it is left out, and `unknown`, which does not travel, names it. An older node
    that refused it would be out of the training without a word.
    """

    kind: Literal["rule"] = "rule"
    encoder: Id
    node: Id
    update_rule: UpdateRule
    version: Count
    stream_digest: Digest | None = None
    published_at: Seconds
    progress: Fraction = 0.0
    unknown: list[str] = Field(default_factory=list, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, plain: Any, info: ValidationInfo) -> Any:
        if not isinstance(plain, dict) or not isinstance(came := plain.get("update_rule"), dict):
            return plain
        known, unknown = known_fields(UpdateRule, came)
        try:
            rule = UpdateRule.model_validate(known, strict=True, context=info.context)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return {**plain, "update_rule": rule, "unknown": unknown[:_NAMED]}


#: Why an update is refused. finished: the training has ended. unknown-encoder: none of that id is trained here.
#: layout, size, digest: the payload is not what the encoder, or the manifest, says. not-finite: it holds NaN or
#: infinity. stale, future: its base version is too old, or not made yet. early: the training has not started yet.
#: conflict: its number was another update's.
#: set-aside: the master died of it.
Reason = Literal[
    "finished",
    "unknown-encoder",
    "layout",
    "size",
    "digest",
    "not-finite",
    "stale",
    "future",
    "early",
    "conflict",
    "set-aside",
]
#: What a receipt says of its update. other: it is refused for a reason that only a newer master knows.
Verdict = Literal["accepted", "other"] | Reason


class Receipt(Message):
    """The answer to one update: counted in `version` with `weight`, or refused because of `reason`.

    `previous` is the hash of the receipt issued before this one for the same encoder (see `receipt_hash`);
    empty for the first. `reason` is a `Reason`, read by `verdict`; it stays as it came, because receipts are hashed as
    they were written, and a newer master may have a reason that is not known here.
    """

    kind: Literal["receipt"] = "receipt"
    encoder: Id
    node: Id
    incarnation: Id
    sequence: Count
    digest: Digest
    accepted: bool
    reason: Term = ""
    detail: Text = ""
    version: Count
    staleness: Count = 0
    weight: Amount = 0.0
    return_count: Count = 0
    previous: Digest | Literal[""] = ""


def verdict(receipt: Receipt) -> Verdict:
    """What a receipt says of its update, as a closed set of words, so that a match over them can be complete."""
    if receipt.accepted:
        return "accepted"
    return receipt.reason if _is_reason(receipt.reason) else "other"


def _is_reason(word: str) -> TypeGuard[Reason]:
    return word in get_args(Reason)


def receipt_hash(receipt: Receipt) -> str:
    """sha256 over a receipt's JSON, the hash of its predecessor included; hexadecimal.

    The chain of receipts: each carries the hash of the one that was issued before it for the same encoder. So whoever
    holds one receipt and the message log can show that the update is counted in the version and with the weight that
    the receipt says: the log leads to the same receipts in the same order, or to another hash.
    """
    return hashlib.sha256(receipt.model_dump_json().encode()).hexdigest()


class Resend(Message):
    """The chunks of an update are incomplete: publish it again as attempt `attempt`. It stays unanswered. `detail` says
    for people what was missed. `beyond`: the order that it is sent under must be above this one, which is that of
    chunks in the node's queue; a node whose state is an old backup may have begun below."""

    kind: Literal["resend"] = "resend"
    encoder: Id
    node: Id
    incarnation: Id
    sequence: Count
    attempt: Count
    detail: Text = ""
    beyond: Count = 0


def update_id(of: UpdateManifest | Receipt | Resend) -> str:
    """The name of an update, whichever message is about it."""
    return f"{of.encoder}/{of.node}/{of.incarnation}/{of.sequence}"


class Notice(Message):
    """A version is on the stream; read it from `published_at` (broker seconds, a margin already subtracted).

    `digest`: of the target parameter set. `stream_digest`: of the version's bytes as they were written to the stream,
    in its encoding; None where this master has not written it itself."""

    kind: Literal["notice"] = "notice"
    encoder: Id
    version: Count
    digest: Digest
    stream_digest: Digest | None = None
    published_at: Seconds
    progress: Fraction = 0.0


class Finish(Message):
    """The training of this encoder has ended with this version, which is on the stream. Digests as of a Notice."""

    kind: Literal["finish"] = "finish"
    encoder: Id
    encoder_type: Id
    version: Count
    digest: Digest
    stream_digest: Digest | None = None
    published_at: Seconds
    reason: Text = ""


class Introduce(Message):
    """The master does not know this node (any more): join again."""

    kind: Literal["introduce"] = "introduce"
    node: Id


class Withdrawn(Message):
    """The answer to a node that has accepted an instruction, or wants a version, of an encoder that the master does not
    know or could not make: there is nothing to wait for."""

    kind: Literal["withdrawn"] = "withdrawn"
    encoder: Id


class Answer(Message):
    """The answer to a request: the encoder it led to."""

    kind: Literal["answer"] = "answer"
    accepted: bool
    encoder: Id | None = None
    encoder_type: Id | None = None
    status: Term = ""
    version: Annotated[int, Field(ge=-1, le=MAX_COUNT)] = -1
    digest: Digest | None = None
    architecture: Architecture | None = None
    layout: LayoutEntries | None = None
    published_at: Seconds = 0.0
    detail: Text = ""
    assets: AssetEntries = Field(default_factory=list)


class Pulse(Message):
    """The master's sign of life to every node, every few seconds. `at`: seconds since 1970 by the master's clock."""

    kind: Literal["pulse"] = "pulse"
    at: Seconds
    epoch: Count


def _readable(value: Any) -> Any:
    """A report's values, with numbers that are out of bounds moved to them: sums of what strangers claimed may be."""
    if isinstance(value, dict):
        return {name: _readable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    if isinstance(value, int):
        return value if abs(value) <= MAX_WHOLE else MAX_WHOLE if value > 0 else -MAX_WHOLE
    if isinstance(value, float) and MAX_FLOAT < abs(value) < math.inf:
        return math.copysign(MAX_FLOAT, value)
    return value


class StatusReport(Message):
    """The running federation, for people: see `master_service.status`."""

    kind: Literal["status"] = "status"
    report: Annotated[dict[str, Any], BeforeValidator(_readable)]


class ParameterChunk(Message):
    """A slice of an encoded target parameter set on the stream. `epoch` orders masters, `size` is that of the whole."""

    kind: Literal["parameter"] = "parameter"
    encoder: Id
    epoch: Count
    version: Count
    index: Count
    chunks: ChunkCount
    encoding: EncodingName
    layout_digest: Digest
    size: Count
    digest: Digest
    progress: Fraction = 0.0
    checksum: Checksum
    data: ChunkData


class AssetChunk(Message):
    """A slice of an asset on the stream: that of this index of `ASSET_CHUNK_BYTES` each. `digest` and `size` are those
    of the whole; `checksum` is xxh3-64 of `data`, hexadecimal."""

    kind: Literal["asset"] = "asset"
    encoder: Id
    name: AssetName
    digest: Digest
    size: AssetSize
    index: Count
    chunks: ChunkCount
    checksum: Checksum
    data: Annotated[bytes, Field(max_length=ASSET_CHUNK_BYTES)]


ToMaster = (
    Join
    | Get
    | Continue
    | Fetch
    | FetchAssets
    | Words
    | Finished
    | Leave
    | Alive
    | AskStatus
    | Stop
    | InstructionAck
    | UpdateManifest
    | UpdateChunk
)
ToNode = (
    Instruction
    | WordsWanted
    | Rule
    | Receipt
    | Resend
    | Notice
    | Finish
    | Introduce
    | Withdrawn
    | Answer
    | Pulse
    | StatusReport
    | ParameterChunk
    | AssetChunk
)
AnyMessage = Annotated[ToMaster | ToNode, Field(discriminator="kind")]
