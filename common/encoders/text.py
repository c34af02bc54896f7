"""Encoder type `text`: masked language modelling on the models of transformers, ModernBERT where none is named.

With a shared vocabulary (the default) one tokenizer travels with the instruction, and embeddings, trunk and head are
shared; private are low-rank corrections and the decoder's bias. With private vocabularies the trunk alone is shared.
With shared = "lora" the model is a base that is there already, and low-rank updates of its blocks are shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import structlog
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from common.encoders import frozen_base, hugging_face, lora, masked_lm, shared_vocabulary, vocabulary
from common.encoders.base import Architecture, Assets, PrivateSpec, Samples
from common.encoders.settings import checked, overridden
from common.encoders.text_model import TextModel, network_of, settings_for_model
from common.encoders.text_settings import TextArchitecture, TextPrivate, TextTask
from common.encoders.vocabulary import OWN_TOKENS, Vocabulary
from common.errors import UserError

log = structlog.get_logger()

_WHAT = "architecture of type text"
#: What who continues from a model may change: none of its parameters depends on it.
_FREE = ("sequence_length", "mask_rate")


class TextEncoderType:
    """Texts (str) and a masked language model."""

    name = "text"

    def architecture(self, overrides: Mapping[str, Any]) -> Architecture:
        """The architecture with defaults filled in.

        Raises UserError for a wrong key (suggesting the right one), a wrong value, or sizes that do not go together.
        """
        if overrides.get("shared") == "lora":
            found = checked(lora.LoraTask, _WHAT, overrides).model_dump()
            # the base says which it is; said here too, it is a claim to be checked
            return {key: value for key, value in found.items() if key != "model_type" or key in overrides}
        if overrides.get("model_type", "modernbert") == "modernbert":
            task: TextTask = checked(TextArchitecture, _WHAT, overrides)
            return {**task.model_dump(), "shared": task.travels}
        own = {key: value for key, value in overrides.items() if key in TextTask.model_fields}
        task = checked(TextTask, _WHAT, own)
        others = {key: value for key, value in overrides.items() if key not in own}
        settings = masked_lm.model_settings(task.model_type, others)
        found = {**task.model_dump(), "shared": task.travels, **settings}
        _check_length(found)
        return found

    def architecture_of(
        self, directory: Path, overrides: Mapping[str, Any] | None = None
    ) -> tuple[Architecture, dict[str, Tensor]]:
        """Architecture and shared tensors of our own export, or of a directory of a model that this type knows: all of
        a masked language model (a head that is missing begins anew), or the trunk of a bare encoder of ours. An export
        with the update of a base beside it gives that. Windows, masks and what travels may be others.

        Raises UserError if it is none, of a variant that this type cannot build, or not what `overrides` say.
        """
        plain = hugging_face.read_config(directory, *masked_lm.KINDS)
        wanted = overrides or {}
        update = lora.read_update(directory) if wanted.get("shared", "lora") == "lora" else None
        if update is not None:
            return overridden(directory, update[0], wanted, _FREE), update[1]
        if wanted.get("shared") == "lora":
            raise UserError(
                f'{directory} is no update of a base; to begin one, set encoder.base = "{directory}" and leave '
                "generation and source out"
            )
        whole = plain.get("shared") == "all" or ("vocabulary" not in plain and plain.get("vocab_size", 1) > 1)
        network, missing = hugging_face.load_model(directory, masked=whole)
        config = cast(Any, network).config
        settings = _settings_of(config, directory)
        task = {key: plain[key] for key in TextTask.model_fields if key in plain}
        task["shared"] = "all" if whole else "trunk"
        task.setdefault("vocabulary", "shared" if whole else "private")
        free = (*_FREE, "shared") if whole else _FREE
        architecture = self.architecture(overridden(directory, {**settings, **task}, wanted, free))
        if whole:
            architecture["vocab_size"] = config.vocab_size
        if architecture["shared"] == "all":
            shared = masked_lm.everything(network)
            missing -= set(shared) - set(masked_lm.named_trunk(network))
        else:
            shared = masked_lm.trunk(cast(Any, network).base_model)
            missing = {name.removeprefix(f"{cast(Any, network).base_model_prefix}.") for name in missing}
        hugging_face.require(directory, shared, missing)
        return architecture, {name: tensor.detach().clone() for name, tensor in shared.items()}

    def assets(self, architecture: Architecture, sources: Mapping[str, str]) -> tuple[Architecture, dict[str, bytes]]:
        """The shared vocabulary, from the sources `tokenizer` or `reference` (see `shared_vocabulary.make`), or `words`
        for an agreed one (see `shared_vocabulary.agreed`); none where each node has its own. The architecture gets
        `vocab_size` and `tokens`, its special tokens by what they are for. With shared = "lora" the base too, from the
        source `base`, if it travels.

        Raises WordsNeeded where an agreed one is to be made and there are none, UserError for a source that does not
        serve, and for a vocabulary that is larger than the model's embeddings.
        """
        base: dict[str, bytes] = {}
        whose = architecture.get("vocabulary", "private")
        if architecture.get("shared") == "lora":
            architecture, base = self._on_base(architecture, sources)
        elif "base" in sources:
            raise UserError('encoder.base is the base of an encoder with shared = "lora"; say so, or leave it out')
        if whose == "private":
            return architecture, {}
        make = shared_vocabulary.agreed if whose == "agreed" else shared_vocabulary.make
        found = make(sources, architecture["entries"])
        rows = architecture.get("vocab_size", found.entries)
        if rows < found.entries:
            raise UserError(
                f"the tokenizer has {found.entries:,} entries and the model's embeddings {rows:,} rows; name the "
                "model's own"
            )
        completed = {**architecture, "vocab_size": rows, "tokens": found.tokens}
        return completed, {shared_vocabulary.TOKENIZER: found.tokenizer.to_str().encode(), **base}

    def _on_base(self, architecture: Architecture, sources: Mapping[str, str]) -> tuple[Architecture, dict[str, bytes]]:
        """The architecture completed by what its base says, and the base as an asset if it travels."""
        if "base" not in sources:
            raise UserError(
                'shared = "lora" needs the model that is to be updated: name its directory with encoder.base, which '
                "also says how the model is built"
            )
        directory = Path(sources["base"])
        base = frozen_base.read(directory)
        model_type, digest = base.config.model_type, base.digest
        if architecture.get("model_type", model_type) != model_type:
            raise UserError(f"{directory} is a {model_type}, and model_type says {architecture['model_type']!r}")
        if "base_digest" in architecture:
            frozen_base.check_same(digest, architecture)
        task = {key: architecture[key] for key in TextTask.model_fields if key in architecture}
        told = {**_settings_of(base.config, directory), **task, "model_type": model_type, "shared": "all"}
        asset = base.asset() if architecture.get("lora_base") != "named" else None
        if asset is None and architecture.get("lora_base") == "travels":
            raise UserError(f'{directory} is too large to travel; leave lora_base out, or take lora_base = "named"')
        completed = {
            **self.architecture(told),
            **lora.settings_of(architecture).model_dump(),
            "shared": "lora",
            "lora_base": "named" if asset is None else "travels",
            "base_digest": digest,
            "vocab_size": base.config.vocab_size,
        }
        lora.initial(_shape_of(completed), completed)  # a rank that does not fit is said before anything is made
        return completed, {} if asset is None else {frozen_base.ASSET: asset}

    def initial(self, architecture: Architecture, seed: int) -> dict[str, Tensor]:
        """The shared float32 tensors at version 0, in layout order; the same for the same seed."""
        if architecture.get("shared") == "lora":
            return lora.initial(_shape_of(architecture), architecture)
        with hugging_face.seeded(seed):
            if architecture.get("shared", "trunk") == "all":
                shared = masked_lm.everything(network_of(architecture, architecture["vocab_size"], masked_lm.NO_TOKENS))
            else:
                base = _bare(architecture)
                shared = masked_lm.trunk(base)
        return {name: parameter.detach() for name, parameter in shared.items()}

    def fit_private(
        self, samples: Samples, architecture: Architecture, settings: Mapping[str, Any], assets: Assets
    ) -> PrivateSpec:
        """Train the vocabulary on the owner's texts, or take the shared one. Settings: `TextPrivate`.

        Raises UserError for a wrong setting, for a vocabulary that is not the architecture's, and if the owner does not
        let the rows of the embeddings travel.
        """
        own = checked(TextPrivate, "private settings of type text", settings)
        if architecture.get("vocabulary", "private") == "private":
            return {
                "tokenizer": vocabulary.train_vocabulary(samples, own.entries),
                "feature_tokens": own.feature_tokens,
            }
        words = assets.get(shared_vocabulary.TOKENIZER)
        if words is None:
            raise UserError(f"this encoder's vocabulary is shared, and its {shared_vocabulary.TOKENIZER} did not come")
        found = _read(words, architecture)
        if architecture["shared"] == "all":
            if not own.share_embeddings:
                raise UserError(
                    "this encoder shares its embeddings, and private.share_embeddings = false forbids it; ask for one "
                    'with shared = "trunk"'
                )
            log.info(
                "embeddings are shared: which of their rows move tells the master which tokens these texts use; forbid "
                "it with private.share_embeddings = false"
            )
        spec = {
            "tokenizer": found.tokenizer.to_str(),
            "feature_tokens": own.feature_tokens,
            "adapter_rank": own.adapter_rank,
            "adapter_rest": own.adapter_rest,
        }
        if architecture["shared"] == "lora":
            spec |= frozen_base.located(architecture, own.base, assets)
        return spec

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
        """Write the shared encoder: a masked language model with its tokenizer and a bias of zeros, or the bare trunk,
        whose vocabulary is one unused entry, the reader's to bring. The update of a base is merged into it, and lies
        beside it too; then the bias is the base's."""
        shared = architecture.get("shared", "trunk")
        if shared in ("all", "lora"):
            found = _read(assets[shared_vocabulary.TOKENIZER], architecture)
            with hugging_face.seeded(0):
                model = network_of(architecture, architecture["vocab_size"], found.ids)
            if shared == "all":
                hugging_face.fill(masked_lm.everything(model), tensors)
            else:
                frozen_base.put_into(model, frozen_base.at_hand(architecture, assets))
                lora.merge(model, architecture, tensors)
                directory.mkdir(parents=True, exist_ok=True)
                lora.save_update(directory, architecture, tensors)
            hugging_face.save(model, directory)
            found.for_transformers(masked_lm.most_tokens(model)).save_pretrained(directory)
        else:
            with hugging_face.seeded(0):  # the placeholders too: the same encoder is the same file
                model = _bare(architecture)
            hugging_face.fill(masked_lm.trunk(model), tensors)
            hugging_face.save(model, directory)
        (directory / "README.md").write_text(card, "utf-8")


