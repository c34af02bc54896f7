"""A node's own vocabulary: byte-level BPE trained on its own corpus. Nothing of it ever travels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from common.errors import UserError

PAD, MASK, SEPARATOR = "[PAD]", "[MASK]", "[SEP]"
#: Ids 0, 1, 2, in this order; every id from `len(SPECIAL)` on stands for text.
SPECIAL = (PAD, MASK, SEPARATOR)
PAD_ID, MASK_ID, SEPARATOR_ID = range(len(SPECIAL))

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


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[NDArray[np.int32]]:
    """The token ids of each text, `[SEP]` last; long texts go through in pieces, so that memory stays bounded."""
    stream = ((piece, end == len(text)) for text in texts for piece, end in _pieces(text))
    parts: list[NDArray[np.int32]] = []
    while block := list(islice(stream, _PIECES)):
        encodings = tokenizer.encode_batch_fast([piece for piece, _ in block], add_special_tokens=False)
        for encoding, (_, ends) in zip(encodings, block, strict=True):
            parts.append(np.array(encoding.ids, dtype=np.int32))
            if ends:
                yield np.concatenate([*parts, np.array([SEPARATOR_ID], dtype=np.int32)])
                parts = []


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
