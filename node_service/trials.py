"""What may end this process is tried with a mark on disk: building what an instruction asks for, and the first step by
a rule. What has ended it twice is not tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import structlog

from common.errors import CannotBuild, SharedEncoderError, UserError
from common.numbers.layout import Layout
from common.wire.to_node import Instruction, Rule
from common.wire.update_rule import UpdateRule
from node_service.corpus.corpus import Corpus
from node_service.handover.deadly import name_of
from node_service.handover.local_state import LocalState
from node_service.handover.receipt_book import Ledger
from node_service.training.training import Training
from node_service.training.update_rule import impossible

log = structlog.get_logger()

_TRIED = nullcontext()
#: Makes the training of an instruction's encoder on samples; the ledger says what became of earlier updates, and the
#: instruction's assets come by name. Raises UserError if this node cannot.
Build = Callable[[Instruction, Corpus, Ledger, Mapping[str, bytes]], Training]


class Trials:
    """Builds on behalf of a node, and marks its steps."""

    def __init__(self, node: str, state: LocalState, build: Build) -> None:
        self._node = node
        self._state = state
        self._build = build
        #: The rule by which a step was taken.
        self._tried: UpdateRule | None = None

    def build(self, instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]) -> Training:
        """The training that an instruction asks for. Raises UserError if this node cannot."""
        name = name_of("instruction", instruction)
        if why := self._state.guard.fatal(name):
            raise UserError(why)
        if Layout(instruction.layout).digest != instruction.layout_digest:
            raise UserError("the instruction's layout does not match its digest")
        with self._state.guard.at(name):
            try:
                return self._build(instruction, corpus, ledger, assets)
            except (SharedEncoderError, OSError):
                raise
            except Exception as error:  # whatever an encoder type makes of an architecture that is none
                log.error("building failed", node=self._node, encoder=instruction.encoder, exc_info=error)
                raise CannotBuild(error) from error

    def refused(self, rule: Rule) -> str:
        """Why this node does not train by a rule; empty if it does."""
        return impossible(rule.update_rule) or self._state.guard.fatal(_trial(rule.encoder, rule.update_rule))

    def step(self, training: Training) -> AbstractContextManager[None]:
        """While a step is taken."""
        rule = training.rule
        return _TRIED if rule is self._tried or rule == self._tried else self._first(training)

    @contextmanager
    def _first(self, training: Training) -> Iterator[None]:
        """The first step by a rule."""
        with self._state.guard.at(_trial(training.instruction.encoder, training.rule)):
            yield
            training.settle()  # what a GPU cannot take is known only then
        self._tried = training.rule


def _trial(encoder: str, rule: UpdateRule) -> str:
    return name_of("rule", encoder, rule)
