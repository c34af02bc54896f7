"""Encoder type `text`: masked language modelling on transformers' ModernBERT.

Shared is the trunk: the norm in front of layer 0, all layers, the final norm. Rotary positions leave no position table
to share. Private are the vocabulary, the token embeddings (tied to the decoder) and the prediction head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel, PreTrainedTokenizerFast

from common.encoders import hugging_face, vocabulary
from common.encoders.base import Architecture, Assets, Batch, EncoderModel, PrivateSpec, Samples
from common.encoders.settings import checked
from common.encoders.text_settings import TextArchitecture, TextPrivate
from common.errors import UserError

#: What is not predicted, in `labels`; the number that cross entropy skips by default.
_NOT_MASKED = -100
_EMBEDDINGS = "embeddings.tok_embeddings.weight"
#: Windows in one forward pass of `features`.
_FEATURE_BATCH = 256


class TextEncoderType:
    """Texts (str) and a ModernBERT trunk."""

    name = "text"

    def architecture(self, overrides: Mapping[str, Any]) -> Architecture:
        """The architecture with defaults filled in.

        Raises UserError for a wrong key (suggesting the right one), a wrong value, or sizes that do not go together.
        """
        return checked(TextArchitecture, "architecture of type text", overrides).model_dump()

    def architecture_of(self, directory: Path) -> tuple[Architecture, dict[str, Tensor]]:
        """Architecture and shared tensors of our own export or of any ModernBERT directory.

        Raises UserError if it is none, or of a variant that this type cannot build.
        """
        hugging_face.read_config(directory, "modernbert")
        model, missing = hugging_face.load_base_model(directory)
        config = cast(Any, model).config
        architecture = {key: getattr(config, key) for key in TextArchitecture.model_fields if hasattr(config, key)}
        architecture["global_attn_every_n_layers"] = _global_every(config.layer_types, directory)
        for key, layer in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
            rope = config.rope_parameters[layer]
            if rope["rope_type"] != "default":
                raise UserError(f"{directory}: rotary positions of type {rope['rope_type']!r} are not supported")
            architecture[key] = rope["rope_theta"]
        shared = _shared(model)
        hugging_face.require(directory, shared, missing)
        return self.architecture(architecture), {name: tensor.detach() for name, tensor in shared.items()}

    def assets(self, architecture: Architecture, sources: Mapping[str, str]) -> tuple[Architecture, dict[str, bytes]]:
        """None: the architecture says it all."""
        return architecture, {}

    def initial(self, architecture: Architecture, seed: int) -> dict[str, Tensor]:
        """The trunk's float32 tensors at version 0, in layout order; the same for the same seed."""
        with hugging_face.seeded(seed):
            model = ModernBertModel(_config(architecture, entries=1))
        return {name: parameter.detach() for name, parameter in _shared(model).items()}

    def fit_private(
        self, samples: Samples, architecture: Architecture, settings: Mapping[str, Any], assets: Assets
    ) -> PrivateSpec:
        """Train the vocabulary on the owner's texts. Settings: `TextPrivate`; raises UserError for a wrong one."""
        own = checked(TextPrivate, "private settings of type text", settings)
        return {
            "tokenizer": vocabulary.train_vocabulary(samples, own.entries),
            "feature_tokens": own.feature_tokens,
        }

    def build(self, architecture: Architecture, private: PrivateSpec, seed: int) -> TextModel:
        """The whole model, freshly initialised from `seed`."""
        with hugging_face.seeded(seed):
            return TextModel(architecture, private)

    def export_shared(
        self,
        directory: Path,
        architecture: Architecture,
        tensors: Mapping[str, Tensor],
        card: str,
        assets: Assets,
    ) -> None:
        """Write the trunk as a ModernBertModel whose vocabulary is one unused entry: the reader's to bring."""
        with hugging_face.seeded(0):  # the placeholders too: the same encoder is the same file
            model = ModernBertModel(_config(architecture, entries=1))
        hugging_face.fill(_shared(model), tensors)
        hugging_face.save(model, directory)
        (directory / "README.md").write_text(card, "utf-8")


