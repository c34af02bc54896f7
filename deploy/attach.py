"""From an exported encoder and some texts to a whole masked language model: for who has texts and runs no node.

What the export lacks (where each organisation has its own vocabulary: that, its embeddings and a prediction head) is
made afresh and fitted while everything else stands still; then all of it is trained. An export with a vocabulary lacks
nothing, and only the second stage is left. Works on tensors and names of transformers, so on any of its masked language
models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from common import cards
from common.encoders import hugging_face
from common.encoders.base import Samples
from common.errors import UserError
from common.exports import check_export_directory, replacing
from common.wire.update_rule import InnerOptimizer
from deploy.masked_model import MaskedLanguageModel, around, check_encoder, tokenizer_for
from node_service.corpus.corpus import split_by_content
from node_service.evaluation.probe import masked_loss
from node_service.training.trainer import Trainer

#: Entries of a vocabulary that is trained here, unless another size is given.
ENTRIES = 4096
#: The held-out loss is looked at so many times in a stage, but not more often than that many steps, on so many windows;
#: and a stage ends after so many looks without a better one.
_LOOKS = 20
_RARELY = 10
_LOOKED_AT = 256
_PATIENCE = 3
#: Called after each step with (stage, steps done, steps at most).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Attached:
    """What `attach` gives. Losses are masked-token losses in nats, on texts that were held out: before any step, after
    the stage with the trunk frozen, and after all was free. `lacked`: something had to be made afresh; if
    nothing had, there is the second stage alone."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    lacked: bool
    before: float
    after_frozen: float
    after_free: float
    frozen_steps: int
    free_steps: int


@dataclass(frozen=True)
class AttachBudget:
    """Steps of the two stages at most, and how they are trained; each ends early where the held-out loss falls no more.
    The rate of the free stage is a third of `lr`: the trunk is trained already."""

    frozen_steps: int = 400
    steps: int = 800
    lr: float = 5e-3
    batch_size: int = 16
    held_out: float = 0.1
    seed: int = 0

    def inner(self, stage: str) -> InnerOptimizer:
        rate = self.lr if stage == "frozen" else self.lr / 3
        return InnerOptimizer(lr=rate, batch_size=self.batch_size, warmup_steps=20)


def attach(
    encoder: Path | str,
    texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerFast | Path | str | None = None,
    entries: int = ENTRIES,
    own_vocabulary: bool = False,
    out: Path | str | None = None,
    budget: AttachBudget | None = None,
    device: str = "cpu",
    progress: Progress = lambda stage, done, of: None,
) -> tuple[Any, PreTrainedTokenizerFast]:
    """A masked language model around an exported encoder, fitted to `texts`, and its tokenizer; saved in `out`.

    The vocabulary is `tokenizer` (one, or the directory of one) where given, else that of the export where it has one,
    else, and with `own_vocabulary`, a byte-level BPE of at most `entries` entries trained on the texts.
    Raises UserError for a directory that is no such encoder, texts that cannot be split into two parts, a tokenizer
    without a mask, and an `out` that holds something else.
    """
    found = attached(
        encoder,
        texts,
        tokenizer=tokenizer,
        entries=entries,
        own_vocabulary=own_vocabulary,
        out=out,
        budget=budget or AttachBudget(),
        device=device,
        progress=progress,
    )
    return found.model, found.tokenizer


def attached(
    encoder: Path | str,
    texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerFast | Path | str | None,
    entries: int,
    own_vocabulary: bool,
    out: Path | str | None,
    budget: AttachBudget,
    device: str,
    progress: Progress,
) -> Attached:
    """`attach`, with the losses on the way."""
    directory = Path(encoder)
    if out is not None:
        check_export_directory(Path(out))
    check_encoder(directory)
    try:
        kept, held_out = split_by_content(texts, budget.held_out)
    except ValueError:
        raise UserError(
            f"{len(texts)} texts cannot be split into training and held-out ones; give at least two that differ"
        ) from None
    train = [texts[row] for row in kept]
    words, is_new = tokenizer_for(directory, tokenizer, train, entries, own=own_vocabulary)
    with hugging_face.seeded(budget.seed):
        network, fresh = around(directory, words, is_new)
    # a tokenizer of transformers does not cut what its model cannot hold unless it is told how much that is
    words.model_max_length = min(words.model_max_length, getattr(network.config, "max_position_embeddings", 512))
    model = MaskedLanguageModel(network, words)
    losses, steps = _fitted(model, (train, [texts[row] for row in held_out]), fresh, budget, device, progress)
    model.network.cpu().eval()
    found = Attached(model.network, words, bool(fresh), *losses, *steps)
    if out is not None:
        _save(found, directory, Path(out), model.window)
    return found


