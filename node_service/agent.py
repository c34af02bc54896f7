"""The node's side of the protocol as a pure state machine: messages in, actions out. No broker, no tensor, no clock.

One encoder is trained at a time; instructions for others wait until it is finished.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import assert_never

from common.wire.base import Message
from common.wire.to_master import Fetch, FetchAssets, Finished, InstructionAck, Join, Leave
from common.wire.to_node import (
    Finish,
    Instruction,
    Introduce,
    Notice,
    Receipt,
    Resend,
    Rule,
    Withdrawn,
    WordsWanted,
    verdict,
)

#: Instructions that wait for their turn; an instruction has up to a mebibyte.
MAX_WAITING = 64


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the master."""

    message: Message


@dataclass(frozen=True, slots=True)
class CheckSamples:
    """Look for samples of the instruction's type and build the model; answered by `samples_checked`."""

    instruction: Instruction


@dataclass(frozen=True, slots=True)
class Contribute:
    """Answer with the words that this node contributes to a vocabulary, or that it contributes none. `again`: this
    process has answered, and its owner was told; the master may not have heard it."""

    wanted: WordsWanted
    again: bool = False


@dataclass(frozen=True, slots=True)
class Gather:
    """Read those of the instruction's assets that are not here yet; answered by `gathered` once all of them are, or by
    `gathering_failed`."""

    instruction: Instruction


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with what was trained last: what was lacking for that is here."""


@dataclass(frozen=True, slots=True)
class Train:
    """Train the instruction's encoder by this rule from now on, whether it is trained already or begins."""

    instruction: Instruction
    rule: Rule


@dataclass(frozen=True, slots=True)
class Read:
    """Read the newest version ≥ `at_least` from the stream (`exact`: that very one). `digest`, `offset`: that of
    `at_least`, and where on the stream it begins, if the master has said so."""

    encoder: str
    at_least: int
    published_at: float
    exact: bool = False
    digest: str | None = None
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """See whether a version ≥ `at_least` is on the stream although nobody has said so; finding none is normal."""

    encoder: str
    at_least: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The master does not know the encoder that is trained here: stop training it."""

    encoder: str


@dataclass(frozen=True, slots=True)
class Answered:
    """An update has its receipt; what was kept for sending it again can go."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Republish:
    """Publish an owed update again, as this attempt (None: as the next), of an order above `beyond`; without a number,
    everything that is owed. `detail`: what the master missed, for people."""

    sequence: int | None = None
    attempt: int | None = None
    detail: str = ""
    beyond: int = 0


@dataclass(frozen=True, slots=True)
class Reincarnate:
    """The master knows this incarnation's updates otherwise than this node does: take a new one and join."""


@dataclass(frozen=True, slots=True)
class Unmade:
    """An encoder that this node could have trained could not be made; its owner is told why."""

    encoder: str
    reason: str


@dataclass(frozen=True, slots=True)
class TakenOut:
    """The master's operator has taken this node out, for this reason; its owner is told."""

    reason: str


Action = (
    Say
    | CheckSamples
    | Contribute
    | Gather
    | Resume
    | Train
    | Read
    | Look
    | Drop
    | Answered
    | Republish
    | Reincarnate
    | Unmade
    | TakenOut
)


