"""A masked language model around an exported encoder: what the export holds of it, and what is made afresh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from common.encoders import hugging_face, masked_lm, vocabulary
from common.encoders.base import Batch, EncoderModel, Samples
from common.encoders.vocabulary import OWN_TOKENS, Vocabulary
from common.errors import NotProbed, UserError

#: Tokens of a window and share of them to predict, where config.json has no such numbers of the training.
_WINDOW = 128
_MASKED = 0.15


def check_encoder(directory: Path) -> None:
    """Raises UserError for a directory that cannot be an export, before anything slow is begun."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is no exported encoder: it has no config.json; name the directory of an export")


def tokenizer_for(
    directory: Path,
    given: PreTrainedTokenizerFast | Path | str | None,
    texts: Sequence[str],
    entries: int,
    *,
    own: bool,
) -> tuple[PreTrainedTokenizerFast, bool]:
    """The tokenizer, and whether it is another than the export's: `given`, else the export's unless an `own` one is
    wanted, else one of at most `entries` entries trained on `texts`. Raises UserError for one without a mask token."""
    kept = given is None and not own and (directory / "tokenizer.json").is_file()
    if kept:
        found = _opened(directory)
    elif given is not None:
        found = _opened(Path(given)) if isinstance(given, Path | str) else given
    else:
        if entries < vocabulary.SMALLEST:
            raise UserError(f"a vocabulary has at least {vocabulary.SMALLEST} entries, not {entries}; ask for more")
        return fast_tokenizer(vocabulary.train_vocabulary(texts, entries)), True
    if found.mask_token_id is None:
        raise UserError("the tokenizer has no mask token, which a masked language model needs; give another one")
    return found, not kept


def _opened(directory: Path) -> PreTrainedTokenizerFast:
    try:
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory} holds no tokenizer that opens ({reason}); give one with tokenizer.json") from None
    if not isinstance(found, PreTrainedTokenizerFast) and not hasattr(found, "backend_tokenizer"):
        raise UserError(f"{directory} holds a slow tokenizer; give one with tokenizer.json")
    return found


def fast_tokenizer(serialised: str) -> PreTrainedTokenizerFast:
    """A vocabulary of `common.encoders.vocabulary` for transformers, not cut to any length."""
    return Vocabulary(serialised, OWN_TOKENS).for_transformers(VERY_LARGE_INTEGER)


def around(directory: Path, tokenizer: PreTrainedTokenizerFast, is_new: bool) -> tuple[Any, set[str]]:
    """The whole model, and the names of its parameters that were not in the export, or belong to its vocabulary where
    the tokenizer `is_new`. Raises UserError for a directory that is no masked language model, or lacks a part of it."""
    try:
        with hugging_face.quiet():
            found, report = AutoModelForMaskedLM.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory} does not open as a masked language model ({reason}); name another") from None
    missing = set(report["missing_keys"])
    inner = found.base_model.named_parameters(prefix=found.base_model_prefix)
    words = found.get_input_embeddings().weight
    lost = sorted(name for name, parameter in inner if name in missing and parameter is not words)
    if lost:
        raise UserError(
            f"{directory} lacks {len(lost)} tensors of the encoder, {lost[0]!r} the first; export or download it again"
        )
    if not is_new and len(tokenizer) > len(words):
        raise UserError(
            f"{directory} has {len(words)} embeddings for a vocabulary of {len(tokenizer)}; train one of your own"
        )
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


class MaskedLanguageModel(EncoderModel):
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
        """Cross entropy in nats, mean over the masked positions; 0 where there is none.

        Where it is known what lies behind the last hidden states, that runs on the masked positions alone: with the
        30,522 entries of BERT's vocabulary it would cost more than all the rest.
        """
        network = self.network
        labels, ids = (batch[name].to(network.device) for name in ("labels", "input_ids"))
        masked = labels >= 0
        if network.config.model_type in masked_lm.KINDS and getattr(network.config, "legacy", True):
            logits = masked_lm.score(network, network.base_model(input_ids=ids).last_hidden_state[masked])
        else:
            logits = network(input_ids=ids).logits[masked]
        return cross_entropy(logits, labels[masked], reduction="sum") / masked.sum().clamp(min=1)

    def features(self, samples: Samples) -> Tensor:
        raise NotProbed("this model is trained here, and not probed")

    def export(self, directory: Path) -> None:
        hugging_face.save(self.network, directory)
