"""Vocabularies: byte-level BPE trained on texts, and any tokenizer that transformers opens, with its special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from common.errors import UserError

PAD, MASK, SEPARATOR = "[PAD]", "[MASK]", "[SEP]"
#: Ids 0, 1, 2, in this order; every id from `len(SPECIAL)` on stands for text.
SPECIAL = (PAD, MASK, SEPARATOR)
PAD_ID, MASK_ID, SEPARATOR_ID = range(len(SPECIAL))

#: The special tokens of a vocabulary that is trained here, by what they are for. A classifier begins a window.
OWN_TOKENS: Mapping[str, str | None] = {"pad": PAD, "mask": MASK, "separator": SEPARATOR, "classifier": None}

#: What special tokens are called by the models that there are.
_CALLED = {
    "pad": (PAD, "<pad>"),
    "mask": (MASK, "<mask>"),
    "separator": (SEPARATOR, "</s>"),
    "classifier": ("[CLS]", "<s>"),
}

#: The 256 bytes and the special tokens: no text is ever unknown.
SMALLEST = 256 + len(SPECIAL)

#: Characters that the vocabulary is trained on at most, taken evenly over it, to bound time and memory.
_TRAINED_ON = 20_000_000
#: Characters given to the tokenizer in one piece: its memory per character is many times the text's.
_PIECE = 1 << 14
#: Pieces tokenised at a time.
_PIECES = 1 << 10


def train_vocabulary(texts: Sequence[str], size: int) -> str:
    """A byte-level BPE vocabulary of at most `size` entries as the JSON of a `tokenizers.Tokenizer`.

    Every text gets a `[SEP]` at its end. Raises UserError if there is no text at all.
    """
    if not any(texts):
        raise UserError("no text to train a vocabulary on: every document of the corpus is empty")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stride = max(1, sum(map(len, texts)) // _TRAINED_ON)
    tokenizer.train_from_iterator((piece for text in texts[::stride] for piece, _ in _pieces(text)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SEPARATOR}",
        pair=f"$A {SEPARATOR} $B:1 {SEPARATOR}:1",
        special_tokens=[(SEPARATOR, SEPARATOR_ID)],
    )
    return str(tokenizer.to_str())


class Vocabulary:
    """A tokenizer, and the ids of its special tokens."""

    def __init__(self, tokenizer_json: str, tokens: Mapping[str, str | None]) -> None:
        """`tokens`: the special tokens by what they are for, as in `OWN_TOKENS`.

        Raises UserError for a tokenizer that does not open, or lacks one of them.
        """
        self.tokenizer = _opened(tokenizer_json)
        self.tokens = dict(tokens)
        self.entries: int = self.tokenizer.get_vocab_size()
        self.ids: dict[str, int | None] = {
            role: None if token is None else self.tokenizer.token_to_id(token) for role, token in tokens.items()
        }
        for role in ("pad", "mask", "separator"):
            if self.ids.get(role) is None:
                raise UserError(f"the tokenizer has no {role} token {tokens.get(role)!r}; take one for a masked LM")
        special = {token_id for token_id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        special |= {token_id for token_id in self.ids.values() if token_id is not None}
        #: For each id whether it is a special token, bool (entries,), and the ids of all that are not.
        self.special: NDArray[np.bool_] = np.isin(np.arange(self.entries), list(special))
        self.ordinary: NDArray[np.int64] = np.flatnonzero(~self.special)
        if not len(self.ordinary):
            raise UserError("the tokenizer has no entries but special tokens; take one for a masked LM")

    @classmethod
    def guessed(cls, tokenizer_json: str) -> Vocabulary:
        """Of a tokenizer.json alone, which does not say what its special tokens are for: by their usual names.

        Raises UserError if it has none of these.
        """
        tokenizer = _opened(tokenizer_json)
        tokens = {
            role: next((name for name in names if tokenizer.token_to_id(name) is not None), None)
            for role, names in _CALLED.items()
        }
        return cls(tokenizer_json, tokens)

    @property
    def mask_id(self) -> int:
        return self._id("mask")

    @property
    def separator_id(self) -> int:
        return self._id("separator")

    def _id(self, role: str) -> int:
        found = self.ids[role]
        assert found is not None, "looked up when it was made"
        return found

    def for_transformers(self, most_tokens: int) -> PreTrainedTokenizerFast:
        """As AutoTokenizer gives it."""
        names = {"pad": "pad_token", "mask": "mask_token", "separator": "sep_token", "classifier": "cls_token"}
        named = {names[role]: token for role, token in self.tokens.items() if token is not None}
        return PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, model_max_length=most_tokens, **named)

    def tokenise(self, texts: Sequence[str]) -> Iterator[NDArray[np.int32]]:
        """The token ids of each text, the separator last; long texts go through in pieces, so that memory stays
        bounded."""
        stream = ((piece, end == len(text)) for text in texts for piece, end in _pieces(text))
        parts: list[NDArray[np.int32]] = []
        while block := list(islice(stream, _PIECES)):
            encodings = self.tokenizer.encode_batch_fast([piece for piece, _ in block], add_special_tokens=False)
            for encoding, (_, ends) in zip(encodings, block, strict=True):
                parts.append(np.array(encoding.ids, dtype=np.int32))
                if ends:
                    yield np.concatenate([*parts, np.array([self.separator_id], dtype=np.int32)])
                    parts = []


def _opened(tokenizer_json: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' own is no Exception
        words = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"the tokenizer does not open ({words}); take a tokenizer.json of this version") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _pieces(text: str) -> Iterator[tuple[str, int]]:
    """Consecutive pieces of a text with the position after each; an empty text is one empty piece."""
    start = 0
    while True:
        end = min(start + _PIECE, len(text))
        if end < len(text):
            # byte-level BPE never merges across a space that begins a word, so a cut before one changes no token
            space = text.rfind(" ", start + 1, end)
            end = space if space > 0 else end
        yield text[start:end], end
        if end == len(text):
            return
        start = end
