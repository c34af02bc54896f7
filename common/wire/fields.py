"""What the fields of messages may hold: types with their bounds, each said once."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo

from common.numbers.slicing import slice_bytes
from common.wire.topology import MIB

#: The context in which what comes over the broker is validated. What was taken in once is read again from logs and
#: state without it: a bound that came later must not make an old log unreadable.
DOOR: dict[str, bool] = {"door": True}


def at_the_door(most: float) -> AfterValidator:
    """A bound on what comes in: on a number, or on the characters of a string."""

    def check(value: Any, info: ValidationInfo) -> Any:
        size = len(value) if isinstance(value, str) else abs(value)
        if info.context is DOOR and most < size < math.inf:
            raise ValueError(f"beyond {most:g}, which is the most that is read")
        return value

    return AfterValidator(check)


def _finite(value: float, info: ValidationInfo) -> float:
    if info.context is DOOR and not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


FINITE = AfterValidator(_finite)
Positive = Annotated[float, Field(gt=0), FINITE]
#: A whole number given for it becomes one with a point: receipts are hashed as they are written.
_WITH_POINT = AfterValidator(float)
#: Ids become part of routing keys, queue names and file names: no dots, slashes or wildcards.
Id = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
#: The highest number of an attempt; far below the end of `Count`, so that the next attempt still has a number.
MAX_ATTEMPT = (1 << 31) - 1
Attempt = Annotated[int, Field(ge=0, le=MAX_ATTEMPT)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=2000)]
MAX_COUNT = (1 << 62) - 1
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
#: Chunks of one payload, at most what a consumer may have unacked (16 bits in AMQP): 60 Gi parameters.
ChunkCount = Annotated[int, Field(ge=1, le=60_000)]
#: So many aggregators have each a part of every parameter set, at most.
MAX_SHARDS = 64
Shards = Annotated[int, Field(ge=1, le=MAX_SHARDS)]
#: Up to thirty thousand years: whoever shows a time or a moment can.
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), _WITH_POINT, at_the_door(1e12)]
#: A share of something, such as how far the training is.
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _WITH_POINT]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False), _WITH_POINT]
#: A training loss; one that has diverged is NaN or infinite, and is told as it is.
Loss = Annotated[float, _WITH_POINT]
#: A loss that was measured on held-out samples; a model that has diverged has none.
HeldOut = Annotated[float, Field(allow_inf_nan=False), _WITH_POINT]
Shape = Annotated[list[Count], Field(max_length=16, fail_fast=True)]
#: (name, shape) of every tensor in order; the first wrong one ends the reading, so that errors cannot fill the memory.
TensorName = Annotated[str, at_the_door(1000)]
LayoutEntries = Annotated[
    list[Annotated[tuple[TensorName, Shape], Strict(False)]], Field(max_length=100_000, fail_fast=True)
]
#: xxh3-64, hexadecimal.
Checksum = Annotated[str, Field(max_length=16)]
#: The largest slice is of float32.
ChunkData = Annotated[bytes, Field(max_length=slice_bytes("float32"))]
#: A payload that is no longer than this, bytes, travels in its announcement: a message of its own costs more.
INLINE_BYTES = 128 * 1024
InlineData = Annotated[bytes, Field(max_length=INLINE_BYTES)]
#: One of a few words.
Term = Annotated[str, Field(max_length=64)]


def _plain(value: Any, depth: int = 16) -> Any:
    """The value, if both JSON and msgpack can hold it. Raises ValueError at the first part that they cannot, without
    looking at what follows."""
    if isinstance(value, dict) and depth > 0:
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError("a key is not a string")
            _plain(item, depth - 1)
    elif isinstance(value, list | tuple) and depth > 0:
        for item in value:
            _plain(item, depth - 1)
    elif not (value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError("not a finite number, a string, a list or a table of these, or nested too deeply")
    return value


#: What an encoder type makes a model from: plain values, because the state that they get into is kept as JSON.
Architecture = Annotated[dict[str, Any], BeforeValidator(_plain)]

#: Where a setting stands in the configuration, such as rule.outer.lr.
SettingPath = Annotated[str, Field(min_length=1, max_length=200)]
#: Settings by their paths, with the values that they are to have.
SettingChanges = Annotated[dict[SettingPath, Any], BeforeValidator(_plain), Field(max_length=64)]

#: Assets become files in exports: a file name without a folder.
AssetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
#: The largest asset, bytes, and how many an encoder may have.
MAX_ASSET_BYTES = 16 * MIB
MAX_ASSETS = 8
AssetSize = Annotated[int, Field(ge=0, le=MAX_ASSET_BYTES)]
#: Bytes of an asset in one chunk; the last has what is left.
ASSET_CHUNK_BYTES = MIB


class AssetEntry(BaseModel):
    """What nodes need of an encoder beside its architecture, such as a tokenizer, by name. `digest` is the sha256 of
    its `size` bytes."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: AssetName
    digest: Digest
    size: AssetSize


AssetEntries = Annotated[list[AssetEntry], Field(max_length=MAX_ASSETS, fail_fast=True)]

#: What a node may contribute to a vocabulary: at most so many words, none longer than so many characters, and so many
#: bytes of UTF-8 in all; with what msgpack adds to each, the message stays below 1 MiB.
MAX_WORDS = 20_000
MAX_WORD_LENGTH = 64
MAX_WORD_BYTES = 700 << 10


def _letters(word: str) -> str:
    if not word.isalpha():
        raise ValueError("a word is not of letters alone")
    return word


Word = Annotated[str, Field(min_length=1, max_length=MAX_WORD_LENGTH), AfterValidator(_letters)]
