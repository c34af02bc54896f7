"""A workbench of tokens in the place of tensors: a version is the hash of its predecessor and of the updates that were
counted in it, with coefficients; an update is a payload that no other update has."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from common.numbers.layout import Layout
from common.numbers.slicing import EncodingName, payload_size, slice_bytes
from common.wire.assets import asset_entry
from common.wire.to_node import Instruction, Receipt
from common.wire.transfer import CompleteVersion, payload_digest
from common.wire.update_rule import UpdateRule
from master_service.arithmetic.arithmetic import Encoded, Outcome, PayloadsLost, Stepped
from master_service.decisions.effects import Generate, Step
from master_service.decisions.records import Gathering, Generated, Provided
from node_service.training.update_rule import SinceReturn

if TYPE_CHECKING:
    from tests.faults.interleavings import World

#: Two chunks to an update and to a version, with `SLICE` made so small.
SLICE = 24
LAYOUT = Layout([("weight", (4, 8)), ("bias", (4,))])
#: What encoders may have, the same for every one of them.
ASSETS = {"one": b"the first asset", "two": b"another"}

#: Each node has a word of its own in so many documents, and in all of them one that everybody has.
WORDS, EVERYBODYS = 3, "everybodys"


class Violation(AssertionError):
    """What must never happen has happened."""


def demand(condition: object, words: str) -> None:
    if not condition:
        raise Violation(words)


def bodies_of(digest: str, encoding: EncodingName) -> list[bytes]:
    """A version on the stream: its digest, as long as the layout wants it, whose letters are finite numbers too."""
    size = payload_size(LAYOUT.size, encoding)
    token, first = digest.encode().ljust(size, b"0")[:size], slice_bytes(encoding)
    return [token[:first], token[first:]]


class Tokens:
    """Arithmetic that remembers what it was given: a version is the hash of its predecessor and of that."""

    elsewhere = False

    def __init__(self, payloads: dict[str, bytes], assets: int = 0, *, words: bool = False) -> None:
        """`assets`: how many the encoders have that are made here; `words`: they are made of words that nodes
        contribute."""
        self._payloads = payloads
        self._words = words
        self._assets = dict(list(ASSETS.items())[:assets])
        #: By encoder: the current version's digest, the steps that led to it, the digest of every version since.
        self.targets: dict[str, Any] = {}

    def begin(self, encoder: str, layout: Layout, digest: str) -> None:
        demand(digest in self._payloads, "version 0 is generated without its payload")
        self.targets[encoder] = SimpleNamespace(digest=digest, steps=(), digests={0: digest})

    def step(self, step: Step) -> Stepped:
        lost = [each.payload for each in step.contributions if each.payload not in self._payloads]
        if lost:
            raise PayloadsLost(dict.fromkeys(lost, "missing"))
        target = self.targets[step.encoder]
        plain = (target.digest, step.version, [(c.payload, c.coefficient) for c in step.contributions])
        target.digest = target.digests[step.version] = hashlib.sha256(repr(plain).encode()).hexdigest()
        target.steps += (step,)
        return Stepped(str(target.digest), 1.0)

    def digest(self, encoder: str) -> str:
        return str(self.targets[encoder].digest)

    def measurement(self, size: int, encoding: str) -> Any:
        return SimpleNamespace(add=lambda body: None, result=lambda: (True, 1.0))

    def generated(self, effect: Generate) -> list[Outcome]:
        if self._words and effect.gathered is None:
            return [Outcome(Gathering(encoder=effect.encoder))]
        gathered = dict(effect.gathered or {})
        everybodys = gathered.pop(EVERYBODYS, 0)
        demand(set(gathered.values()) <= {WORDS}, f"a node's words count more than once: {effect.gathered}")
        demand(everybodys == WORDS * len(gathered), f"{effect.gathered} is not the sum of what nodes contribute")
        digest = hashlib.sha256(b"fresh").hexdigest()
        plain: dict[str, Any] = {"layout": LAYOUT.plain(), "layout_digest": LAYOUT.digest, "digest": digest}
        plain["assets"] = list(self._assets)
        provided = [
            Outcome(Provided(encoder=effect.encoder, **asset_entry(name, content).model_dump()), content)
            for name, content in self._assets.items()
        ]
        return [*provided, Outcome(Generated(encoder=effect.encoder, architecture={}, **plain), b"fresh")]

    def encoded(self, encoder: str, encoding: EncodingName) -> Encoded:
        bodies = bodies_of(self.digest(encoder), encoding)
        return Encoded(bodies, payload_digest(bodies))

    def export(self, directory: Path, encoder: object, settings: object) -> None:
        """Where nothing is written."""

    def fingerprint(self) -> dict[str, str]:
        return {}

    def saved(self) -> dict[str, tuple[str, tuple[Step, ...]]]:
        return {name: (target.digest, target.steps) for name, target in self.targets.items()}


class TokenTraining:
    """Training that takes ten steps when the world lets it, and hands in a payload that no other update has."""

    def __init__(self, world: World, instruction: Instruction) -> None:
        self.instruction, self.rule, self.since = instruction, UpdateRule(), SinceReturn()
        self.version, self.steps = -1, 0
        self.held_out = self.finishing = None
        self._world = world

    @property
    def must_return(self) -> bool:
        return self.since.steps >= 10

    def retune(self, rule: UpdateRule, progress: float) -> None:
        self.rule = rule

    def adopt(self, read: CompleteVersion) -> None:
        self.version = read.version

    def step(self) -> float:
        if self._world.trains:
            self._world.trains = False
            self.steps += 10
            for _ in range(10):
                self.since.step(10, 5.0)
        return 0.0

    def settle(self) -> None:
        """Every step is taken at once."""

    def hand_in(self, sequence: int) -> tuple[SinceReturn, list[bytes]]:
        since, self.since = self.since, self.since.returned()
        token = f"{sequence}/{next(self._world.tokens)}".encode().ljust(payload_size(LAYOUT.size, "int8"))
        first = slice_bytes("int8")
        return since, [token[:first], token[first:]]

    def answered(self, receipt: Receipt) -> None:
        """Nothing of it is kept here."""

    def save(self, incarnation: str, next_sequence: int) -> None:
        """A checkpoint would not outlive a kill here: whoever is killed starts from the version that it reads."""

    def finish(self, read: CompleteVersion, export: Path | None) -> Path:
        self.version, self.since = read.version, SinceReturn()
        return Path("nowhere")

    def finish_on(self) -> bool:
        """No token is tuned by itself: `finish` begins no phase."""
        return False

    def conclude(self, export: Path | None) -> Path:
        raise Violation("a phase is ended that never began")
