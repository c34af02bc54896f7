"""Encoders for who uses one: opened from an export, or fitted to texts of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deploy.exported import Opened


@dataclass(frozen=True)
class Encoder:
    """An encoder that is open.

    `type` is "text" or "image". `model` is a model of transformers on the CPU, float32, in evaluation mode: a masked
    language model where the export has a vocabulary, else the bare encoder. `tokenizer` is its tokenizer, or None where
    there is no vocabulary: in the export of an encoder that shares its trunk alone, and in one of images.

    >>> encoder = load_encoder("encoder")
    >>> inputs = encoder.tokenizer("some text", return_tensors="pt")
    >>> encoder.model(**inputs).logits.shape  # (texts, tokens, entries of the vocabulary)
    torch.Size([1, ..., 2048])
    """

    type: str
    model: Any
    tokenizer: Any

    def __repr__(self) -> str:
        """In a line: the model's own has dozens."""
        words = "no vocabulary" if self.tokenizer is None else f"{len(self.tokenizer):,} entries"
        size = sum(each.numel() for each in self.model.parameters())
        return f"Encoder({self.type}: {type(self.model).__name__}, {size:,} parameters, {words})"

    def features(self, texts: Sequence[str], *, max_tokens: int | None = None) -> NDArray[np.float32]:
        """A row for each text, float32 (texts, width): the mean of the last layer over its tokens, padding left out.

        A text is cut after `max_tokens`, by default after what the model can hold. Raises UserError for an encoder
        without a vocabulary (`attach` gives it one) and for one of images.

        >>> load_encoder("encoder").features(["a text", "another, which is longer"]).shape
        (2, 64)
        """
        from deploy.exported import Opened, mean_features
        from deploy.undisturbed import undisturbed

        with undisturbed():
            return mean_features(Opened(self.type, self.model, self.tokenizer), texts, max_tokens)


def load_encoder(path: Path | str, private: Path | str | None = None) -> Encoder:
    """Open an exported encoder: the directory that a master, a node, `export` or `attach` wrote. Nothing is downloaded.

    `private` is the folder in which a node keeps what is its own for this encoder, `node-state/NAME/encoders/ID`, or
    its state directory, of which the newest is taken: then the shared encoder is opened within that node's private
    parts, merged into a plain model.

    Raises UserError for a directory that is no export or not whole, and for private parts of another encoder.

    >>> encoder = load_encoder("encoder")
    >>> encoder.type, encoder.features(["a text"]).shape
    ('text', (1, 64))
    """
    from deploy.exported import open_export, open_with_private
    from deploy.undisturbed import undisturbed

    with undisturbed():
        opened = open_export(Path(path)) if private is None else open_with_private(Path(path), Path(private))
    return encoder_of(opened)


def attach(
    encoder: Path | str,
    texts: Sequence[str],
    *,
    out: Path | str | None = None,
    tokenizer: Path | str | None = None,
    entries: int | None = None,
    steps: int = 800,
    frozen_steps: int = 400,
    lr: float = 5e-3,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> Encoder:
    """Fit an exported encoder to `texts`, what `shared-encoder attach` does; saved in `out` for transformers, if given.

    An export with a vocabulary is trained on as it is, at a third of `lr`, for at most `steps` steps. One without gets
    one first, the directory of a `tokenizer` or a byte-level BPE of at most `entries` entries (4,096) trained on the
    texts, and what is new is fitted for at most `frozen_steps` steps while the encoder stands still; with `entries` or
    `tokenizer` any export is treated so. A tenth of the texts is held out, and the model is the one that predicted it
    best. `progress` is called with (stage, steps done, steps at most), stage "frozen" or "free".

    Raises UserError for a directory that is no such encoder, fewer than two different texts, a tokenizer without a mask
    token, and an `out` that holds something else.

    >>> texts = [f"patient {number} was seen on day {number % 7}" for number in range(40)]
    >>> attach("encoder", texts, steps=10).features(["patient 3 was seen again"]).shape
    (1, 64)
    """
    from deploy.attach import ENTRIES, AttachBudget
    from deploy.attach import attached as fitted
    from deploy.exported import Opened
    from deploy.undisturbed import undisturbed

    with undisturbed():
        found = fitted(
            encoder,
            texts,
            tokenizer=tokenizer,
            entries=entries or ENTRIES,
            own_vocabulary=entries is not None,
            out=out,
            budget=AttachBudget(frozen_steps, steps, lr, batch_size, seed=seed),
            device=device,
            progress=progress or (lambda stage, done, of: None),
        )
    return encoder_of(Opened("text", found.model, found.tokenizer))


def encoder_of(opened: Opened) -> Encoder:
    """What this package gives for an export that is open."""
    return Encoder(opened.encoder_type, opened.model, opened.tokenizer)
