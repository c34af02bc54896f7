"""`shared-encoder vocabulary`: train a vocabulary on a text that no node holds, to look at before it is shared."""

from __future__ import annotations

from pathlib import Path

from common.durable import write_durably
from common.errors import UserError
from common.exports import check_writable
from deploy.commands.display import saying

#: Characters of the reference on which the length of a token is measured.
_MEASURED = 200_000


def write_vocabulary(reference: Path, entries: int, out: Path) -> None:
    """Train on the texts of a file or folder, write a tokenizer.json, and print what it is.

    Raises UserError for a reference that holds no text, too few entries, and a place that cannot be written.
    """
    if out.suffix != ".json":
        raise UserError(f"{out} is no name of a tokenizer.json; give --out FILE.json")
    check_writable(out.absolute().parent, out)
    with saying("loading transformers, a few seconds"):
        from common.encoders import shared_vocabulary
        from common.encoders.vocabulary import SMALLEST
    if entries < SMALLEST:
        raise UserError(f"--entries {entries}: the bytes and the special tokens alone are {SMALLEST}; give more")
    with saying(f"training on {reference}"):
        texts = shared_vocabulary.texts_of(reference)
        made = shared_vocabulary.trained(texts, entries)
    write_durably(out, made.tokenizer.to_str().encode())
    measured = "".join(texts)[:_MEASURED]
    tokens = sum(len(ids) - 1 for ids in made.tokenise([measured]))
    print(
        f"{out}: {made.entries:,} entries from {len(texts):,} texts of {sum(map(len, texts)):,} characters; "
        f'{len(measured) / max(1, tokens):.2f} characters a token there. Use it with encoder.tokenizer = "{out}"'
    )
