"""The whole model of a node for the type `text`: a masked language model with the node's private parts in it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.encoders import frozen_base, hugging_face, lora, masked_lm
from common.encoders.adapters import LowRank, Switch, correct, within
from common.encoders.base import Architecture, Batch, EncoderModel, PrivateSpec, Samples
from common.encoders.vocabulary import OWN_TOKENS, Vocabulary
from common.encoders.windows import NOT_MASKED, in_order
from common.errors import UserError

#: In a batch that is trained without the private parts: 0.
WITH_PRIVATE = "with_private"
#: In a batch that was prepared: of its positions in order, int64 (n,), which are masked; and what stands for a
#: WITH_PRIVATE of 0.
POSITIONS = "positions"
WITHOUT_PRIVATE = "without_private"
#: Windows in one forward pass of `pooled`.
_FEATURE_BATCH = 256
#: What of an architecture is not a setting of the model's configuration.
_NOT_OF_THE_MODEL = ("model_type", "tokens", "vocab_size")


class TextModel(EncoderModel):
    """`network` is the masked language model of transformers.

    With a shared vocabulary all of it is shared but the decoder's bias, and the private parts are low-rank corrections:
    of the embeddings and within the blocks (the private encoder), and of the decoder, with its bias (the private
    decoder). With shared = "lora" what is shared is low-rank too, and the network under it a base that stands still.
    Otherwise the trunk is shared, and embeddings and head are private.
    """

    def __init__(self, architecture: Architecture, private: PrivateSpec) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(private["tokenizer"], architecture.get("tokens", OWN_TOKENS))
        self.tokenizer = self.vocabulary.tokenizer
        self.entries: int = architecture.get("vocab_size", self.vocabulary.entries)
        self.window: int = architecture["sequence_length"]
        self.mask_rate: float = architecture["mask_rate"]
        self.feature_tokens: int = private["feature_tokens"]
        self.network = network_of(architecture, self.entries, self.vocabulary.ids)
        self._everything = architecture.get("shared", "trunk") in ("all", "lora")
        self.lora: lora.Corrections | None = None
        if architecture.get("shared") == "lora":
            frozen_base.put_into(self.network, frozen_base.of_spec(private, architecture))
            self.lora = lora.Corrections(self.network, architecture)
        self._rest: float = private.get("adapter_rest", 0.0)
        self._switch = Switch()
        self._corrected: dict[str, nn.Module] = {}
        self.adapters = nn.ModuleDict()
        if self._everything and private["adapter_rank"]:
            self._adapt(private["adapter_rank"])

    def _adapt(self, rank: int) -> None:
        """Private corrections of the embeddings, within each block, and of the decoder."""
        network = self.network
        places: dict[str, nn.Module] = {"embeddings": masked_lm.embeddings(network)}
        for index, block in enumerate(masked_lm.blocks(network)):
            found = within(block, network.config.hidden_size)
            # a module's name may not have a dot in it
            places |= {f"block{index}_{name.replace('.', '_')}": module for name, module in found.items()}
        places["decoder"] = masked_lm.decoder(network)
        for name, module in places.items():
            rows, columns = cast(Tensor, module.weight).shape
            self.adapters[name] = correction = LowRank(rows, columns, rank)
            correct(module, correction, self._switch)
        self._corrected = places

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Named as in the masked language model, or with the trunk alone as in its bare encoder."""
        network = self.network
        if self.lora is not None:
            return self.lora.shared_parameters()
        if not self._everything:
            return masked_lm.trunk(network.base_model)
        return masked_lm.everything(network)

    def encode(self, samples: Samples) -> NDArray[Any]:
        """All texts in one array of token ids, shape (tokens,), uint16 where that suffices; the separator ends each."""
        dtype = np.uint16 if self.entries <= 1 << 16 else np.int32
        parts = [ids.astype(dtype) for ids in self.vocabulary.tokenise(samples)]
        if not parts:
            raise UserError("no text to encode: the corpus is empty")
        return np.concatenate(parts)

    def batch(self, encoded: NDArray[Any], size: int, generator: torch.Generator) -> Batch:
        """Random windows with masked tokens: `input_ids` and `labels` (-100: not predicted), both int64 (size, window).

        A corpus shorter than a window gives windows of its own length. Of the positions to predict, 80 % show the mask
        token, 10 % a random entry, 10 % themselves (Devlin et al. 2019, section 3.1); special tokens are never among
        them. Every window has the same number of candidates, which makes the loss less noisy than a coin per token.
        A vocabulary with a classifier frames each window: classifier, tokens, separator.
        """
        frame = self.vocabulary.ids["classifier"]
        length = min(self.span, len(encoded))
        starts = torch.randint(len(encoded) - length + 1, (size, 1), generator=generator)
        index = (starts + torch.arange(length)).numpy()
        ids = torch.from_numpy(encoded[index].astype(np.int64))
        if frame is not None:
            ends = torch.full((size, 1), self.vocabulary.separator_id)
            ids = torch.cat([torch.full_like(ends, frame), ids, ends], dim=1)
        special = torch.from_numpy(self.vocabulary.special)[ids]

        order = torch.rand(ids.shape, generator=generator).masked_fill_(special, 1.0).argsort(dim=1, stable=True)
        masked = torch.zeros_like(special).scatter_(1, order[:, : max(1, round(self.mask_rate * length))], True)
        masked &= ~special
        fate = torch.rand(ids.shape, generator=generator)
        ordinary = torch.from_numpy(self.vocabulary.ordinary)
        others = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
        shown = ids.masked_fill(masked & (fate < 0.8), self.vocabulary.mask_id)
        shown = torch.where(masked & (fate >= 0.9), others, shown)
        batch = {"input_ids": shown, "labels": ids.masked_fill(~masked, NOT_MASKED)}
        if self.training and len(self.adapters) and self._rest and self._shared_moves:
            batch[WITH_PRIVATE] = torch.rand((), generator=generator) >= self._rest
        return batch

    def prepared(self, batch: Batch) -> Batch:
        """With the masked positions: to find them on a GPU is to wait for it. And whether the private parts take part
        is said by what is there, not by a number."""
        found = {name: tensor for name, tensor in batch.items() if name != WITH_PRIVATE}
        found[POSITIONS] = (batch["labels"] != NOT_MASKED).flatten().nonzero().flatten()
        if not batch.get(WITH_PRIVATE, True):
            found[WITHOUT_PRIVATE] = torch.zeros(1)
        return found

    def counted(self, batch: Batch) -> int:
        """The masked positions."""
        return int((batch["labels"] != NOT_MASKED).sum())

    @property
    def _shared_moves(self) -> bool:
        """Where the shared parameters stand still, a batch without the private ones would teach nobody anything."""
        return any(parameter.requires_grad for parameter in self.shared_parameters().values())

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy in nats, mean over the masked positions; 0 if a batch has none (nothing but special tokens)."""
        logits, wanted = self._scored(batch)
        return cross_entropy(logits, wanted, reduction="sum") / max(1, len(wanted))

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of the masked positions alone, and what they should be, both in the order of positions.

        The head runs on no others: at a vocabulary of 1,024 that saves a third of a step.
        """
        if POSITIONS not in batch:
            batch = self.prepared(batch)
        device = self.network.device
        positions = batch[POSITIONS].to(device)
        self._switch.on = WITHOUT_PRIVATE not in batch
        try:
            hidden = self.network.base_model(input_ids=batch["input_ids"].to(device)).last_hidden_state
            logits = masked_lm.score(self.network, hidden.flatten(0, 1)[positions])
        finally:
            plain, self._switch.on = not self._switch.on, True
        if plain:
            # as the export has it: without a bias, or with the base's
            bias = masked_lm.decoder(self.network).bias
            logits = logits - (bias if self.lora is None else bias - self.lora.bias)
        return logits, batch["labels"].to(device).flatten()[positions]

    @property
    def lead(self) -> int:
        """Tokens of a window before those of the text: 1 with a classifier, which has a separator behind them too."""
        return 0 if self.vocabulary.ids["classifier"] is None else 1

    @property
    def span(self) -> int:
        """Tokens of the text in a window, its special tokens at the ends left out."""
        return self.window - 2 * self.lead

    @torch.no_grad()
    def held_out_losses(self, samples: Samples, generator: torch.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """In nats; every token is in one window, and of what is masked in it each text has its own positions."""
        sums, counts = np.zeros(len(samples)), np.zeros(len(samples))
        for batch, owners in in_order(self, samples, generator):
            logits, wanted = self._scored(batch)
            losses = cross_entropy(logits, wanted, reduction="none").double().cpu().numpy()
            texts = owners[batch["labels"] != NOT_MASKED].numpy()
            sums += np.bincount(texts, losses, len(samples))
            counts += np.bincount(texts, minlength=len(samples))
        return sums, counts

    @torch.no_grad()
    def features(self, samples: Samples) -> Tensor:
        """What `pooled` gives, on the CPU."""
        return self.pooled(samples).cpu()

    def pooled(self, samples: Samples) -> Tensor:
        """Mean over a text's tokens and over the trunk's layers, its input included, float32 (n, hidden_size).

        The mean over layers probed a point better than the last layer alone, over five corpora and one seed; joining
        the layers probed better still, a random encoder's too, at several times the width.
        A text is read as training reads it, in windows of at most `sequence_length` tokens (equal ones, so that none
        is left with a word or two), up to `feature_tokens` tokens in all. Windows of one length go through together:
        there is no padding that could change a feature.
        """
        windows: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
        device = self.network.device
        counts = torch.zeros(len(samples), 1)
        for row, ids in enumerate(self.vocabulary.tokenise(samples)):
            seen = ids[: self.feature_tokens].astype(np.int64)
            counts[row] = len(seen)
            for window in np.array_split(seen, math.ceil(len(seen) / self.window)):
                windows.setdefault(len(window), []).append((row, window))

        sums = torch.zeros(len(samples), self.network.config.hidden_size, device=device)
        for same_length in windows.values():
            for start in range(0, len(same_length), _FEATURE_BATCH):
                together = same_length[start : start + _FEATURE_BATCH]
                tokens = torch.from_numpy(np.stack([window for _, window in together])).to(device)
                layers = self.network.base_model(input_ids=tokens, output_hidden_states=True).hidden_states
                hidden = torch.stack(layers).mean(dim=0)
                rows = torch.tensor([row for row, _ in together], device=device)
                sums = sums.index_add(0, rows, hidden.sum(dim=1).float())
        return sums / counts.to(device)

    def export(self, directory: Path) -> None:
        """Write model and tokenizer for `AutoModelForMaskedLM` and `AutoTokenizer`, corrections merged into the
        matrices: a plain model, whose decoder is no longer tied to its embeddings if it has any."""
        hugging_face.save(self._merged(), directory)
        tokenizer = self.vocabulary.for_transformers(masked_lm.most_tokens(self.network))
        tokenizer.save_pretrained(directory)

    @torch.no_grad()
    def _merged(self) -> Any:
        if not len(self.adapters) and self.lora is None:
            return self.network
        network = copy.deepcopy(self.network)
        if self.lora is not None:
            self.lora.merge_into(network)
        if not len(self.adapters):
            return network
        layer = masked_lm.decoder(network)
        # its bias too: some models keep it beside the decoder, and no longer tie it to that either
        layer.weight, layer.bias = nn.Parameter(layer.weight.clone()), nn.Parameter(layer.bias.clone())
        network.config.tie_word_embeddings = False
        names = {id(module): name for name, module in self.network.named_modules()}
        for name, module in self._corrected.items():
            matrix = cast(LowRank, self.adapters[name]).matrix()
            cast(nn.Parameter, network.get_submodule(names[id(module)]).weight).add_(matrix)
        return network


def network_of(architecture: Architecture, entries: int, ids: dict[str, int | None]) -> Any:
    """The masked language model of an architecture, freshly initialised. Its configuration keeps the task's settings
    too, so that an export says what it was trained for. Raises UserError for sizes that do not go together."""
    settings = settings_for_model(architecture)
    return masked_lm.network_of(architecture.get("model_type", "modernbert"), settings, entries, ids)


def settings_for_model(architecture: Architecture) -> dict[str, Any]:
    """What of an architecture its model's configuration keeps."""
    whole = lora.plain(architecture) if architecture.get("shared") == "lora" else architecture
    return {key: value for key, value in whole.items() if key not in _NOT_OF_THE_MODEL}
