"""The masked language models of transformers that the type `text` trains: how each is made, and where its parts are.

What they have in common: token embeddings, blocks of the same width, a head, and a decoder that is tied to the
embeddings and has a bias of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from common.encoders.settings import LARGEST
from common.errors import UserError

#: Sizes of a small model, where nothing is said.
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@dataclass(frozen=True)
class Kind:
    """One `model_type`: what lies between the last hidden states and the logits, what differs from its own defaults,
    and positions that it cannot use for tokens (RoBERTa counts them from behind the padding's id)."""

    score: Callable[[Any, Tensor], Tensor]
    small: Mapping[str, Any]
    lost_positions: int = 0


def _distilbert(network: Any, hidden: Tensor) -> Tensor:
    return cast(
        Tensor,
        network.vocab_projector(network.vocab_layer_norm(network.activation(network.vocab_transform(hidden)))),
    )


KINDS: dict[str, Kind] = {
    "modernbert": Kind(lambda network, hidden: network.decoder(network.head(hidden)), {}),
    "bert": Kind(lambda network, hidden: network.cls(hidden), _SMALL),
    "roberta": Kind(lambda network, hidden: network.lm_head(hidden), _SMALL, 2),
    "xlm-roberta": Kind(lambda network, hidden: network.lm_head(hidden), _SMALL, 2),
    "distilbert": Kind(_distilbert, {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}),
    "electra": Kind(
        lambda network, hidden: network.generator_lm_head(network.generator_predictions(hidden)),
        {**_SMALL, "embedding_size": 64},
    ),
    "deberta-v2": Kind(lambda network, hidden: network.cls(hidden), {**_SMALL, "legacy": True}),
}

#: No model is made that has more: 32 GiB in float32. Whoever asks for one must not fill the memory first.
MOST_PARAMETERS = 1 << 33

#: The ids of a model whose vocabulary is not known: they say nothing about its parameters.
NO_TOKENS: dict[str, int | None] = {"pad": 0, "separator": None, "classifier": None}

#: Of a configuration, what says nothing about the parameters, or is set by the type `text` itself.
_NOT_SET = ("vocab_size", "tie_word_embeddings", "architectures", "problem_type", "transformers_version", "dtype")


def model_settings(model_type: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of another model than ModernBERT, by its configuration's own names: a small model with `given` over
    it. Raises UserError for a key that the model does not have, and for a value of another kind than its default.
    """
    kind = KINDS[model_type]
    config = AutoConfig.for_model(model_type)
    known = {**config.to_dict(), **{alias: getattr(config, name) for alias, name in config.attribute_map.items()}}
    names = dict(config.attribute_map)
    chosen = dict(kind.small)
    for key, value in given.items():
        if key not in known or key in _NOT_SET or key.startswith("_"):
            from common.config import suggestion

            raise UserError(
                f"architecture of type text, model_type {model_type}: there is no setting {key!r}; "
                f"{suggestion(key, [name for name in known if name not in _NOT_SET])}"
            )
        if problem := _misfit(value, known[key]):
            raise UserError(f"architecture of type text, model_type {model_type}: {key}: {problem}")
        chosen[names.get(key, key)] = value
    return chosen


def _misfit(value: Any, default: Any) -> str:
    """Why a value cannot stand where `default` does; empty if it can."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "input should be true or false"
    if isinstance(default, int):
        fits = type(value) is int and 0 <= value <= LARGEST
        return "" if fits else f"input should be a whole number from 0 to {LARGEST:,}"
    if isinstance(default, float):
        fits = type(value) in (int, float) and abs(value) <= LARGEST
        return "" if fits else "input should be a finite number"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "input should be a word"
    return "" if value is None or isinstance(value, bool | int | float | str | list) else "input should be plain"


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a model's configuration, as `model_settings` takes them: its sizes, and what differs from its own
    defaults."""
    default = type(config)().to_dict()
    small = KINDS[config.model_type].small
    plain = config.to_dict()
    return {
        key: plain[key]
        for key in default
        if key in plain
        and key not in _NOT_SET
        and not key.startswith("_")
        and not key.endswith("_token_id")
        and (key in small or plain[key] != default[key])
    }


def network_of(model_type: str, settings: Mapping[str, Any], entries: int, tokens: Mapping[str, int | None]) -> Any:
    """A freshly initialised masked language model of `entries` tokens, whose decoder is tied to its embeddings.
    `tokens`: the ids of padding, separator and classifier. Raises UserError if the sizes do not go together.
    """
    return _made(AutoModelForMaskedLM, model_type, settings, entries, tokens)


def bare(model_type: str, settings: Mapping[str, Any]) -> Any:
    """A freshly initialised encoder without a head, whose vocabulary is one entry. Raises UserError as `network_of`."""
    return _made(AutoModel, model_type, settings, 1, NO_TOKENS)


def _made(
    factory: Any, model_type: str, settings: Mapping[str, Any], entries: int, tokens: Mapping[str, int | None]
) -> Any:
    ids = {
        "pad_token_id": tokens["pad"],
        "sep_token_id": tokens["separator"],
        "cls_token_id": tokens["classifier"],
        "bos_token_id": tokens["classifier"],
        "eos_token_id": tokens["separator"] if tokens["classifier"] is not None else None,
    }
    pooling = {"classifier_pooling": "mean"} if model_type == "modernbert" else {}
    try:
        config = AutoConfig.for_model(
            model_type, **{**settings, "vocab_size": entries, "tie_word_embeddings": True, **ids, **pooling}
        )
        with torch.device("meta"):  # its sizes, without a number of it in memory
            size = sum(each.numel() for each in factory.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"it would have {size:,} parameters, and at most {MOST_PARAMETERS:,} are made here")
        return factory.from_config(config, attn_implementation=_attention(model_type))
    except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError, MemoryError) as error:
        words = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"a {model_type} with these settings cannot be made: {words}") from None


def _attention(model_type: str) -> str:
    return "eager" if model_type == "deberta-v2" else "sdpa"


def score(network: Any, hidden: Tensor) -> Tensor:
    """Logits (n, entries) of last hidden states (n, hidden_size)."""
    return KINDS[network.config.model_type].score(network, hidden)


def blocks(network: Any) -> nn.ModuleList:
    """The model's blocks, in order."""
    layers = network.config.num_hidden_layers
    for module in network.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise AssertionError(f"no list of {layers} blocks in a {network.config.model_type}")


def most_tokens(network: Any) -> int:
    """Tokens of the longest text that the model reads."""
    lost = KINDS[network.config.model_type].lost_positions
    return int(network.config.max_position_embeddings) - lost


def embeddings(network: Any) -> nn.Embedding:
    """The token embeddings, (entries, width)."""
    return cast(nn.Embedding, network.get_input_embeddings())


def decoder(network: Any) -> nn.Linear:
    """The layer that gives the logits: its weight is that of the embeddings, its bias (entries,) is its own."""
    return cast(nn.Linear, network.get_output_embeddings())


def named_trunk(network: Any) -> set[str]:
    """The names of the bare encoder's parameters within its masked language model."""
    inside = {id(parameter) for parameter in network.base_model.parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in inside}


def everything(network: Any) -> dict[str, nn.Parameter]:
    """All parameters of a masked language model but the bias of its decoder, by its own names after tying."""
    bias = decoder(network).bias
    return {name: parameter for name, parameter in network.named_parameters() if parameter is not bias}


def trunk(base: Any) -> dict[str, nn.Parameter]:
    """The parameters of a bare encoder, by its own names, but for its token embeddings."""
    tokens = embeddings(base).weight
    return {name: parameter for name, parameter in base.named_parameters() if parameter is not tokens}