# --- how it is trained -----------------------------------------------------------------------------------------------


def _fitted(
    model: MaskedLanguageModel,
    parts: tuple[Samples, Samples],
    fresh: set[str],
    budget: AttachBudget,
    device: str,
    progress: Progress,
) -> tuple[tuple[float, float, float], tuple[int, int]]:
    """Both stages; gives the held-out losses before, between and after, and the steps that were taken."""
    train, held_out = (model.encode(part) for part in parts)
    model.to(device)

    def stage(name: str, best: float, steps: int, trained: set[str] | None) -> tuple[float, int]:
        trainer = Trainer(model, train, budget.inner(name), seed=budget.seed, device=device, trained=trained)
        return _until_no_better(model, trainer, held_out, best, steps, lambda done: progress(name, done, steps))

    before = _looked(model, held_out, budget.batch_size)
    frozen, frozen_steps = stage("frozen", before, budget.frozen_steps if fresh else 0, {f"network.{n}" for n in fresh})
    free, free_steps = stage("free", frozen, budget.steps, None)
    return (before, frozen, free), (frozen_steps, free_steps)


def _looked(model: MaskedLanguageModel, held_out: Any, size: int) -> float:
    """The held-out loss, by batches no larger than those of the training: logits of many tokens over a large vocabulary
    are what fills a memory."""
    return masked_loss(model, held_out, batches=max(1, _LOOKED_AT // size), size=size)


def _until_no_better(
    model: MaskedLanguageModel,
    trainer: Trainer,
    held_out: Any,
    best: float,
    steps: int,
    after: Callable[[int], None],
) -> tuple[float, int]:
    """Train until the held-out loss has not fallen for a while; the model is left as it was at its best."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    worse, every = 0, max(_RARELY, steps // _LOOKS)
    for step in range(1, steps + 1):
        trainer.progress = (step - 1) / steps
        trainer.step()
        after(step)
        if step % every and step != steps:
            continue
        loss = _looked(model, held_out, trainer.inner.batch_size)
        worse = worse + 1
        if loss < best and math.isfinite(loss):
            best, worse = loss, 0
            kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if worse == _PATIENCE:
            break
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return best, trainer.steps


# --- what is written -------------------------------------------------------------------------------------------------


def _save(found: Attached, encoder: Path, out: Path, window: int) -> None:
    config = found.model.config
    looks = {"before": found.before, "trunk frozen": found.after_frozen, "all free": found.after_free}
    if found.lacked:
        how = (
            "What the shared encoder came without was fitted to texts of the reader's own in "
            f"{found.frozen_steps} steps, and all of it in {found.free_steps} more."
        )
    else:
        del looks["trunk frozen"]
        how = (
            "Vocabulary and head are those that the encoder came with; all of it was fitted to texts of the reader's "
            f"own in {found.free_steps} steps."
        )
    card = (
        f"{cards.front_matter('text', whole=True)}{cards.TITLE}{_name(encoder)}, fitted to texts of its reader's\n\n"
        f"A `{config.model_type}` whose vocabulary has {len(found.tokenizer):,} entries. {how}\n\n"
        f"{cards.loading('text', whole=True)}"
        "## Evaluation\n\n"
        + cards.table(
            ("masked-token loss on held-out texts, nats", *looks), [("", *(f"{loss:.3f}" for loss in looks.values()))]
        )
    )
    with replacing(out, card) as beside:
        hugging_face.save(found.model, beside)
        found.tokenizer.save_pretrained(beside)
        _write_sentence_modules(beside, config.hidden_size, window)


def _name(encoder: Path) -> str:
    """The encoder's id, out of its card; of a directory of somebody else, its name."""
    try:
        return cards.title((encoder / "README.md").read_text("utf-8")) or encoder.name
    except (OSError, UnicodeDecodeError):
        return encoder.name


def _write_sentence_modules(directory: Path, width: int, window: int) -> None:
    """What sentence-transformers reads of a directory: the model, and the mean of its last layer over the tokens."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (directory / "1_Pooling").mkdir()
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": window, "do_lower_case": False},
    }.items():
        (directory / name).write_text(json.dumps(content, indent=2), "utf-8")
