"""Encoder type `image`: what can be set about the shared encoder, and about a node's private parts."""

from __future__ import annotations

from pydantic import model_validator

from common.encoders.settings import Activation, EncoderSettings, Positive, Share, Size


class ImageArchitecture(EncoderSettings):
    """ViTMAEConfig's own names, then those of the task (at the end)."""

    hidden_size: Size = 64
    num_hidden_layers: Size = 2
    num_attention_heads: Size = 4
    intermediate_size: Size = 128
    hidden_act: Activation = "gelu"
    initializer_range: Positive = 0.02
    layer_norm_eps: Positive = 1e-6
    qkv_bias: bool = True
    mask_ratio: Share = 0.75  # share of the patches that are hidden
    norm_pix_loss: bool = False  # targets normalised per patch

    @model_validator(mode="after")
    def _width_fits(self) -> ImageArchitecture:
        _check_width("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        return self


class ImagePrivate(EncoderSettings):
    """A node's own. `patch_size` (pixels a side) is chosen by the images' size when it is left out."""

    patch_size: Size = 4
    decoder_hidden_size: Size = 64
    decoder_num_hidden_layers: Size = 1
    decoder_num_attention_heads: Size = 4
    decoder_intermediate_size: Size = 128

    @model_validator(mode="after")
    def _width_fits(self) -> ImagePrivate:
        heads = "decoder_num_attention_heads"
        _check_width("decoder_hidden_size", self.decoder_hidden_size, heads, self.decoder_num_attention_heads)
        return self


def _check_width(key: str, size: int, heads_key: str, heads: int) -> None:
    if size % heads or size % 4:
        raise ValueError(
            f"{key} {size} must be a multiple of {heads_key} ({heads}) and, for the positions, of 4; change one of them"
        )