def _bare(architecture: Architecture) -> nn.Module:
    """The bare encoder, whose vocabulary is one unused entry."""
    base: nn.Module = masked_lm.bare(architecture.get("model_type", "modernbert"), settings_for_model(architecture))
    return base


def _shape_of(architecture: Architecture) -> Any:
    """The masked language model of an architecture without a number in it."""
    with torch.device("meta"):
        return network_of(architecture, architecture["vocab_size"], masked_lm.NO_TOKENS)


def _settings_of(config: Any, directory: Path) -> dict[str, Any]:
    """What an architecture says of the model of this configuration. Raises UserError for one that cannot be built."""
    return _modernbert(config, directory) if config.model_type == "modernbert" else masked_lm.settings_of(config)


def _read(words: bytes, architecture: Architecture) -> Vocabulary:
    """The shared vocabulary out of its asset. Raises UserError if it is not the one that the architecture is for."""
    try:
        found = Vocabulary(words.decode(), architecture.get("tokens", OWN_TOKENS))
    except UnicodeDecodeError as error:
        raise UserError(f"the tokenizer that came is no text ({error})") from None
    if found.entries > architecture["vocab_size"]:
        raise UserError(f"the tokenizer that came has {found.entries:,} entries, not {architecture['vocab_size']:,}")
    return found


