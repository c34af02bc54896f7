"""Encoder type `text`: what can be set about the shared encoder, and about a node's private parts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from common.encoders.settings import LARGEST, Activation, EncoderSettings, Positive, Rank, Share, Size
from common.encoders.vocabulary import SMALLEST

#: Whose the vocabulary is: one that everybody uses, from the operator ("shared") or made of words that nodes contribute
#: ("agreed"), or each node's own.
Vocabulary = Literal["shared", "agreed", "private"]

#: What travels: embeddings, trunk and head; the trunk alone; or low-rank updates of a base that stays as it is.
Travels = Literal["all", "trunk", "lora"]


class TextTask(EncoderSettings):
    """What is set whatever the model is. `entries` is the most that a vocabulary which is trained may have; `shared` is
    "all" where nothing is said, and "trunk" with private vocabularies."""

    model_type: Literal["modernbert", "bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2"] = (
        "modernbert"
    )
    vocabulary: Vocabulary = "shared"
    entries: Size = 2048
    shared: Travels | None = None
    sequence_length: Size = 32  # tokens of a training window
    mask_rate: Share = 0.25  # share of a window's tokens that are to be predicted; BERT has 0.15

    @model_validator(mode="after")
    def _travels(self) -> TextTask:
        if self.vocabulary == "private" and self.shared not in (None, "trunk"):
            raise ValueError(
                f'vocabulary "private" shares the trunk alone, and shared says {self.shared!r}; leave shared out, or '
                'take vocabulary = "shared" or "agreed"'
            )
        if self.vocabulary == "agreed" and self.shared == "lora":
            raise ValueError(
                'shared "lora" updates a base, whose vocabulary stays as it is; take "shared" for vocabulary'
            )
        if self.entries < SMALLEST:
            raise ValueError(f"entries: input should be a whole number from {SMALLEST} to {LARGEST:,}")
        return self

    @property
    def travels(self) -> Travels:
        return self.shared or ("trunk" if self.vocabulary == "private" else "all")


class TextArchitecture(TextTask):
    """The task's settings with ModernBertConfig's own names, at small sizes."""

    hidden_size: Size = 64
    num_hidden_layers: Size = 2
    num_attention_heads: Size = 4
    intermediate_size: Size = 128
    max_position_embeddings: Size = 512
    local_attention: Size = 128  # tokens that a local layer sees, its own in the middle
    global_attn_every_n_layers: Size = 3
    # ModernBERT's 160,000 is for 8,192 tokens; at windows of 32 a lower base trained a little faster (one seed)
    global_rope_theta: Positive = 100.0
    local_rope_theta: Positive = 100.0
    hidden_activation: Activation = "gelu"
    # near 1/sqrt(hidden_size); with ModernBERT's 0.02, meant for a width of 768, 400 steps got 0.23 nats less far
    initializer_range: Positive = 0.1
    norm_eps: Positive = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @model_validator(mode="after")
    def _sizes_go_together(self) -> TextArchitecture:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of twice num_attention_heads "
                f"({self.num_attention_heads}); rotary positions need that: change one of them"
            )
        if self.sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.sequence_length} is more than max_position_embeddings "
                f"{self.max_position_embeddings}; lower the one or raise the other"
            )
        return self


class TextPrivate(EncoderSettings):
    """A node's own: entries of its vocabulary where each node has its own, and how many tokens of a long text its
    features see. Where the vocabulary is shared: the rank of its adapters (0: none), the share of its batches that are
    trained without them, and whether the rows of the embeddings may travel. Where it is an agreed one: whether the node
    contributes words, of those that are in at least `min_documents` of its training documents. `base`: the directory of
    the model that an encoder with shared = "lora" is an update of, where that does not travel."""

    vocabulary: int | Literal["bytes"] = 1024  # "bytes": no merges
    feature_tokens: Size = 512
    adapter_rank: Rank = 4
    adapter_rest: Share = 0.5
    share_embeddings: bool = True
    base: str | None = None
    contribute_words: bool = False
    min_documents: Annotated[int, Field(ge=2, le=LARGEST)] = 10

    @field_validator("vocabulary", mode="plain")
    @classmethod
    def _number_or_bytes(cls, value: object) -> object:
        # one sentence for both kinds: a union's own error would be two
        if value == "bytes" or (type(value) is int and SMALLEST <= value <= LARGEST):
            return value
        raise ValueError(f'input should be a whole number from {SMALLEST} to {LARGEST:,}, or "bytes"')

    @property
    def entries(self) -> int:
        """The largest number of entries that the vocabulary may have."""
        return SMALLEST if self.vocabulary == "bytes" else self.vocabulary
