"""From an exported encoder and some texts to a whole masked language model: for who has texts and runs no node.

What the export lacks (a vocabulary with its embeddings, a prediction head) is made afresh and fitted while everything
else stands still; then all of it is trained. Works on tensors and names of transformers, so on any of its masked
language models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from common import cards
from common.encoders import hugging_face, vocabulary
from common.encoders.base import Batch, EncoderModel, Samples
from common.errors import NotProbed, UserError
from common.exports import check_export_directory, replacing
from common.wire.messages import InnerOptimizer
from node_service.corpus.corpus import split_by_content
from node_service.evaluation.probe import masked_loss
from node_service.training.trainer import Trainer

#: Entries of a vocabulary that is trained here, unless another size is given.
ENTRIES = 4096
#: The held-out loss is looked at so many times in a stage, but not more often than that many steps, on so many batches
#: of 128 windows; and a stage ends after so many looks without a better one.
_LOOKS = 20
_RARELY = 10
_LOOKED_AT = 4
_PATIENCE = 3
#: Tokens of a window and share of them to predict, where config.json has no such numbers of the training.
_WINDOW = 128
_MASKED = 0.15

#: Called after each step with (stage, steps done, steps at most).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Attached:
    """What `attach` gives. Losses are masked-token losses in nats, on texts that were held out: before any step, after
    the stage with the trunk frozen, and after all was free."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
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
    _check_directory(directory)
    try:
        kept, held_out = split_by_content(texts, budget.held_out)
    except ValueError:
        raise UserError(
            f"{len(texts)} texts cannot be split into training and held-out ones; give at least two that differ"
        ) from None
    train = [texts[row] for row in kept]
    words, is_new = _tokenizer(directory, tokenizer, train, entries, own=own_vocabulary)
    with hugging_face.seeded(budget.seed):
        network, fresh = _around(directory, words, is_new)
    # a tokenizer of transformers does not cut what its model cannot hold unless it is told how much that is
    words.model_max_length = min(words.model_max_length, getattr(network.config, "max_position_embeddings", 512))
    model = _MaskedLanguageModel(network, words)
    losses, steps = _fitted(model, (train, [texts[row] for row in held_out]), fresh, budget, device, progress)
    model.network.cpu().eval()
    found = Attached(model.network, words, *losses, *steps)
    if out is not None:
        _save(found, directory, Path(out), model.window)
    return found


# --- what is opened --------------------------------------------------------------------------------------------------


def _check_directory(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is no exported encoder: it has no config.json; name the directory of an export")


def _tokenizer(
    directory: Path,
    given: PreTrainedTokenizerFast | Path | str | None,
    texts: Sequence[str],
    entries: int,
    *,
    own: bool,
) -> tuple[PreTrainedTokenizerFast, bool]:
    """The tokenizer, and whether it is another than the export's."""
    if given is not None:
        found = _opened(Path(given)) if isinstance(given, Path | str) else given
    elif not own and (directory / "tokenizer.json").is_file():
        return _opened(directory), False
    else:
        if entries < vocabulary.SMALLEST:
            raise UserError(f"a vocabulary has at least {vocabulary.SMALLEST} entries, not {entries}; ask for more")
        return fast_tokenizer(vocabulary.train_vocabulary(texts, entries)), True
    if found.mask_token_id is None:
        raise UserError("the tokenizer has no mask token, which a masked language model needs; give another one")
    return found, True


def _opened(directory: Path) -> PreTrainedTokenizerFast:
    try:
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory} holds no tokenizer that opens ({reason}); give one with tokenizer.json") from None
    if not isinstance(found, PreTrainedTokenizerFast) and not hasattr(found, "backend_tokenizer"):
        raise UserError(f"{directory} holds a slow tokenizer; give one with tokenizer.json")
    return found