class TextModel(EncoderModel):
    """Vocabulary and embeddings + trunk + prediction head. `network` is the ModernBertForMaskedLM."""

    def __init__(self, architecture: Architecture, private: PrivateSpec) -> None:
        super().__init__()
        self.tokenizer = Tokenizer.from_str(private["tokenizer"])
        self.entries: int = self.tokenizer.get_vocab_size()
        self.window: int = architecture["sequence_length"]
        self.mask_rate: float = architecture["mask_rate"]
        self.feature_tokens: int = private["feature_tokens"]
        self.network = ModernBertForMaskedLM(_config(architecture, self.entries))

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The trunk's parameters, named as in a ModernBertModel."""
        return _shared(self.network.model)

    def encode(self, samples: Samples) -> NDArray[Any]:
        """All texts in one array of token ids, shape (tokens,), uint16 where that suffices; `[SEP]` ends each text."""
        dtype = np.uint16 if self.entries <= 1 << 16 else np.int32
        parts = [ids.astype(dtype) for ids in vocabulary.tokenise(self.tokenizer, samples)]
        if not parts:
            raise UserError("no text to encode: the corpus is empty")
        return np.concatenate(parts)

    def batch(self, encoded: NDArray[Any], size: int, generator: torch.Generator) -> Batch:
        """Random windows with masked tokens: `input_ids` and `labels` (-100: not predicted), both int64 (size, window).

        A corpus shorter than a window gives windows of its own length. Of the positions to predict, 80 % show
        `[MASK]`, 10 % a random entry, 10 % themselves (Devlin et al. 2019, section 3.1); special tokens are never
        among them. Every window has the same number of candidates, which makes the loss less noisy than a coin per
        token.
        """
        length = min(self.window, len(encoded))
        starts = torch.randint(len(encoded) - length + 1, (size, 1), generator=generator)
        index = (starts + torch.arange(length)).numpy()
        ids = torch.from_numpy(encoded[index].astype(np.int64))
        special = ids < len(vocabulary.SPECIAL)

        order = torch.rand(ids.shape, generator=generator).masked_fill_(special, 1.0).argsort(dim=1, stable=True)
        masked = torch.zeros_like(special).scatter_(1, order[:, : max(1, round(self.mask_rate * length))], True)
        masked &= ~special
        fate = torch.rand(ids.shape, generator=generator)
        others = torch.randint(len(vocabulary.SPECIAL), self.entries, ids.shape, generator=generator)
        shown = ids.masked_fill(masked & (fate < 0.8), vocabulary.MASK_ID)
        shown = torch.where(masked & (fate >= 0.9), others, shown)
        return {"input_ids": shown, "labels": ids.masked_fill(~masked, _NOT_MASKED)}

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy in nats, mean over the masked positions; 0 if a batch has none (nothing but special tokens).

        The head runs on the masked positions alone: at a vocabulary of 1,024 that saves a third of a step.
        """
        device = self.network.device
        labels = batch["labels"].to(device)
        hidden = self.network.model(input_ids=batch["input_ids"].to(device)).last_hidden_state
        masked = labels != _NOT_MASKED
        logits = self.network.decoder(self.network.head(hidden[masked]))
        total = cross_entropy(logits, labels[masked], reduction="sum")
        return total / masked.sum().clamp(min=1)

    @torch.no_grad()
    def features(self, samples: Samples) -> Tensor:
        """Mean over a text's tokens and over the trunk's layers, its input included, float32 (n, hidden_size).

        The mean over layers probed a point better than the last layer alone, over five corpora and one seed; joining
        the layers probed better still, a random encoder's too, at several times the width.
        A text is read as training reads it, in windows of at most `sequence_length` tokens (equal ones, so that none
        is left with a word or two), up to `feature_tokens` tokens in all. Windows of one length go through together:
        there is no padding that could change a feature.
        """
        windows: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
        counts = torch.zeros(len(samples), 1)
        for row, ids in enumerate(vocabulary.tokenise(self.tokenizer, samples)):
            seen = ids[: self.feature_tokens].astype(np.int64)
            counts[row] = len(seen)
            for window in np.array_split(seen, math.ceil(len(seen) / self.window)):
                windows.setdefault(len(window), []).append((row, window))

        sums = torch.zeros(len(samples), self.network.config.hidden_size)
        for same_length in windows.values():
            for start in range(0, len(same_length), _FEATURE_BATCH):
                together = same_length[start : start + _FEATURE_BATCH]
                tokens = torch.from_numpy(np.stack([window for _, window in together])).to(self.network.device)
                layers = self.network.model(input_ids=tokens, output_hidden_states=True).hidden_states
                hidden = torch.stack(layers).mean(dim=0)
                sums.index_add_(0, torch.tensor([row for row, _ in together]), hidden.sum(dim=1).float().cpu())
        return sums / counts

    def export(self, directory: Path) -> None:
        """Write model and tokenizer for `AutoModelForMaskedLM` and `AutoTokenizer`."""
        hugging_face.save(self.network, directory)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer,
            pad_token=vocabulary.PAD,
            mask_token=vocabulary.MASK,
            sep_token=vocabulary.SEPARATOR,
            model_max_length=self.network.config.max_position_embeddings,
        )
        tokenizer.save_pretrained(directory)


def _config(architecture: Architecture, entries: int) -> ModernBertConfig:
    """`entries` is the vocabulary's size; the token ids are those of common/encoders/vocabulary.py."""
    return ModernBertConfig(
        **architecture,
        vocab_size=entries,
        pad_token_id=vocabulary.PAD_ID,
        sep_token_id=vocabulary.SEPARATOR_ID if entries > 1 else None,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        classifier_pooling="mean",
        attn_implementation="sdpa",
    )


def _shared(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a ModernBertModel that travel: all but its token embeddings."""
    return {name: parameter for name, parameter in model.named_parameters() if name != _EMBEDDINGS}


def _global_every(layer_types: list[str], directory: Path) -> int:
    """The n for which every n-th layer is global, the first included."""
    for n in range(1, len(layer_types) + 1):
        if all((kind == "full_attention") == (i % n == 0) for i, kind in enumerate(layer_types)):
            return n
    raise UserError(f"{directory}: its order of local and global layers has no period; only a regular one is supported")
