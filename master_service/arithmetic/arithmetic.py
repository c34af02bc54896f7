"""What the master needs of its numbers, without a tensor in sight: `aggregator` computes them with torch, and tests put
something smaller in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.errors import SharedEncoderError
from common.numbers.layout import Layout
from common.numbers.slicing import EncodingName
from master_service.decisions.effects import Generate, Step
from master_service.decisions.records import Gathering, Generated, GenerationFailed, Provided, StepFailed, Versioned
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState


class PayloadsLost(SharedEncoderError):
    """Payloads that a step needs are damaged or missing; `lost` holds their digests."""

    def __init__(self, lost: dict[str, str]) -> None:
        super().__init__(", ".join(f"payload {digest} is {problem}" for digest, problem in lost.items()))
        self.lost = list(lost)


@dataclass(frozen=True)
class Stepped:
    """A version that was computed: sha256 of its float32 bytes, hexadecimal (of several shards' parts, `combined`), and
    the L2 norm of the weighted sum of its updates. `squares`: what that is the root of the sum of, added in order."""

    digest: str
    norm: float
    squares: Sequence[float] = ()


@dataclass(frozen=True)
class Encoded:
    """A vector slice by slice, and the sha256 of all of them, hexadecimal."""

    bodies: list[bytes]
    digest: str

    @property
    def chunks(self) -> int:
        """How many messages it takes."""
        return len(self.bodies)

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(map(len, self.bodies))


@dataclass(frozen=True)
class Head:
    """What is said of a version wherever a slice of it is published."""

    encoder: str
    version: int
    epoch: int
    layout_digest: str
    progress: float


@dataclass(frozen=True)
class Elsewhere:
    """An encoded vector of so many slices and bytes that is not here: `publish` has it written to its stream, and gives
    its digest, or None if it cannot be written any more. Raises BrokerUnavailable; then it may be tried again."""

    chunks: int
    size: int
    publish: Callable[[Head], str | None]


@dataclass(frozen=True)
class Outcome:
    """What a step or a generation led to, as a record for the log; version 0 comes with its float32 bytes, an asset
    with its own."""

    body: Versioned | StepFailed | Gathering | Provided | Generated | GenerationFailed
    payload: bytes | None = None


class Measuring(Protocol):
    """Looks at an encoded vector, slice by slice."""

    def add(self, body: bytes) -> None:
        """The slice that comes next."""

    def result(self) -> tuple[bool, float]:
        """(finite, L2 norm); (False, 0) if a slice or the whole is not as long as it must be."""


class Arithmetic(Protocol):
    """The target parameter sets of the encoders, and everything that is computed of them and of updates.

    `elsewhere`: whoever computes a version lasts longer than this process, and must not do it because of a row that
    does not. Its `step` may raise ShardsAway, and is then asked for again.
    """

    elsewhere: bool

    def begin(self, encoder: str, layout: Layout, digest: str) -> None:
        """Take version 0 from its payload. Raises PayloadsLost."""

    def step(self, step: Step) -> Stepped:
        """Compute the next version. Raises PayloadsLost before anything is changed."""

    def digest(self, encoder: str) -> str:
        """sha256 of the current version's float32 bytes, hexadecimal."""

    def measurement(self, size: int, encoding: EncodingName) -> Measuring:
        """To look at an encoded vector of `size` elements while it comes."""

    def generated(self, effect: Generate) -> list[Outcome]:
        """Make version 0 of an encoder: its assets first, then the encoder itself; or that it is made of words
        that are to be gathered, or why it cannot be made."""

    def encoded(self, encoder: str, encoding: EncodingName) -> Encoded | Elsewhere:
        """The current version as it is published."""

    def export(self, directory: Path, encoder: EncoderState, settings: Settings) -> None:
        """Write the current version for transformers' Auto classes, and a card that says by which settings it was made.
        Raises UserError, OSError."""

    def fingerprint(self) -> dict[str, str]:
        """What the bits of these numbers depend on."""
