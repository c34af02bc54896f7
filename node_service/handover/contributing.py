"""What a node contributes to a vocabulary that all agree on: nothing, unless its owner said so; and its owner can read
the list before it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from common.encoders.words import WordList, shown, word_list
from common.errors import UserError
from common.wire.to_master import Words
from common.wire.to_node import WordsWanted
from node_service.corpus.corpus import Corpus
from node_service.handover.local_state import LocalState

log = structlog.get_logger()


def contribution(corpus: Corpus, private: Mapping[str, Any]) -> WordList | None:
    """The words of the training samples, if the settings of the private parts allow it; None if not, or if these are no
    texts. Held-out samples are never counted. Raises UserError for a wrong setting."""
    if corpus.type != "text":
        return None
    # transformers takes seconds to import, and only this needs it here
    from common.encoders.settings import checked
    from common.encoders.text_settings import TextPrivate

    own = checked(TextPrivate, "private settings of type text", private)
    return word_list(corpus.train, own.min_documents) if own.contribute_words else None


class Contributions:
    """What a node contributes of each of its corpora; counted when it is asked for first, and kept: corpora and
    settings stay as they are while it runs."""

    def __init__(self, corpora: Mapping[str, Corpus], private: Mapping[str, Any]) -> None:
        self._corpora, self._private = corpora, private
        self._made: dict[str, WordList | None] = {}

    def of(self, encoder_type: str) -> WordList | None:
        """As `contribution` has it."""
        if encoder_type not in self._made:
            self._made[encoder_type] = contribution(self._corpora[encoder_type], self._private)
        return self._made[encoder_type]


def nothing(wanted: WordsWanted, state: LocalState) -> Words:
    """The answer of a node that contributes nothing."""
    return Words(node=state.identity.node, incarnation=state.identity.incarnation, encoder=wanted.encoder)


def answer(wanted: WordsWanted, contributions: Contributions, state: LocalState, *, again: bool = False) -> Words:
    """The answer to who asks for words. The list is on disk, and its owner has been told what it tells (unless this is
    the same `again`), before this returns."""
    say = log.debug if again else log.info
    try:
        words = contributions.of(wanted.encoder_type)
    except UserError as error:
        log.error("contributing no words", node=state.identity.node, encoder=wanted.encoder, problem=str(error))
        words = None
    if words is None:
        say(
            f"taking part in {wanted.encoder} without contributing words to its vocabulary; to contribute, set "
            "private.contribute_words = true"
        )
        return nothing(wanted, state)
    path = state.keep_words(shown(words))
    say(
        f"contributing {len(words.words):,} words to the vocabulary of {wanted.encoder}, each in at least "
        f"{words.min_documents:,} of {words.documents:,} documents here, which may all be about one person: the list "
        f"is in {path}; the master learns these words, in how many of the documents each is, and that it is this node "
        "which has them, and who gets the exported encoder gets a tokenizer that is made of them"
    )
    return Words(
        node=state.identity.node,
        incarnation=state.identity.incarnation,
        encoder=wanted.encoder,
        documents=words.documents,
        min_documents=words.min_documents,
        words=list(words.words),
    )
