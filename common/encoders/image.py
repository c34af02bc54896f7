"""Encoder type `image`: masked patches on transformers' ViT-MAE (He et al. 2022, arXiv:2111.06377).

Shared are the encoder's layers and its final norm. Private are the patch projection, the class token, the fixed
positions, the decoder and its mask token: so images of any size and number of channels share one encoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from common.encoders import hugging_face
from common.encoders.base import Architecture, Assets, Batch, EncoderModel, PrivateSpec, Samples
from common.encoders.image_settings import ImageArchitecture, ImagePrivate
from common.encoders.settings import checked, overridden
from common.errors import UserError

#: Patches along the longer side, unless `patch_size` is set: 49 to 64 patches are a batch that two cores can afford.
_PATCHES_PER_SIDE = 8
_STEM = "embeddings."
#: The stem of an encoder that is exported alone; its tensors are there only so that no weight is missing.
_PLACEHOLDER: PrivateSpec = {**ImagePrivate().model_dump(), "image_size": 32, "num_channels": 3}
#: Where config.json of an export keeps the ratio of training, because its own says that nothing is hidden.
_TRAINED_MASK_RATIO = "trained_mask_ratio"
#: Images in one forward pass of `features`.
_FEATURE_BATCH = 256


class ImageEncoderType:
    """Images (uint8) and a ViT-MAE encoder."""

    name = "image"

    def architecture(self, overrides: Mapping[str, Any]) -> Architecture:
        """The architecture with defaults filled in.

        Raises UserError for a wrong key (suggesting the right one), a wrong value, or sizes that do not go together.
        """
        return checked(ImageArchitecture, "architecture of type image", overrides).model_dump()

    def architecture_of(
        self, directory: Path, overrides: Mapping[str, Any] | None = None
    ) -> tuple[Architecture, dict[str, Tensor]]:
        """Architecture and shared tensors of our export or any ViT-MAE directory; `mask_ratio` may be another.

        Raises UserError if it is none, and for an override of anything else.
        """
        hugging_face.read_config(directory, "vit_mae")
        model, missing = hugging_face.load_base_model(directory)
        config = cast(Any, model).config
        shared = _shared(model)
        hugging_face.require(directory, shared, missing)
        architecture = {key: getattr(config, key) for key in ImageArchitecture.model_fields}
        architecture["mask_ratio"] = getattr(config, _TRAINED_MASK_RATIO, config.mask_ratio)
        architecture = self.architecture(overridden(directory, architecture, overrides or {}, ("mask_ratio",)))
        return architecture, {name: tensor.detach() for name, tensor in shared.items()}

    def assets(self, architecture: Architecture, sources: Mapping[str, str]) -> tuple[Architecture, dict[str, bytes]]:
        """None: the architecture says it all."""
        return architecture, {}

    def initial(self, architecture: Architecture, seed: int) -> dict[str, Tensor]:
        """The encoder's float32 tensors at version 0, in layout order; the same for the same seed."""
        with hugging_face.seeded(seed):
            model = ViTMAEModel(_config(architecture, _PLACEHOLDER))
        return {name: parameter.detach() for name, parameter in _shared(model).items()}

    def fit_private(
        self, samples: Samples, architecture: Architecture, settings: Mapping[str, Any], assets: Assets
    ) -> PrivateSpec:
        """Measure the images' size, and their mean and spread per channel. Settings: `ImagePrivate`.

        Raises UserError for samples that are not uint8 images and for a wrong setting.
        """
        images = _images(samples)
        longer = max(images.shape[1:3])
        chosen = {"patch_size": max(1, math.ceil(longer / _PATCHES_PER_SIDE))}
        own = checked(ImagePrivate, "private settings of type image", {**chosen, **settings})
        return {
            **own.model_dump(),
            "image_size": math.ceil(longer / own.patch_size) * own.patch_size,
            "num_channels": images.shape[3],
            # one part in 255 at least: a channel without any contrast must not be divided by nothing
            "mean": [float(images[..., c].mean(dtype=np.float64)) for c in range(images.shape[3])],
            "std": [max(1.0, float(images[..., c].std(dtype=np.float64))) for c in range(images.shape[3])],
        }

    def build(self, architecture: Architecture, private: PrivateSpec, seed: int) -> ImageModel:
        """The whole model, freshly initialised from `seed`."""
        with hugging_face.seeded(seed):
            return ImageModel(architecture, private)

    def export_shared(
        self,
        directory: Path,
        architecture: Architecture,
        tensors: Mapping[str, Tensor],
        card: str,
        assets: Assets,
    ) -> None:
        """Write the encoder as a ViTMAEModel whose patch stem is an untrained placeholder: the reader's to bring.

        It hides no patch (`mask_ratio` 0 in its config.json), because its reader wants the features of all of them;
        the ratio it was trained with is kept beside it, for a later `architecture_of`.
        """
        with hugging_face.seeded(0):
            model = ViTMAEModel(_config(architecture, _PLACEHOLDER))
            _initialise_stem(model)
        model.config.mask_ratio = 0.0
        setattr(model.config, _TRAINED_MASK_RATIO, architecture["mask_ratio"])
        hugging_face.fill(_shared(model), tensors)
        hugging_face.save(model, directory)
        (directory / "README.md").write_text(card, "utf-8")


