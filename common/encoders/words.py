"""Counts of words: what a node may contribute to a vocabulary that all agree on, and the text that one is trained on.

Pure, and without a model or a tokenizer: `node_service` counts, the master sums, `shared_vocabulary` trains.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.wire.fields import MAX_WORD_BYTES, MAX_WORD_LENGTH, MAX_WORDS

#: The source that an encoder type finds the gathered words under: JSON, as `written` gives it.
SOURCE = "words"

#: Runs of letters and numbers; `str.isalpha` sorts out those that are not letters alone.
_RUNS = re.compile(r"[^\W_]+")

#: A list counts for so many documents at most, however many its node claims to have.
MOST_DOCUMENTS = 10_000

#: Of all words that came, those in the most documents are trained on, and at most so many.
_MOST_KINDS = 200_000
#: Characters that the counts are scaled down to; a word has at least one occurrence beyond that. Together with those
#: it is less than what `train_vocabulary` takes without leaving any out.
_CHARACTERS = 6_000_000


@dataclass(frozen=True)
class WordList:
    """Words, and in how many of the `documents` each occurs, which is never less than `min_documents`; the most
    frequent first."""

    documents: int
    min_documents: int
    words: tuple[tuple[str, int], ...]


def word_list(texts: Iterable[str], min_documents: int) -> WordList:
    """The words of a corpus that are in at least `min_documents` of its texts: letters alone, as they are written.

    Equal texts are one document, or a text that is there ten times would give its words away. Numbers, and words with a
    digit in them, are left out, and so are words longer than `MAX_WORD_LENGTH`. Of more than `MAX_WORDS`, or of more
    than `MAX_WORD_BYTES` in all, those in the most documents are taken, of equals the first in order.
    """
    documents, counts = 0, Counter[str]()
    for text in dict.fromkeys(texts):
        documents += 1
        counts.update({word for word in _RUNS.findall(text) if word.isalpha() and len(word) <= MAX_WORD_LENGTH})
    often = [(word, count) for word, count in counts.items() if count >= min_documents]
    taken: list[tuple[str, int]] = []
    left = MAX_WORD_BYTES
    for word, count in sorted(often, key=_by_count)[:MAX_WORDS]:
        left -= len(word.encode())
        if left < 0:
            break
        taken.append((word, count))
    return WordList(documents, min_documents, tuple(taken))


def shown(words: WordList) -> str:
    """A list as its owner reads it: what it is, and a line for each word, its number of documents first."""
    head = (
        f"# What this node contributes to a vocabulary that all agree on: {len(words.words)} words, each in at least "
        f"{words.min_documents} of {words.documents} documents.\n"
        "# The number says in how many documents a word occurs. Nothing else is sent of them.\n"
    )
    return head + "".join(f"{count}\t{word}\n" for word, count in words.words)


def weighed(documents: int, words: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The words of one list of so many documents, as they are added to those of others: what is of more than
    `MOST_DOCUMENTS` is scaled down to that, to whole numbers (the same on every machine), and none becomes nothing."""
    if documents <= MOST_DOCUMENTS:
        return list(words)
    return [(word, max(1, count * MOST_DOCUMENTS // documents)) for word, count in words]


def summed(lists: Iterable[WordList]) -> dict[str, int]:
    """In how many documents of all contributors each word occurs; of one contributor, as `weighed` has it."""
    total = Counter[str]()
    for each in lists:
        total.update(dict(weighed(each.documents, each.words)))
    return dict(total)


def written(counts: Mapping[str, int]) -> str:
    """Counts as the source `words` of an encoder type: a JSON object, in the order of the words."""
    return json.dumps(dict(sorted(counts.items())), ensure_ascii=False)


def training_text(counts: Mapping[str, int]) -> list[str]:
    """The text that a byte-level BPE is trained on in the place of the documents: each word behind a space, as often as
    its count says, in the order of the words, which the vocabulary does not depend on.

    The library's trainer takes text, not counts. So large counts are scaled down together, to `_CHARACTERS` in all,
    and rounded; none becomes nothing.
    """
    kept = sorted(sorted(counts.items(), key=_by_count)[:_MOST_KINDS])
    characters = sum(count * (len(word) + 1) for word, count in kept)
    if characters <= _CHARACTERS:
        return [f" {word}" * count for word, count in kept]
    # whole numbers: the same on every machine
    return [f" {word}" * max(1, count * _CHARACTERS // characters) for word, count in kept]


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