def fast_tokenizer(serialised: str) -> PreTrainedTokenizerFast:
    """A vocabulary of `common.encoders.vocabulary` for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(serialised),
        pad_token=vocabulary.PAD,
        mask_token=vocabulary.MASK,
        sep_token=vocabulary.SEPARATOR,
    )


def _around(directory: Path, tokenizer: PreTrainedTokenizerFast, is_new: bool) -> tuple[Any, set[str]]:
    """The whole model, and the names of its parameters that were not in the export."""
    try:
        with hugging_face.quiet():
            found, report = AutoModelForMaskedLM.from_pretrained(
                directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory} does not open as a masked language model ({reason}); name another") from None
    missing = set(report["missing_keys"])
    if missing >= set(dict(found.base_model.named_parameters(prefix=found.base_model_prefix))):
        raise UserError(f"{directory} holds none of the encoder's tensors; export or download it again")
    if not is_new:
        return found, {name for name, _ in found.named_parameters() if name in missing}
    config = found.config
    config.vocab_size = len(tokenizer)
    for name in ("pad", "sep", "cls", "bos", "eos"):
        # ids of the vocabulary before would point anywhere in this one
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    network = AutoModelForMaskedLM.from_config(config)
    # embeddings, and the head's part behind them, belong to a vocabulary; the rest fits any
    of_vocabulary = {
        id(parameter)
        for module in (network.get_input_embeddings(), network.get_output_embeddings())
        for parameter in (module.parameters() if module is not None else ())
    }
    source, fresh = dict(found.named_parameters()), set()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            same = name in source and source[name].shape == parameter.shape and name not in missing
            if same and id(parameter) not in of_vocabulary:
                parameter.copy_(source[name])
            else:
                fresh.add(name)
    return network, fresh


# --- how it is trained -----------------------------------------------------------------------------------------------


class _MaskedLanguageModel(EncoderModel):
    """A masked language model of transformers with any fast tokenizer, for our trainer; nothing of it is shared."""

    def __init__(self, network: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.network = network
        self._tokenizer = tokenizer
        config = network.config
        longest = getattr(config, "max_position_embeddings", _WINDOW)
        self.window = min(int(getattr(config, "sequence_length", _WINDOW)), longest)
        rate = float(getattr(config, "mask_rate", _MASKED))
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=rate)
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def encode(self, samples: Samples) -> NDArray[np.int32]:
        """All texts in one array of token ids, int32 (tokens,), each between its tokenizer's own special tokens."""
        parts = [
            np.array(encoding.ids, dtype=np.int32)
            for start in range(0, len(samples), 1000)
            for encoding in self._tokenizer.backend_tokenizer.encode_batch_fast(list(samples[start : start + 1000]))
        ]
        return np.concatenate(parts)

    def batch(self, encoded: NDArray[np.int32], size: int, generator: torch.Generator) -> Batch:
        """Random windows, masked as BERT's were (Devlin et al. 2019, section 3.1) at the rate of the training."""
        length = min(self.window, len(encoded))
        starts = torch.randint(len(encoded) - length + 1, (size, 1), generator=generator)
        ids = torch.from_numpy(encoded[(starts + torch.arange(length)).numpy()].astype(np.int64))
        self._collator.generator = generator
        shown, labels = self._collator.torch_mask_tokens(ids, torch.isin(ids, self._special))
        return {"input_ids": shown, "labels": labels}

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy in nats, mean over the masked positions; 0 where there is none."""
        device = self.network.device
        labels = batch["labels"].to(device)
        logits = self.network(input_ids=batch["input_ids"].to(device)).logits
        masked = labels >= 0
        return cross_entropy(logits[masked], labels[masked], reduction="sum") / masked.sum().clamp(min=1)

    def features(self, samples: Samples) -> Tensor:
        raise NotProbed("this model is trained here, and not probed")

    def export(self, directory: Path) -> None:
        hugging_face.save(self.network, directory)


def _fitted(
    model: _MaskedLanguageModel,
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
        return _until_no_better(trainer, held_out, best, steps, lambda done: progress(name, done, steps))

    before = masked_loss(model, held_out, batches=_LOOKED_AT)
    # an export with its own vocabulary and head lacks nothing
    frozen, frozen_steps = stage("frozen", before, budget.frozen_steps if fresh else 0, {f"network.{n}" for n in fresh})
    free, free_steps = stage("free", frozen, budget.steps, None)
    return (before, frozen, free), (frozen_steps, free_steps)


def _until_no_better(
    trainer: Trainer, held_out: Any, best: float, steps: int, after: Callable[[int], None]
) -> tuple[float, int]:
    """Train until the held-out loss has not fallen for a while; the model is left as it was at its best."""
    model = trainer.model
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    worse, every = 0, max(_RARELY, steps // _LOOKS)
    for step in range(1, steps + 1):
        trainer.progress = (step - 1) / steps
        trainer.step()
        after(step)
        if step % every and step != steps:
            continue
        loss = masked_loss(model, held_out, batches=_LOOKED_AT)
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
    card = (
        f"{cards.front_matter('text', whole=True)}{cards.TITLE}{_name(encoder)} with private parts of its reader's\n\n"
        f"A `{config.model_type}` whose vocabulary has {len(found.tokenizer):,} entries. What the shared encoder came "
        f"without was fitted to texts of the reader's own in {found.frozen_steps} steps, and all of it in "
        f"{found.free_steps} more.\n\n"
        f"{cards.loading('text', whole=True)}"
        "## Evaluation\n\n"
        + cards.table(
            ("masked-token loss on held-out texts, nats", "before", "trunk frozen", "all free"),
            [("", *(f"{loss:.3f}" for loss in (found.before, found.after_frozen, found.after_free)))],
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
