"""An exported encoder opened for its reader: a model of transformers, its tokenizer, and features of texts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from common.encoders import get_encoder_type, hugging_face, masked_lm
from common.errors import UserError
from deploy.masked_model import check_encoder, tokenizer_for
from node_service.corpus.corpus import Corpus
from node_service.evaluation.evaluate import Domain, shared_model
from node_service.training.checkpoint import read_checkpoint

#: Texts that go through a model at once.
_BATCH = 32
_IMAGE_MODELS = ("vit_mae",)


@dataclass(frozen=True)
class Opened:
    """`encoder_type`: text or image. `model` is in evaluation mode on the CPU, float32; `tokenizer` is None where the
    export has no vocabulary."""

    encoder_type: str
    model: Any
    tokenizer: PreTrainedTokenizerFast | None


def open_export(directory: Path) -> Opened:
    """An export of a master, of a node or of `attach`: a masked language model with its tokenizer where it has a
    vocabulary, else the bare encoder. Raises UserError for a directory that is none, or not whole."""
    check_encoder(directory)
    plain = hugging_face.read_config(directory, *masked_lm.KINDS, *_IMAGE_MODELS)
    whole = any(str(name).endswith("ForMaskedLM") for name in plain.get("architectures") or ())
    tokenizer = tokenizer_for(directory, None, (), 0, own=False)[0] if (directory / "tokenizer.json").exists() else None
    if whole and tokenizer is None:
        raise UserError(f"{directory} lacks the tokenizer.json that it was exported with; export it again")
    model, missing = hugging_face.load_model(directory, masked=whole)
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} tensors of the encoder, {min(missing)!r} the first; export it again"
        )
    kind = "image" if plain["model_type"] in _IMAGE_MODELS else "text"
    return Opened(kind, model.eval(), tokenizer)


def open_with_private(directory: Path, private: Path) -> Opened:
    """The shared encoder within the private parts of a node, merged into a plain model: `private` is the node's folder
    for this encoder, STATE/encoders/ID, or its state directory, of which the newest is taken.

    Raises UserError for a directory that is no export, for one without private parts, and where they do not fit.
    """
    check_encoder(directory)
    place = _newest(private)
    checkpoint = read_checkpoint(place)
    if checkpoint is None:
        raise UserError(f"{private} holds no private parts; name a node's state directory, or STATE/encoders/ID in it")
    facts = checkpoint.facts
    _, tensors = get_encoder_type(facts.type).architecture_of(directory)
    nothing = Corpus(facts.type, (), None, (), None)
    model = shared_model(Domain(private.name, nothing, place, facts), tensors).eval()
    with tempfile.TemporaryDirectory(prefix="shared-encoder-") as folder, torch.no_grad():
        model.export(Path(folder))
        return open_export(Path(folder))


def _newest(private: Path) -> Path:
    pinned = sorted(private.glob("encoders/*/pinned.json"), key=lambda path: path.stat().st_mtime)
    return pinned[-1].parent if pinned else private


@torch.no_grad()
def mean_features(opened: Opened, texts: Sequence[str], max_tokens: int | None) -> NDArray[np.float32]:
    """The mean of the last layer over a text's tokens, special ones included, padding left out: float32 (n, width).

    A text is cut after `max_tokens`; None: what the model can hold. Raises UserError where there is no tokenizer.
    """
    model, tokenizer = opened.model, opened.tokenizer
    if tokenizer is None:
        raise UserError(
            "this encoder has no vocabulary, so it can read no texts; attach(directory, texts) gives it one"
            if opened.encoder_type == "text"
            else "features are of texts; the export's README.md says how an encoder of images is asked for them"
        )
    longest = min(max_tokens or tokenizer.model_max_length, masked_lm.most_tokens(model))
    base, found = model.base_model, []
    for start in range(0, len(texts), _BATCH):
        inputs = tokenizer(
            list(texts[start : start + _BATCH]),
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        ).to(model.device)
        hidden = base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        found.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1)).float().cpu().numpy())
    return np.concatenate(found) if found else np.empty((0, model.config.hidden_size), np.float32)