class ImageModel(EncoderModel):
    """Patch stem + shared encoder + pixel decoder. `network` is the ViTMAEForPreTraining."""

    def __init__(self, architecture: Architecture, private: PrivateSpec) -> None:
        super().__init__()
        self.network = ViTMAEForPreTraining(_config(architecture, private))
        _initialise_stem(self.network.vit)
        _initialise_decoder(self.network.decoder)
        self.side: int = private["image_size"]
        self.channels: int = private["num_channels"]
        self.patches: int = (self.side // private["patch_size"]) ** 2
        self.register_buffer("mean", torch.tensor(private["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(private["std"]).view(-1, 1, 1), persistent=False)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The encoder's layers and final norm, named as in a ViTMAEModel."""
        return _shared(self.network.vit)

    def encode(self, samples: Samples) -> NDArray[np.uint8]:
        """The images as uint8 (n, channels, side, side), with black at the right and below if they are not that size.

        Raises UserError if they are larger, or have another number of channels, than those that the stem was fitted to.
        """
        images = _images(samples)
        height, width, channels = images.shape[1:]
        if channels != self.channels or max(height, width) > self.side:
            raise UserError(
                f"images of {height}x{width} with {channels} channels do not fit a stem for at most "
                f"{self.side}x{self.side} with {self.channels}; train or load private parts for these images"
            )
        padded = np.pad(images, ((0, 0), (0, self.side - height), (0, self.side - width), (0, 0)))
        return np.ascontiguousarray(padded.transpose(0, 3, 1, 2))

    def batch(self, encoded: NDArray[np.uint8], size: int, generator: torch.Generator) -> Batch:
        """Random images: `pixels` uint8 (size, channels, side, side), and what hides their patches.

        That is `noise` (size, patches), uniform; the patches with the largest are hidden.
        """
        rows = torch.randint(len(encoded), (size,), generator=generator)
        return {
            "pixels": torch.from_numpy(encoded[rows.numpy()]),
            "noise": torch.rand(size, self.patches, generator=generator),
        }

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error over the hidden patches' pixels, in units of the channel's variance in the corpus."""
        return cast(
            Tensor,
            self.network(
                pixel_values=self.normalised(batch["pixels"]), noise=batch["noise"].to(self.network.device)
            ).loss,
        )

    @torch.no_grad()
    def features(self, samples: Samples) -> Tensor:
        """What `pooled` gives, on the CPU."""
        return self.pooled(samples).cpu()

    def pooled(self, samples: Samples) -> Tensor:
        """Mean over all patches of the encoder's output with no patch hidden, float32 (n, hidden_size)."""
        encoded = self.encode(samples)
        stem, encoder = self.network.vit.embeddings, self.network.vit
        positions = stem.position_embeddings
        means = []
        for start in range(0, len(encoded), _FEATURE_BATCH):
            pixels = self.normalised(torch.from_numpy(encoded[start : start + _FEATURE_BATCH]))
            patches = stem.patch_embeddings(pixels) + positions[:, 1:]
            first = (stem.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
            hidden = torch.cat([first, patches], dim=1)
            for layer in encoder.layers:
                hidden = layer(hidden)
            means.append(encoder.layernorm(hidden)[:, 1:].mean(dim=1).float())
        return torch.cat(means)

    def export(self, directory: Path) -> None:
        """Write the whole model for `AutoModelForPreTraining`; `AutoModel` opens its encoder.

        preprocessor_config.json says how pixels are normalised.
        """
        hugging_face.save(self.network, directory)
        size = {"height": self.side, "width": self.side}
        preprocessor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": size,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": (cast(Tensor, self.mean).flatten() / 255).tolist(),
            "image_std": (cast(Tensor, self.std).flatten() / 255).tolist(),
        }
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2), "utf-8")

    def normalised(self, pixels: Tensor) -> Tensor:
        """What the network sees of pixels 0 … 255, (n, channels, height, width): float32, on its device.

        Per channel less the mean and by the deviation of the samples that the private part was fitted to.
        """
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        return (pixels.to(mean.device).float() - mean) / std


def _config(architecture: Architecture, private: PrivateSpec) -> ViTMAEConfig:
    keys = (*ImagePrivate.model_fields, "image_size", "num_channels")
    return ViTMAEConfig(**architecture, **{key: private[key] for key in keys}, attn_implementation="sdpa")


def _shared(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a ViTMAEModel that travel: all but its patch stem."""
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(_STEM)}


@torch.no_grad()
def _initialise_stem(model: Any) -> None:
    """As the paper's code does: projection like a linear layer's, fixed positions, a small class token.

    transformers (5.23) leaves the positions of a fresh model at zero, the decoder's as well, and a patch that does
    not know its place cannot be reconstructed.
    """
    stem = model.embeddings
    weight = stem.patch_embeddings.projection.weight
    nn.init.xavier_uniform_(weight.view(len(weight), -1))
    nn.init.normal_(stem.cls_token, std=model.config.initializer_range)
    stem.position_embeddings.copy_(_positions(stem.position_embeddings))


@torch.no_grad()
def _initialise_decoder(decoder: Any) -> None:
    nn.init.normal_(decoder.mask_token, std=decoder.config.initializer_range)
    decoder.decoder_pos_embed.copy_(_positions(decoder.decoder_pos_embed))


def _positions(like: Tensor) -> Tensor:
    """Sines and cosines of column and row, (1, 1 + side * side, size), with zeros for the class token.

    The order of the quarters, sin column, cos column, sin row, cos row, is that of the paper's code.
    """
    side, size = math.isqrt(like.shape[1] - 1), like.shape[2]
    frequencies = 10_000.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64), frequencies)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, size, dtype=torch.float64), grid]).to(like.dtype)[None]


def _images(samples: Samples) -> NDArray[np.uint8]:
    """Samples as uint8 (n, height, width, channels); a channel axis is added to grey images."""
    try:
        images = np.asarray(samples)
    except ValueError:
        images = np.empty(0)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UserError(
            "images must come as one uint8 array (n, height, width) or (n, height, width, channels), "
            f"not {images.dtype} {images.shape}"
        )
    return images[..., None] if images.ndim == 3 else images
