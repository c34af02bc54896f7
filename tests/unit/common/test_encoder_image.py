"""Encoder type `image`: what is shared and what is private, hidden patches, exports, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from common.encoders.image import ImageEncoderType, ImageModel
from common.errors import UserError

TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24}

image = ImageEncoderType()


def stripes(count: int, *shape: int) -> NDArray[np.uint8]:
    """Images that a model can learn: stripes of one of four phases, brighter to the right."""
    columns = np.arange(shape[1])
    rows = [((columns + i) % 4 * 60 + columns).astype(np.uint8) for i in range(count)]
    grey = np.stack([np.tile(row, (shape[0], 1)) for row in rows])
    return grey if len(shape) == 2 else np.repeat(grey[..., None], shape[2], axis=3)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def architecture() -> dict[str, Any]:
    return image.architecture(TINY)


@pytest.fixture
def model(architecture: dict[str, Any]) -> ImageModel:
    return image.build(architecture, image.fit_private(stripes(20, 16, 16, 3), architecture, SMALL, {}), seed=1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"hidden_size": 30, "num_attention_heads": 2}, "hidden_size 30 must be a multiple"),
        ({"num_attention_heads": 3}, r"hidden_size 64 must be a multiple of num_attention_heads \(3\)"),
    ],
)
def test_wrong_architecture(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        image.architecture(overrides)


def test_wrong_private_settings(architecture: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="private settings of type image: decoder_hidden_size 18 must be"):
        image.fit_private(stripes(4, 8, 8), architecture, {"decoder_hidden_size": 18}, {})


@pytest.mark.parametrize("samples", [["a", "b"], np.zeros((4, 8), np.uint8), np.zeros((4, 8, 8)), [], [[1], [1, 2]]])
def test_samples_that_are_no_images(architecture: dict[str, Any], samples: Any) -> None:
    with pytest.raises(UserError, match="images must come as one uint8 array"):
        image.fit_private(samples, architecture, {}, {})


def test_shared_parameters_are_those_of_initial(architecture: dict[str, Any], model: ImageModel) -> None:
    initial, same, shared = image.initial(architecture, 5), image.initial(architecture, 5), model.shared_parameters()
    assert [(n, t.shape) for n, t in initial.items()] == [(n, p.shape) for n, p in shared.items()]
    assert all(torch.equal(initial[n], same[n]) for n in initial)
    assert any(not torch.equal(initial[n], t) for n, t in image.initial(architecture, 6).items())
    assert all(name.startswith(("layers.", "layernorm.")) for name in shared)


def test_private_and_shared_are_disjoint_and_complete(model: ImageModel) -> None:
    shared, private = model.shared_parameters(), model.private_parameters()
    ids = {id(p) for p in shared.values()}, {id(p) for p in private.values()}
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {id(p) for p in model.parameters()}
    assert {"embeddings", "decoder"} == {
        n.removeprefix("network.vit.").removeprefix("network.").split(".")[0] for n in private
    }


@pytest.mark.parametrize(
    ("shape", "patch", "side", "channels"),
    [
        ((28, 28), 4, 28, 1),
        ((32, 32, 3), 4, 32, 3),
        ((30, 30, 5), 4, 32, 5),
        ((20, 50), 7, 56, 1),
        ((5, 5, 2), 1, 5, 2),
    ],
)
def test_any_size_and_any_number_of_channels(
    architecture: dict[str, Any], shape: tuple[int, ...], patch: int, side: int, channels: int
) -> None:
    samples = stripes(6, *shape)
    private = image.fit_private(samples, architecture, SMALL, {})
    assert json.loads(json.dumps(private)) == private
    assert (private["patch_size"], private["image_size"], private["num_channels"]) == (patch, side, channels)
    model = image.build(architecture, private, seed=0)
    encoded = model.encode(samples)
    assert encoded.shape == (6, channels, side, side) and encoded.dtype == np.uint8
    height, width = shape[:2]
    assert np.array_equal(encoded[:, 0, :height, :width], samples if samples.ndim == 3 else samples[..., 0])
    assert not encoded[:, :, height:].any() and not encoded[:, :, :, width:].any()
    assert torch.isfinite(model.loss(model.batch(encoded, 4, torch.Generator().manual_seed(0))))
    assert model.features(samples).shape == (6, 16)


def test_patch_size_is_settable(architecture: dict[str, Any]) -> None:
    private = image.fit_private(stripes(4, 28, 28), architecture, {"patch_size": 7}, {})
    assert (private["patch_size"], private["image_size"]) == (7, 28)


def test_images_that_do_not_fit_the_stem(model: ImageModel) -> None:
    for samples in (stripes(2, 17, 16, 3), stripes(2, 16, 16), stripes(2, 16, 16, 4)):
        with pytest.raises(UserError, match="do not fit a stem for at most 16x16 with 3"):
            model.encode(samples)


def test_pixels_are_normalised_and_flat_channels_survive(architecture: dict[str, Any]) -> None:
    samples = stripes(20, 16, 16, 3)
    samples[..., 2] = 9
    model = image.build(architecture, image.fit_private(samples, architecture, SMALL, {}), seed=0)
    pixels = model.normalised(torch.from_numpy(model.encode(samples)))
    assert pixels.mean(dim=(0, 2, 3)) == pytest.approx(torch.zeros(3), abs=1e-4)
    assert pixels.std(dim=(0, 2, 3), correction=0) == pytest.approx(torch.tensor([1.0, 1.0, 0.0]), abs=1e-4)


def test_batches_and_loss_follow_from_the_generator(model: ImageModel) -> None:
    encoded = model.encode(stripes(20, 16, 16, 3))
    one, same, other = (model.batch(encoded, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["noise"], other["noise"])
    assert torch.equal(model.loss(one), model.loss(same)), "the mask is in the batch, not drawn by the model"


def test_only_hidden_patches_count(model: ImageModel) -> None:
    batch = model.batch(model.encode(stripes(20, 16, 16, 3)), 8, torch.Generator().manual_seed(0))
    out = model.network(pixel_values=model.normalised(batch["pixels"]), noise=batch["noise"])
    hidden = batch["noise"].argsort(dim=1).argsort(dim=1) >= 16
    assert torch.equal(out.mask.bool(), hidden) and hidden.float().mean() == 0.75
    target = model.network.patchify(model.normalised(batch["pixels"]))
    expected = ((out.logits - target) ** 2)[hidden].mean()
    assert model.loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_patch_knows_its_place(model: ImageModel) -> None:
    """transformers leaves the positions of a fresh model at zero."""
    for table in (model.network.vit.embeddings.position_embeddings, model.network.decoder.decoder_pos_embed):
        assert not table.requires_grad and not table[0, 0].any()
        assert len(table[0, 1:].unique(dim=0)) == 64
        quarter = table.shape[2] // 4
        # patch 1 is one column right of patch 0, patch 8 one row below: sin column, cos column, sin row, cos row
        assert table[0, 2, 0] == pytest.approx(np.sin(1), abs=1e-6)
        assert table[0, 2, 2 * quarter] == 0
        assert table[0, 9, 2 * quarter] == pytest.approx(np.sin(1), abs=1e-6)


def test_it_learns(model: ImageModel) -> None:
    plain = np.broadcast_to(np.arange(0, 240, 12, dtype=np.uint8)[:, None, None, None], (20, 16, 16, 3))
    encoded, generator = model.encode(plain), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(80):
        loss = model.loss(model.batch(encoded, 16, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_features_are_those_of_the_whole_image(model: ImageModel) -> None:
    samples = stripes(300, 16, 16, 3)
    features = model.features(samples)
    assert features.shape == (300, 16) and features.dtype == torch.float32 and not features.requires_grad
    assert torch.allclose(features[7:9], model.features(samples[7:9]), atol=1e-5)
    model.network.config.mask_ratio = 0.0
    pixels = model.normalised(torch.from_numpy(model.encode(samples[:3])))
    with torch.no_grad():
        hidden = model.network.vit(pixel_values=pixels).last_hidden_state
    assert torch.allclose(features[:3], hidden[:, 1:].mean(dim=1), atol=1e-5)


def test_shared_export_opens_with_auto_model(tmp_path: Path, architecture: dict[str, Any], model: ImageModel) -> None:
    tensors = {name: parameter.detach() for name, parameter in model.shared_parameters().items()}
    image.export_shared(tmp_path, architecture, tensors, "# card", {})
    assert (tmp_path / "README.md").read_text() == "# card"
    opened, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened).__name__ == "ViTMAEModel"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert opened(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 65, 16), "nothing is hidden"

    found, loaded = image.architecture_of(tmp_path)
    assert found == architecture, "with the ratio that it was trained with"
    assert list(loaded) == list(tensors) and all(torch.equal(loaded[n], t) for n, t in tensors.items())
    with pytest.raises(ValueError, match="were expected"):
        image.export_shared(tmp_path, architecture, {}, "", {})


def test_node_export_opens_with_the_auto_classes(tmp_path: Path, model: ImageModel) -> None:
    model.export(tmp_path)
    opened, report = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(opened, ViTMAEForPreTraining)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    samples = stripes(4, 16, 16, 3)
    batch = model.batch(model.encode(samples), 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = model.normalised(batch["pixels"])
        assert torch.equal(opened(pixel_values=pixels, noise=batch["noise"]).loss, model.loss(batch))
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    processed = processor(images=list(samples), return_tensors="pt")["pixel_values"]
    expected = model.normalised(torch.from_numpy(model.encode(samples)))
    assert torch.allclose(processed, expected, atol=1e-5), "preprocessor_config.json normalises as training did"

    _, loaded = image.architecture_of(tmp_path)
    assert all(torch.equal(loaded[n], p) for n, p in model.shared_parameters().items())


def test_continue_from_any_vit_mae(tmp_path: Path, architecture: dict[str, Any]) -> None:
    sizes = {**TINY, **SMALL, "decoder_num_hidden_layers": 1}
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**sizes, image_size=24, patch_size=8, qkv_bias=False))
    theirs.save_pretrained(tmp_path)
    found, tensors = image.architecture_of(tmp_path)
    assert found["qkv_bias"] is False and found["layer_norm_eps"] == 1e-12
    assert list(tensors) == list(image.initial(found, 0))
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        image.architecture_of(tmp_path / "absent")
