"""The vocabulary that everybody uses: a tokenizer of the operator's, one trained on a text that the operator has, plain
bytes, or the one that lies here; or one made of words that nodes contribute. It travels once, as an asset of the
encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer

from common.encoders import hugging_face, words
from common.encoders.vocabulary import OWN_TOKENS, SMALLEST, Vocabulary, train_vocabulary
from common.errors import UserError, WordsNeeded
from common.sample_files.finding import find_files
from common.sample_files.kinds import SUFFIXES
from common.sample_files.refusals import Refusals
from common.sample_files.texts import read_texts

#: The asset's name.
TOKENIZER = "tokenizer.json"
#: Trained on the sources and documentation of free Python packages; see docs/learning.md for the command.
_SHIPPED = "vocabulary.json"


def make(sources: Mapping[str, str], entries: int) -> Vocabulary:
    """The vocabulary that `sources` names: `tokenizer` is a directory or file of one, or "bytes"; `reference` a file or
    folder of texts on which one of at most `entries` entries is trained. Where neither is named, the shipped one.

    Raises UserError if both are named, and for a source that is none.
    """
    if "tokenizer" in sources and "reference" in sources:
        raise UserError("encoder.tokenizer and encoder.reference name a vocabulary each; leave one of them out")
    if "reference" in sources:
        return trained(texts_of(Path(sources["reference"])), entries)
    if "tokenizer" not in sources:
        shipped = files("common.encoders").joinpath(_SHIPPED).read_text("utf-8")
        return Vocabulary(shipped, OWN_TOKENS)
    if sources["tokenizer"] == "bytes":
        return Vocabulary(train_vocabulary([" "], SMALLEST), OWN_TOKENS)
    return read(Path(sources["tokenizer"]))


def agreed(sources: Mapping[str, str], entries: int) -> Vocabulary:
    """The vocabulary of at most `entries` entries that the source `words` leads to; the same for the same counts. Where
    a `tokenizer` is named, that one: it was agreed on before.

    Raises WordsNeeded where neither is there, UserError where no words came, and for a `reference`.
    """
    if "tokenizer" in sources:
        return make(sources, entries)
    if "reference" in sources:
        raise UserError(
            'encoder.reference is for vocabulary = "shared"; an agreed one is made of nodes\' words: leave it out'
        )
    if words.SOURCE not in sources:
        raise WordsNeeded("the vocabulary is made of words that nodes contribute")
    counts = json.loads(sources[words.SOURCE])
    if not counts:
        raise UserError(
            "no node contributed a word to the agreed vocabulary; set private.contribute_words = true on nodes whose "
            'owners agree (and a lower private.min_documents for a small corpus), or take vocabulary = "shared"'
        )
    return trained(words.training_text(counts), entries)


def read(place: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json, or of a directory that transformers opens (no code in it is run).

    Raises UserError if it is neither, or has no mask token.
    """
    if not place.exists():
        raise UserError(
            f"{place} does not exist; set encoder.tokenizer to a tokenizer.json, a directory with one, or bytes"
        )
    if place.is_file():
        try:
            return Vocabulary.guessed(place.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{place} is not readable as a tokenizer.json ({error}); name another file") from None
    try:
        with hugging_face.quiet():
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loader raises whatever a file that is no tokenizer leads it to
        words = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{place} does not open as a tokenizer ({words}); name a directory with a tokenizer.json"
        ) from None
    if not getattr(tokenizer, "is_fast", False) or tokenizer.mask_token is None:
        raise UserError(f"{place} is no fast tokenizer with a mask token; take that of a masked language model")
    separator = tokenizer.sep_token or tokenizer.eos_token
    tokens = {
        "pad": tokenizer.pad_token or separator,
        "mask": tokenizer.mask_token,
        "separator": separator,
        "classifier": tokenizer.cls_token,
    }
    return Vocabulary(tokenizer.backend_tokenizer.to_str(), tokens)


def trained(texts: Sequence[str], entries: int) -> Vocabulary:
    """A vocabulary of at most `entries` entries of these texts. Raises UserError if all are empty."""
    return Vocabulary(train_vocabulary(texts, entries), OWN_TOKENS)


def texts_of(place: Path) -> list[str]:
    """Every text of a file or folder, read as a node reads its corpus. Raises UserError if there is none."""
    if not place.exists():
        raise UserError(f"{place} does not exist; set encoder.reference to a file or folder of texts")
    if place.is_dir() and not any(place.iterdir()):
        raise UserError(f"{place} holds no texts; encoder.reference takes {', '.join(sorted(SUFFIXES['text']))}")
    refusals = Refusals()
    found = find_files([str(place)], "text", Path(), refusals)
    texts = read_texts(found.files, "text", None, "auto", refusals).texts
    refusals.check()
    return texts