@dataclass
class Agent:
    """What the node knows of the protocol's state.

    Versions up to `lost` were made by a master that has lost them since (its disk was restored from a backup): of those
    only the one that it names is read, because the stream may hold two of one number. `named`: its owner agrees that
    its name is published. `gathering`: the instruction whose assets are being read; until they are here its encoder is
    not built, and its rule and versions are not for us. `contributed`: the encoders whose wish for words was answered,
    the newest of them.
    """

    node: str
    incarnation: str
    types: tuple[str, ...]
    current: Instruction | None = None
    rule: Rule | None = None
    version: int = -1
    wanted: int = -1
    lost: int = -1
    finishing: Finish | None = None
    unknown: bool = False
    named: bool = False
    waiting: dict[str, Instruction] = field(default_factory=dict)
    gathering: Instruction | None = None
    contributed: deque[str] = field(default_factory=lambda: deque(maxlen=16))

    def join(self) -> list[Action]:
        """Introduce this node; the master answers with the running instructions."""
        return [Say(Join(node=self.node, incarnation=self.incarnation, types=list(self.types)))]

    def resume(self, instruction: Instruction, rule: Rule, version: int) -> list[Action]:
        """Go on where an earlier process of this incarnation was, from `version`, or from one to be read if that is -1.

        The master's answer to `join` is then one more instruction for the encoder that is trained already.
        """
        self.current, self.rule, self.version = instruction, rule, version
        return [Train(instruction, rule), *self._read(rule)]

    def leave(self) -> list[Action]:
        """Say goodbye; what is owed stays owed."""
        return [Say(Leave(node=self.node, incarnation=self.incarnation))]

    def receive(self, message: Message) -> list[Action]:
        """What a message from the master leads to. Messages of other encoders or incarnations lead to nothing."""
        match message:
            case Instruction():
                return self._instructed(message)
            case WordsWanted() if message.encoder_type in self.types:
                again = message.encoder in self.contributed
                if not again:
                    self.contributed.append(message.encoder)
                return [Contribute(message, again)]
            case Introduce():
                self.unknown = True
                return self.join()
            case Withdrawn() if message.kicked:
                return [*self._rest(message.encoder), TakenOut(message.reason)]
            case Withdrawn():
                told = [Unmade(message.encoder, message.reason)] if message.encoder_type in self.types else []
                return [*told, *self._withdrawn(message.encoder)]
            case Receipt() if message.incarnation == self.incarnation:
                return self._receipted(message)
            case Resend() if message.incarnation == self.incarnation:
                return [Republish(message.sequence, message.attempt, message.detail, message.beyond)]
            case Finish():
                return self._finish(message)
            case Rule() if self._is_built(message.encoder):
                return self._ruled(message)
            case Notice() if self._is_built(message.encoder):
                return self._read(message)
        return []

    def mistaken(self) -> list[Action]:
        """The master answered another update under a number of ours: this state directory is an old backup."""
        return [Reincarnate()]

    def samples_checked(self, instruction: Instruction, samples: int, refusal: str = "") -> list[Action]:
        """The answer to CheckSamples: how many samples match, or why this node does not take part."""
        said: list[Action] = [self._acknowledge(instruction, samples, refusal)]
        if refusal and self._is_current(instruction.encoder):
            return [*said, *self._let_go()]
        return [*said, *([] if self.current else self._next())]

    def rule_refused(self, encoder: str, why: str) -> list[Action]:
        """A rule has come that this node cannot train by. With one that it can it goes on; without one it lets go of
        the encoder, and the master is told why."""
        if not self._is_built(encoder) or self.rule is not None or self.current is None:
            return []
        return [self._acknowledge(self.current, 0, why), *self._let_go()]

    def lacks_assets(self, instruction: Instruction) -> list[Action]:
        """The answer to CheckSamples, or to what is to be resumed, if assets are not here: they are read first."""
        if self.gathering == instruction:
            return []  # the instruction came twice
        self.gathering = instruction
        return [Gather(instruction)]

    def gathered(self) -> list[Action]:
        """All assets are here: go on with what they were read for."""
        gathering, self.gathering = self.gathering, None
        if gathering is None:
            return []
        if self.current is None:
            return [Resume()]
        return [CheckSamples(gathering)] if self._is_current(gathering.encoder) else []

    def gathering_failed(self, encoder: str, *, ask: bool = True) -> list[Action]:
        """The assets did not come over the stream: `ask` the master for them, and read again; meanwhile another encoder
        has its turn, if one waits."""
        gathering = self.gathering
        if gathering is None or gathering.encoder != encoder or not (self.current is None or self._is_current(encoder)):
            return []
        fetch = Say(FetchAssets(node=self.node, incarnation=self.incarnation, encoder=encoder))
        asked: list[Action] = [fetch] if ask else []
        if self.current is not None and self.waiting:
            return [*asked, *self._put_off(self.current)]
        return [*asked, Gather(gathering)]

    def version_read(self, encoder: str, version: int) -> list[Action]:
        """A version that `adopts` or `finishes` is here; after the last one, which the master is told of, the next
        encoder's turn comes."""
        if not self._is_current(encoder):
            return []
        self.version = max(self.version, version)
        if self.finishing is None or self.version < self.finishing.version:
            return []
        had = Finished(node=self.node, incarnation=self.incarnation, encoder=encoder, version=self.version)
        return [Say(had), *self._turn()]

    def adopts(self, encoder: str, version: int, *, exact: bool) -> bool:
        """Whether a version that was read is to be trained on."""
        return version > self.version and self._holds(encoder, version, exact)

    def finishes(self, encoder: str, version: int, *, exact: bool) -> bool:
        """Whether a version that was read is the last one, whatever it was read for."""
        finish = self.finishing
        return finish is not None and version >= finish.version and self._holds(encoder, version, exact)

    def read_failed(self, encoder: str, sought: int) -> list[Action]:
        """The version that was wanted did not come over the stream: ask the master for it, unless a newer one is on its
        way."""
        if not self._is_current(encoder) or sought < self.wanted:
            return []
        # the last version is read even if it was trained on already, to end with exactly that
        self.wanted = self.version if self.finishing is None else min(self.version, self.finishing.version - 1)
        return self._fetch(sought)

    def ask(self) -> list[Action]:
        """Nothing was heard for long while there is nothing to train: ask for a version newer than ours.

        Without a rule the instruction, the ack or the rule may be what got lost, and joining again brings them; or the
        encoder has ended long since and its instruction came twice, and what answers the fetch is its end. If another
        one waits, it has its turn: this one may never begin, and its master is told not to count on this node. But not
        while this one's assets are being read, however long that takes: it ends, or fails.
        """
        if self.rule is not None:
            return self._fetch()
        if self.current is None or not self.waiting or self._is_gathered(self.current.encoder):
            return self.missed()
        return self._put_off(self.current)

    def missed(self) -> list[Action]:
        """The master has sent something that never came: it says everything again to who joins, and a fetch is answered
        by a newer version, or by the end."""
        return [*self.join(), *self._fetch()]

    def look(self) -> list[Action]:
        """Nothing was heard for long: the master may be away, and what it published last is on the stream."""
        if self.current is None or self.rule is None or self.finishing is not None:
            return []
        return [Look(self.current.encoder, self.version + 1)]

    @property
    def training(self) -> bool:
        """Whether there is an encoder to train now."""
        return self.rule is not None and self.finishing is None and self.version >= 0

    @property
    def paused(self) -> bool:
        """Whether the master's operator wants no step to be taken."""
        return self.rule is not None and self.rule.paused

    def _acknowledge(self, instruction: Instruction, samples: int, refusal: str) -> Say:
        return Say(
            InstructionAck(
                node=self.node,
                incarnation=self.incarnation,
                encoder=instruction.encoder,
                accepted=not refusal,
                samples=samples,
                reason=refusal[:2000],
                named=self.named,
            )
        )

    def _fetch(self, sought: int | None = None) -> list[Action]:
        if self.current is None:
            return []
        fetch = Fetch(
            node=self.node,
            incarnation=self.incarnation,
            encoder=self.current.encoder,
            have_version=self.version,
            sought=sought,
        )
        return [Say(fetch)]

    def _holds(self, encoder: str, version: int, exact: bool) -> bool:
        """Whether a version that was read is one that the master knows, of the current encoder."""
        return self._is_current(encoder) and (exact or version > self.lost)

    def _is_current(self, encoder: str) -> bool:
        return self.current is not None and self.current.encoder == encoder

    def _is_gathered(self, encoder: str) -> bool:
        return self.gathering is not None and self.gathering.encoder == encoder

    def _is_built(self, encoder: str) -> bool:
        """Whether it is the current encoder, and lacks nothing."""
        return self._is_current(encoder) and not self._is_gathered(encoder)

    def _put_off(self, instruction: Instruction) -> list[Action]:
        """The current encoder waits at the end of the line."""
        self.current = self.gathering = None
        self.waiting[instruction.encoder] = instruction
        return [self._acknowledge(instruction, 0, "another encoder has its turn"), *self.join(), *self._next()]

    def _instructed(self, instruction: Instruction) -> list[Action]:
        if instruction.encoder_type not in self.types:
            return []
        if self.current is not None and not self._is_current(instruction.encoder):
            if instruction.encoder not in self.waiting and len(self.waiting) >= MAX_WAITING:
                return [self._acknowledge(instruction, 0, f"{MAX_WAITING} encoders wait here already")]
            self.waiting[instruction.encoder] = instruction
            return []
        self.current = instruction
        return [CheckSamples(instruction)]

    def _ruled(self, rule: Rule) -> list[Action]:
        assert self.current is not None
        self.rule = rule
        self.finishing = None  # it goes on; should the rule be an old one, the next update is answered by the end again
        # what came while the master did not know this node was not looked at
        again = [Republish()] if self.unknown else []
        self.unknown = False
        return [Train(self.current, rule), *self._read(rule), *again]

    def _receipted(self, receipt: Receipt) -> list[Action]:
        current = self._is_current(receipt.encoder)
        answered: list[Action] = [Answered(receipt)]
        said = verdict(receipt)
        match said:
            case "conflict":
                return [*answered, Reincarnate()]
            case "unknown-encoder":
                return [*answered, Drop(receipt.encoder), *self._turn()] if current else answered
            case "future":
                if not current or self.finishing is not None or receipt.version >= self.version:
                    return answered
                self.lost = max(self.lost, self.version, self.wanted)
                self.version = self.wanted = -1
                return [*answered, *self._fetch()]
            case "finished":
                return answered  # a Finish comes with it
            case "kicked":
                return answered  # a Withdrawn comes with it
            case "accepted" | "stale" | "early" | "layout" | "size" | "digest" | "not-finite" | "set-aside" | "other":
                return answered  # of this update alone
        assert_never(said)

    def _withdrawn(self, encoder: str) -> list[Action]:
        """Nothing comes of an instruction, and of what was trained by it."""
        self.waiting.pop(encoder, None)
        return self._let_go() if self._is_current(encoder) else []

    def _rest(self, encoder: str) -> list[Action]:
        """An encoder is trained here no more until its instruction comes again; what was trained is not dropped."""
        self.waiting.pop(encoder, None)
        return self._turn() if self._is_current(encoder) else []

    def _finish(self, finish: Finish) -> list[Action]:
        self.waiting.pop(finish.encoder, None)
        if not self._is_current(finish.encoder):
            return []
        if self.rule is None:
            return self._turn()  # it ended before this node was let in
        if self.finishing is not None and self.wanted >= finish.version:
            return []  # it is on its way: an update refused as finished brings a Finish of its own
        self.finishing, self.wanted = finish, finish.version
        exact = finish.version <= self.lost
        return [_reading(finish, exact=exact)]

    def _read(self, told: Rule | Notice) -> list[Action]:
        """Read each version once, and only if it is newer than what is here or on its way."""
        assert self.current is not None
        if told.version <= max(self.version, self.wanted):
            return []
        self.wanted = told.version
        return [_reading(told, exact=told.version <= self.lost)]

    def _let_go(self) -> list[Action]:
        """The current encoder is not trained here, or not any more."""
        assert self.current is not None
        dropped: list[Action] = [] if self.rule is None else [Drop(self.current.encoder)]
        return [*dropped, *self._turn()]

    def _turn(self) -> list[Action]:
        """The current encoder is done with: turn to the next."""
        self.current, self.rule, self.finishing, self.gathering = None, None, None, None
        self.version = self.wanted = self.lost = -1
        return self._next()

    def _next(self) -> list[Action]:
        """Turn to the instruction that has waited longest."""
        if not self.waiting:
            return []
        self.current = self.waiting.pop(next(iter(self.waiting)))
        return [CheckSamples(self.current)]


def _reading(told: Rule | Notice | Finish, *, exact: bool) -> Read:
    """What reading the version leads to that a message tells of."""
    return Read(told.encoder, told.version, told.published_at, exact, told.stream_digest, told.stream_offset)
