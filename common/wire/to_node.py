"""What the master says: to one node, to all of a type, to who asked, and on streams."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal, TypeGuard, get_args

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from common.numbers.slicing import EncodingName
from common.wire.base import Message
from common.wire.bounds import MAX_FLOAT, MAX_WHOLE
from common.wire.fields import (
    ASSET_CHUNK_BYTES,
    MAX_COUNT,
    Amount,
    Architecture,
    AssetEntries,
    AssetName,
    AssetSize,
    Checksum,
    ChunkCount,
    ChunkData,
    Count,
    Digest,
    Fraction,
    Id,
    LayoutEntries,
    Seconds,
    Shards,
    Term,
    Text,
)
from common.wire.update_rule import UpdateRule, known_fields

#: So many of the fields that are not known are named.
_NAMED = 8


class Instruction(Message):
    """We train this encoder, of this type, with this architecture; `layout` is what travels of it. `assets` are on a
    stream of their own, in any order and perhaps more than once. `shards`: so many aggregators take a part of every
    update each, and write a part of every version each."""

    kind: Literal["instruction"] = "instruction"
    encoder: Id
    encoder_type: Id
    architecture: Architecture
    layout: LayoutEntries
    layout_digest: Digest
    assets: AssetEntries = Field(default_factory=list)
    shards: Shards = 1


class WordsWanted(Message):
    """A vocabulary for this encoder is to be made of words that nodes of its type contribute; every node answers with
    Words, one that contributes nothing too."""

    kind: Literal["words-wanted"] = "words-wanted"
    encoder: Id
    encoder_type: Id


class Rule(Message):
    """The update rule of one node, and where the current parameter set is to be read; `stream_digest` and
    `stream_offset` as of a Notice. `paused`: no step is to be taken until another rule comes.

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
    stream_offset: Count | None = None
    published_at: Seconds
    progress: Fraction = 0.0
    paused: bool = False
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
#: set-aside: the master died of it. kicked: an operator has taken the node out.
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
    "kicked",
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


class Notice(Message):
    """A version is on the stream; read it from `published_at` (broker seconds, a margin already subtracted).

    `digest`: of the target parameter set. `stream_digest`: of the version's bytes as they were written to the stream,
    in its encoding; None where this master has not written it itself. `stream_offset`: of its first message on the
    stream, or a few before; None where that is not known."""

    kind: Literal["notice"] = "notice"
    encoder: Id
    version: Count
    digest: Digest
    stream_digest: Digest | None = None
    stream_offset: Count | None = None
    published_at: Seconds
    progress: Fraction = 0.0


class Finish(Message):
    """The training of this encoder has ended with this version, which is on the stream. Digests and offset as of a
    Notice."""

    kind: Literal["finish"] = "finish"
    encoder: Id
    encoder_type: Id
    version: Count
    digest: Digest
    stream_digest: Digest | None = None
    stream_offset: Count | None = None
    published_at: Seconds
    reason: Text = ""


class Introduce(Message):
    """The master does not know this node (any more): join again."""

    kind: Literal["introduce"] = "introduce"
    node: Id


class Withdrawn(Message):
    """The answer to a node that has accepted an instruction, or wants a version, of an encoder that the master does not
    know or could not make: there is nothing to wait for. With a `reason`, in words for people, what every node of the
    type is told of one that could not be made. `kicked`: an operator has taken this node out, for this `reason`; it is
    told of the encoder once it is let in again."""

    kind: Literal["withdrawn"] = "withdrawn"
    encoder: Id
    encoder_type: Id | None = None
    reason: Text = ""
    kicked: bool = False


class Answer(Message):
    """The answer to a request: the encoder it led to. `shards` as of an Instruction."""

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
    shards: Shards = 1


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
    """A slice of an encoded target parameter set on the stream. `epoch` orders masters, `size` is that of the whole.
    Where there are several shards the slices come in the order of each, and `digest` is `combined` of their parts."""

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