def _check_length(architecture: Architecture) -> None:
    """Raises UserError for windows that are longer than the model reads."""
    kind = masked_lm.KINDS[architecture["model_type"]]
    config = AutoConfig.for_model(architecture["model_type"])
    most = architecture.get("max_position_embeddings", config.max_position_embeddings) - kind.lost_positions
    if architecture["sequence_length"] > most:
        raise UserError(
            f"{_WHAT}: sequence_length {architecture['sequence_length']} is more than the {most} tokens that the model "
            "reads; lower it"
        )


def _modernbert(config: Any, directory: Path) -> dict[str, Any]:
    """ModernBertConfig as settings. Raises UserError for a variant that cannot be built."""
    own = TextArchitecture.model_fields.keys() - TextTask.model_fields.keys()
    found = {key: getattr(config, key) for key in TextArchitecture.model_fields if key in own and hasattr(config, key)}
    found["global_attn_every_n_layers"] = _global_every(config.layer_types, directory)
    for key, layer in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
        rope = config.rope_parameters[layer]
        if rope["rope_type"] != "default":
            raise UserError(f"{directory}: rotary positions of type {rope['rope_type']!r} are not supported")
        found[key] = rope["rope_theta"]
    return found


def _global_every(layer_types: list[str], directory: Path) -> int:
    """The n for which every n-th layer is global, the first included."""
    for n in range(1, len(layer_types) + 1):
        if all((kind == "full_attention") == (i % n == 0) for i, kind in enumerate(layer_types)):
            return n
    raise UserError(f"{directory}: its order of local and global layers has no period; only a regular one is supported")
