"""Encoder type `text` with shared = "lora": low-rank updates of a base that stands still, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

from common.encoders import frozen_base, lora, masked_lm
from common.encoders.base import BASE_DIRECTORY, Architecture
from common.encoders.shared_vocabulary import TOKENIZER
from common.encoders.text import TextEncoderType
from common.encoders.text_model import WITH_PRIVATE, TextModel
from common.errors import UserError
from tests.unit.common.test_encoder_text_shared import TEXTS, held_out, prepared, train

text = TextEncoderType()

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind that somebody has trained a little, its decoder's bias too."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "texts.txt").write_text("\n\n".join(TEXTS))
    for model_type in masked_lm.KINDS:
        architecture, assets = prepared(folder / "texts.txt", model_type)
        private = text.fit_private(TEXTS, architecture, {"adapter_rank": 0}, assets)
        model = text.build(architecture, private, seed=7)
        train(model, 3)
        model.export(folder / model_type)
    return {model_type: folder / model_type for model_type in masked_lm.KINDS}


def on(base: Path, **changes: Any) -> tuple[Architecture, dict[str, bytes]]:
    architecture = text.architecture({"shared": "lora", "sequence_length": 16, "lora_rank": 4, **changes})
    return text.assets(architecture, {"base": str(base), "tokenizer": str(base)})


def built(base: Path, **changes: Any) -> TextModel:
    architecture, assets = on(base, **changes)
    return text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), seed=1)


def opened(directory: Path) -> Any:
    model, report = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def refusal(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model_type", masked_lm.KINDS)
def test_of_every_model_the_update_alone_moves_and_both_exports_have_it_merged(
    tmp_path: Path, bases: dict[str, Path], model_type: str
) -> None:
    architecture, assets = on(bases[model_type])
    assert json.loads(json.dumps(architecture)) == architecture and architecture["model_type"] == model_type
    assert sorted(assets) == [frozen_base.ASSET, TOKENIZER], "it is small enough to travel"
    model = text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), seed=1)
    shared, initial = model.shared_parameters(), text.initial(architecture, 5)
    assert [(n, t.shape) for n, t in initial.items()] == [(n, p.shape) for n, p in shared.items()]
    assert shared and all(name.endswith(".lora_B") for name in shared) and not any(t.any() for t in initial.values())
    private = model.private_parameters()
    assert all(name.startswith("adapters.") or name.endswith("bias") for name in private) and len(private) > 1

    batch = held_out(model)
    before = model.loss(batch)
    base = opened(bases[model_type])
    labelled = {key: batch[key] for key in ("input_ids", "labels")}
    assert torch.allclose(before, base(**labelled).loss, atol=1e-5), "it begins as the base is"
    train(model)
    after = model.loss(batch)
    assert after < before - 0.1 and all(parameter.any() for parameter in shared.values()), "it learns"
    was_given, stands = dict(base.named_parameters()), dict(model.network.named_buffers())
    assert all(torch.equal(stands[name], was_given[name]) for name in was_given.keys() & stands.keys())
    [bias] = was_given.keys() - stands.keys()
    assert was_given[bias].shape == (model.entries,) and f"network.{bias}" in private, "alone of the base a node's own"

    model.export(tmp_path / "node")
    assert torch.allclose(opened(tmp_path / "node")(**labelled).loss, after, atol=1e-5)
    tensors = {name: parameter.detach() for name, parameter in shared.items()}
    text.export_shared(tmp_path / "shared", architecture, tensors, "# card", assets)
    export = opened(tmp_path / "shared")
    without = model.loss({**batch, WITH_PRIVATE: torch.tensor(False)})
    assert torch.allclose(export(**labelled).loss, without, atol=1e-5) and not torch.equal(without, after)
    assert export.get_output_embeddings().weight is export.get_input_embeddings().weight
    assert export.config.shared == "all", "to whoever opens it, it is a whole model"
    kept, was = export.state_dict(), base.state_dict()
    moved = {name.removesuffix(".weight") for name in was if not torch.equal(kept[name], was[name])}
    assert moved == {name.removesuffix(".lora_B") for name in shared}, "nothing else has moved"
    assert AutoTokenizer.from_pretrained(tmp_path / "shared").mask_token_id == model.vocabulary.mask_id

    again, loaded = text.architecture_of(tmp_path / "shared")
    assert again == architecture and list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    sources = {"tokenizer": str(tmp_path / "shared"), "base": str(bases[model_type])}
    assert text.assets(again, sources) == (architecture, assets)


@pytest.fixture(scope="module")
def modern(bases: dict[str, Path]) -> tuple[Architecture, dict[str, bytes], dict[str, Tensor]]:
    architecture, assets = on(bases["modernbert"])
    return architecture, assets, text.initial(architecture, 0)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_mean_of_updates_is_the_mean_of_the_models(
    modern: tuple[Architecture, dict[str, bytes], dict[str, Tensor]], data: st.DataObject
) -> None:
    architecture, _, initial = modern
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    updates = [{n: torch.randn(t.shape, generator=generator) for n, t in initial.items()} for _ in weights]

    def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        network = frozen_network(architecture)
        lora.merge(network, architecture, tensors)
        return {name: layer.weight.detach() for name, layer in lora.matrices(network, "all").items()}

    total = sum(weights)
    mean = {n: sum(w / total * u[n] for w, u in zip(weights, updates, strict=True)) for n in initial}
    one, many = merged(mean), [merged(update) for update in updates]  # type: ignore[arg-type]
    for name, matrix in one.items():
        theirs = sum(w / total * each[name] for w, each in zip(weights, many, strict=True))
        assert torch.allclose(matrix, theirs, atol=1e-4), name  # type: ignore[arg-type]


def frozen_network(architecture: Architecture) -> Any:
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
    assert settings.items() <= architecture.items()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return masked_lm.network_of("modernbert", settings, 20, masked_lm.NO_TOKENS)


def test_everybody_draws_the_same_frozen_factor() -> None:
    drawn = lora.frozen_factor(0, "layer", 8, 400)
    assert drawn.dtype == torch.float32 and drawn.shape == (8, 400)
    assert torch.equal(drawn, lora.frozen_factor(0, "layer", 8, 400))
    for other in (lora.frozen_factor(1, "layer", 8, 400), lora.frozen_factor(0, "other", 8, 400)):
        assert not torch.equal(drawn, other)
    assert drawn.abs().max() <= np.sqrt(3 / 400) and abs(float(drawn.var()) * 400 - 1) < 0.1
    # an encoder that was made with other numbers could never be merged again: these may not change
    assert drawn[0, :3].tolist() == [-0.0032791784033179283, -0.0847003236413002, -0.08250530809164047]


def test_which_matrices_are_updated(bases: dict[str, Path]) -> None:
    shown = {which: {*built(bases["bert"], lora_matrices=which).shared_parameters()} for which in ("all", "attention")}
    rest = built(bases["bert"], lora_matrices="feed-forward").shared_parameters()
    assert shown["attention"] | {*rest} == shown["all"] and not shown["attention"] & {*rest}
    block = "bert.encoder.layer.1"
    assert {f"{block}.intermediate.dense.lora_B", f"{block}.output.dense.lora_B"} == {n for n in rest if block in n}
    assert len(shown["all"]) == 2 * 6


def test_embeddings_stand_still_so_nobody_is_warned_of_them_or_needs_to_forbid_it(bases: dict[str, Path]) -> None:
    architecture, assets = on(bases["bert"])
    with capture_logs() as logs:
        text.fit_private(TEXTS, architecture, {"share_embeddings": False}, assets)
    assert not logs


def test_a_base_that_does_not_travel_is_named_by_each_and_checked_by_its_digest(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    architecture, assets = on(bases["bert"], lora_base="named")
    assert list(assets) == [TOKENIZER] and architecture["lora_base"] == "named"
    digest = architecture["base_digest"]
    assert digest in refusal(lambda: text.fit_private(TEXTS, architecture, {}, assets))

    travels, all_assets = on(bases["bert"])
    travelled = built(bases["bert"])
    text.export_shared(tmp_path / "other", travels, moved(travelled), "", all_assets)
    said = refusal(lambda: text.fit_private(TEXTS, architecture, {"base": str(tmp_path / "other")}, assets))
    assert digest in said and frozen_base.read(tmp_path / "other").digest in said
    with pytest.raises(UserError) as caught:
        text.fit_private(TEXTS, architecture, {"base": str(tmp_path / "absent")}, assets)
    assert str(tmp_path) in str(caught.value) and str(tmp_path) not in caught.value.public, "a path is its owner's"

    spec = text.fit_private(TEXTS, architecture, {"base": str(bases["bert"])}, assets)
    assert json.loads(json.dumps(spec)) == spec and "base_tensors" not in spec
    model = text.build(architecture, spec, 0)
    assert torch.equal(model.loss(held_out(model)), travelled.loss(held_out(travelled)))
    tensors = moved(model)
    assert "encoder.base" in refusal(lambda: text.export_shared(tmp_path / "out", architecture, tensors, "", assets))
    named = {**assets, BASE_DIRECTORY: str(bases["bert"]).encode()}
    text.export_shared(tmp_path / "out", architecture, tensors, "", named)
    opened(tmp_path / "out")


def test_a_model_that_was_on_another_device_exports_as_one_that_was_not(tmp_path: Path, bases: dict[str, Path]) -> None:
    architecture, assets = on(bases["bert"])
    spec = text.fit_private(TEXTS, architecture, {"adapter_rank": 0}, assets)
    model = text.build(architecture, spec, 0)
    train(model, 2)
    batch = held_out(model)
    before = model.loss(batch)
    # converting copies every tensor, as moving to a GPU does: the tie of frozen embeddings is two tensors from then on
    model.to(torch.float64).to(torch.float32)
    assert masked_lm.decoder(model.network).weight is not masked_lm.embeddings(model.network).weight
    assert torch.equal(model.loss(batch), before)
    model.export(tmp_path)
    export = opened(tmp_path)
    assert export.get_output_embeddings().weight is export.get_input_embeddings().weight
    assert torch.allclose(export(input_ids=batch["input_ids"], labels=batch["labels"]).loss, before, atol=1e-5)
    assert list(model.lora.shared_parameters()) == list(text.initial(architecture, 0)), "the export was made of a copy"


def moved(model: TextModel) -> dict[str, Tensor]:
    return {name: torch.ones_like(parameter) for name, parameter in model.shared_parameters().items()}


def test_a_base_that_came_is_read_within_bounds_and_checked(bases: dict[str, Path]) -> None:
    architecture, assets = on(bases["bert"])
    words, whole = {TOKENIZER: assets[TOKENIZER]}, assets[frozen_base.ASSET]
    other = on(bases["roberta"])[1][frozen_base.ASSET]
    for came, said in [
        (words, "its base.safetensors did not come"),
        ({**words, frozen_base.ASSET: b"\x80\x04K\x01."}, "does not open"),
        ({**words, frozen_base.ASSET: (1 << 62).to_bytes(8, "little") + whole[8:]}, "does not open"),
        ({**words, frozen_base.ASSET: whole[:-4]}, "does not open"),
        ({**words, frozen_base.ASSET: whole[:-4] + b"\x00\x00\xc0\x7f"}, "not finite"),
        ({**words, frozen_base.ASSET: whole[:-4] + b"\x00\x00\x80\x3f"}, architecture["base_digest"]),
        ({**words, frozen_base.ASSET: other}, architecture["base_digest"]),
    ]:
        assert said in refusal(lambda each=came: text.fit_private(TEXTS, architecture, {}, each))
    # a digest that is right for numbers that are not the architecture's
    spec = text.fit_private(TEXTS, {**architecture, "intermediate_size": 25}, {}, assets)
    assert "differs" in refusal(lambda: text.build({**architecture, "intermediate_size": 25}, spec, 0))


def test_what_is_no_base(tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = bases["bert"]
    model = AutoModelForMaskedLM.from_pretrained(base)
    model.base_model.save_pretrained(tmp_path / "headless")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((base / "config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    built(base).export(tmp_path / "node")  # private corrections have untied its decoder
    for place, said in [
        ("absent", "does not exist"),
        ("headless", "fit them once by shared-encoder attach"),
        ("pickled", "has no model.safetensors"),
        ("node", "not tied to its embeddings"),
    ]:
        assert said in refusal(lambda place=place: on(tmp_path / place))
    assert "lora_rank 20 is more than" in refusal(lambda: on(base, lora_rank=20))
    assert "and model_type says 'roberta'" in refusal(lambda: on(base, model_type="roberta"))
    assert "there is no setting 'hidden_size'" in refusal(lambda: on(base, hidden_size=16))
    assert "sequence_length 600 is more than" in refusal(lambda: on(base, sequence_length=600))
    architecture = text.architecture({"shared": "lora"})
    assert "name its directory with encoder.base" in refusal(lambda: text.assets(architecture, {"tokenizer": "bytes"}))
    whole = text.architecture({"model_type": "bert"})
    assert "say so, or leave it out" in refusal(lambda: text.assets(whole, {"base": str(base), "tokenizer": "bytes"}))
    monkeypatch.setattr(frozen_base, "MAX_ASSET_BYTES", 10_000)
    assert "too large to travel" in refusal(lambda: on(base, lora_base="travels"))
    assert on(base)[0]["lora_base"] == "named"
