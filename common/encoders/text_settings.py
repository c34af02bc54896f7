"""Encoder type `text`: what can be set about the shared trunk, and about a node's private parts."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from common.encoders.settings import LARGEST, Activation, EncoderSettings, Positive, Share, Size
from common.encoders.vocabulary import SMALLEST


class TextArchitecture(EncoderSettings):
    """ModernBertConfig's own names, then the two of the task (at the end)."""

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
    sequence_length: Size = 32  # tokens of a training window
    mask_rate: Share = 0.25  # share of a window's tokens that are to be predicted; BERT has 0.15

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
    """A node's own: entries of its vocabulary, and how many tokens of a long text its features see."""

    vocabulary: int | Literal["bytes"] = 1024  # "bytes": no merges
    feature_tokens: Size = 512

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
