"""Encoder type `text`: what is shared and what is private, masking, exports, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM

from common.encoders import encoder_type_names, get_encoder_type
from common.encoders.base import Batch
from common.encoders.text import TextEncoderType, TextModel
from common.encoders.vocabulary import MASK_ID, SEPARATOR_ID, SMALLEST, SPECIAL
from common.errors import UserError

SENTENCE = "the node trains and sends an update to the master which counts it once"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 20 + i % 9)) for i in range(80)]
TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}

text = TextEncoderType()


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def architecture() -> dict[str, Any]:
    return text.architecture({**TINY, "sequence_length": 16, "vocabulary": "private"})


@pytest.fixture(scope="module")
def private(architecture: dict[str, Any]) -> dict[str, Any]:
    return text.fit_private(TEXTS, architecture, {"vocabulary": 300}, {})


@pytest.fixture
def model(architecture: dict[str, Any], private: dict[str, Any]) -> TextModel:
    return text.build(architecture, private, seed=1)


def draw(model: TextModel, size: int, seed: int = 0, texts: list[str] = TEXTS) -> Batch:
    return model.batch(model.encode(texts), size, torch.Generator().manual_seed(seed))


def test_registry() -> None:
    assert encoder_type_names()[:2] == ["text", "image"]
    assert get_encoder_type("text").name == "text"
    with pytest.raises(UserError, match="unknown encoder type 'texts'; did you mean 'text'"):
        get_encoder_type("texts")
    with pytest.raises(UserError, match="there are: text, image"):
        get_encoder_type("sound")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"vocab_size": 64}, "there is no setting 'vocab_size'"),
        ({"hidden_size": 66}, "66 is no multiple of twice num_attention_heads"),
        ({"sequence_length": 1024}, "more than max_position_embeddings"),
    ],
)
def test_wrong_architecture(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        text.architecture(overrides)


def test_architecture_is_plain_json_and_complete(architecture: dict[str, Any]) -> None:
    assert json.loads(json.dumps(architecture)) == architecture
    assert text.architecture(architecture) == architecture
    assert architecture["hidden_size"] == 16 and architecture["local_attention"] == 128


def test_no_text(architecture: dict[str, Any], model: TextModel) -> None:
    with pytest.raises(UserError, match="every document of the corpus is empty"):
        text.fit_private(["", ""], architecture, {}, {})
    with pytest.raises(UserError, match="the corpus is empty"):
        model.encode([])


def test_shared_parameters_are_those_of_initial(architecture: dict[str, Any], model: TextModel) -> None:
    initial, shared = text.initial(architecture, 5), model.shared_parameters()
    assert [(n, t.shape) for n, t in initial.items()] == [(n, p.shape) for n, p in shared.items()]
    assert next(iter(shared)) == "embeddings.norm.weight" and list(shared)[-1] == "final_norm.weight"
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in initial.values())


def test_initial_follows_from_the_seed_and_disturbs_nothing(architecture: dict[str, Any]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (text.initial(architecture, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), expected), "the caller's random numbers go on"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_private_and_shared_are_disjoint_and_complete(model: TextModel) -> None:
    shared, private = model.shared_parameters(), model.private_parameters()
    ids = {id(p) for p in shared.values()}, {id(p) for p in private.values()}
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {id(p) for p in model.parameters()}
    assert len(ids[1]) == len(private), "the embeddings are tied to the decoder and appear once"
    embeddings = model.network.model.embeddings.tok_embeddings.weight
    assert model.network.decoder.weight is embeddings and id(embeddings) in ids[1]
    assert not any(model.entries in p.shape for p in shared.values()), "nothing of the vocabulary is shared"


def test_private_parts_follow_from_the_seed(architecture: dict[str, Any], private: dict[str, Any]) -> None:
    one, same, other = (text.build(architecture, private, seed).private_parameters() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(*(p["network.model.embeddings.tok_embeddings.weight"] for p in (one, other)))


def test_private_spec_is_plain_json_and_repeatable(architecture: dict[str, Any], private: dict[str, Any]) -> None:
    assert json.loads(json.dumps(private)) == private
    assert text.fit_private(TEXTS, architecture, {"vocabulary": 300}, {}) == private


def test_bytes_vocabulary_knows_every_text(architecture: dict[str, Any]) -> None:
    model = text.build(architecture, text.fit_private(TEXTS, architecture, {"vocabulary": "bytes"}, {}), seed=0)
    assert model.entries == SMALLEST
    odd = "naïve 東京 🙂 \x00"
    (ids,) = model.vocabulary.tokenise([odd])
    assert len(ids) == len(odd.encode()) + 1
    assert model.tokenizer.decode(ids[:-1].tolist()) == odd


def test_encode_packs_texts_with_separators(model: TextModel) -> None:
    encoded = model.encode(TEXTS)
    assert encoded.dtype == np.uint16 and (encoded == SEPARATOR_ID).sum() == len(TEXTS)
    parts = np.split(encoded, np.flatnonzero(encoded == SEPARATOR_ID)[:-1] + 1)
    assert [model.tokenizer.decode(part[:-1].tolist()) for part in parts] == TEXTS


@pytest.mark.parametrize("between", [" ", "-", ""])
def test_long_texts_in_pieces_are_the_same_text(model: TextModel, between: str) -> None:
    long = between.join(WORDS * 3000)
    ids, empty = model.vocabulary.tokenise([long, ""])
    assert model.tokenizer.decode(ids[:-1].tolist()) == long and list(empty) == [SEPARATOR_ID]
    if between == " ":
        assert ids.tolist() == model.tokenizer.encode(long).ids, "a cut before a space changes no token"


def test_batches_follow_from_the_generator(model: TextModel) -> None:
    one, same, other = draw(model, 8, 1), draw(model, 8, 1), draw(model, 8, 2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["labels"], other["labels"])
    torch.manual_seed(9)
    assert torch.equal(draw(model, 8, 1)["input_ids"], one["input_ids"]), "not of torch's global generator"


def test_masking_is_berts(architecture: dict[str, Any], private: dict[str, Any]) -> None:
    model = text.build({**architecture, "mask_rate": 0.25}, private, seed=0)
    batch = draw(model, 4000)
    shown, labels = batch["input_ids"], batch["labels"]
    assert shown.shape == labels.shape == (4000, 16)
    masked = labels >= 0
    assert (masked.sum(dim=1) == 4).all(), "a quarter of 16, in every window"
    assert (labels[masked] >= len(SPECIAL)).all(), "a separator is never asked for"
    shares = [
        (shown[masked] == MASK_ID).float().mean(),
        (shown[masked] == labels[masked]).float().mean(),
    ]
    assert shares[0] == pytest.approx(0.8, abs=0.02)
    assert shares[1] == pytest.approx(0.1, abs=0.02)
    assert not (shown[~masked] == MASK_ID).any()
    # what is not masked is shown as it is: put the labels back and every window is a piece of the corpus
    corpus = model.encode(TEXTS).astype("<u2").tobytes()
    for window in torch.where(masked, labels, shown)[:50].numpy():
        assert window.astype("<u2").tobytes() in corpus


def test_only_masked_positions_count(model: TextModel) -> None:
    batch = draw(model, 8)
    logits = model.network(input_ids=batch["input_ids"]).logits
    masked = batch["labels"] >= 0
    expected = -logits.log_softmax(-1)[masked].gather(1, batch["labels"][masked][:, None]).mean()
    assert model.loss(batch).item() == pytest.approx(expected.item(), abs=1e-5)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    loss = model.loss(nothing)
    loss.backward()
    assert loss.item() == 0, "finite, even if a window is all separators"


@pytest.mark.parametrize("texts", [["a"], ["", "", ""], ["ab cd"]])
def test_a_corpus_shorter_than_a_window_works(model: TextModel, texts: list[str]) -> None:
    batch = draw(model, 4, texts=texts)
    assert batch["input_ids"].shape == (4, len(model.encode(texts)))
    assert torch.isfinite(model.loss(batch))


def test_it_learns(model: TextModel) -> None:
    encoded, generator = model.encode(TEXTS), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        loss = model.loss(model.batch(encoded, 16, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(model.entries), rel=0.1), "starts at the loss of a uniform guess"
    assert np.mean(losses[-10:]) < losses[0] - 1.5
    assert all(p.grad is not None for p in model.parameters())


def test_features_do_not_depend_on_the_company(model: TextModel) -> None:
    texts = [*TEXTS[:5], "x", "", " ".join(WORDS * 40)]
    together = model.features(texts)
    assert together.dtype == torch.float32 and not together.requires_grad and len(together) == len(texts)
    alone = torch.cat([model.features([one]) for one in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.isfinite(together).all()
    assert torch.allclose(model.features(texts[::-1]), together.flip(0), atol=1e-5)


def test_features_see_as_much_of_a_long_text_as_is_set(architecture: dict[str, Any]) -> None:
    private = text.fit_private(TEXTS, architecture, {"vocabulary": "bytes", "feature_tokens": 40}, {})
    model = text.build(architecture, private, seed=0)
    same = model.features(["a" * 40 + "b" * 100, "a" * 40 + "c" * 100])
    assert torch.allclose(same[0], same[1], atol=1e-6)
    other = model.features(["a" * 39 + "b" * 100])
    assert not torch.allclose(same[0], other[0], atol=1e-3)


def test_shared_export_opens_with_auto_model(tmp_path: Path, architecture: dict[str, Any]) -> None:
    tensors = text.initial(architecture, 7)
    text.export_shared(tmp_path, architecture, tensors, "# card", {})
    assert (tmp_path / "README.md").read_text() == "# card"
    opened, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened).__name__ == "ModernBertModel"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    state = opened.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    private_words = sum(p.numel() for n, p in opened.named_parameters() if n not in tensors)
    assert private_words == architecture["hidden_size"], "one unused entry: the vocabulary is the reader's to bring"
    assert opened(inputs_embeds=torch.zeros(1, 3, 16)).last_hidden_state.shape == (1, 3, 16)

    found, loaded = text.architecture_of(tmp_path)
    assert {**found, "global_attn_every_n_layers": 3} == architecture
    assert list(loaded) == list(tensors) and all(torch.equal(loaded[n], t) for n, t in tensors.items())


def test_trunk_computes_the_same_after_the_export(
    tmp_path: Path, architecture: dict[str, Any], model: TextModel
) -> None:
    tensors = {name: p.detach() for name, p in model.shared_parameters().items()}
    text.export_shared(tmp_path, architecture, tensors, "", {})
    ids = draw(model, 2)["input_ids"]
    embedded = model.network.model.embeddings.tok_embeddings(ids)
    opened = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(
        opened(inputs_embeds=embedded).last_hidden_state, model.network.model(input_ids=ids).last_hidden_state
    )


def test_export_refuses_tensors_of_another_architecture(tmp_path: Path, architecture: dict[str, Any]) -> None:
    other = text.initial({**architecture, "intermediate_size": 32}, 7)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.Wi\.weight"):
        text.export_shared(tmp_path, architecture, other, "", {})
    with pytest.raises(ValueError, match="were expected"):
        text.export_shared(tmp_path, architecture, {}, "", {})


def test_node_export_opens_with_the_auto_classes(tmp_path: Path, model: TextModel) -> None:
    model.export(tmp_path)
    opened, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id) == (MASK_ID, 0, SEPARATOR_ID)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    (ids,) = model.vocabulary.tokenise(TEXTS[:1])
    assert inputs["input_ids"][0].tolist() == ids.tolist(), "the exported tokenizer separates as training did"
    with torch.no_grad():
        before = model.network(input_ids=inputs["input_ids"]).logits
        assert torch.equal(opened(input_ids=inputs["input_ids"]).logits, before)
    masked = tokenizer(f"the {tokenizer.mask_token} trains", return_tensors="pt")["input_ids"][0]
    assert MASK_ID in masked.tolist()
    padded = tokenizer([TEXTS[0], "a"], padding=True, return_tensors="pt")
    assert padded["attention_mask"][1].sum() == 2

    _, loaded = text.architecture_of(tmp_path)
    assert all(torch.equal(loaded[n], p) for n, p in model.shared_parameters().items())


def test_continue_from_any_modernbert(tmp_path: Path) -> None:
    config = ModernBertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0, global_attn_every_n_layers=2, attention_bias=True, local_attention=8, sep_token_id=1,
        cls_token_id=1, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    theirs = ModernBertForMaskedLM(config)
    theirs.save_pretrained(tmp_path)
    architecture, tensors = text.architecture_of(tmp_path)
    assert (architecture["vocabulary"], architecture["shared"], architecture["vocab_size"]) == ("shared", "all", 50)
    assert set(tensors) == {name for name, _ in theirs.named_parameters()} - {"decoder.bias"}
    assert all(torch.equal(tensors[name], theirs.state_dict()[name]) for name in tensors)
    assert architecture["attention_bias"] and architecture["local_attention"] == 8
    assert architecture["max_position_embeddings"] == 8192 and architecture["sequence_length"] == 32

    wanted = {"sequence_length": 64, "mask_rate": 0.15, "hidden_size": 24}
    again, same = text.architecture_of(tmp_path, wanted)
    assert again == {**architecture, **wanted} and list(same) == list(tensors)
    trunk, shared = text.architecture_of(tmp_path, {"shared": "trunk"})
    assert trunk["shared"] == "trunk" and set(shared) < {name.removeprefix("model.") for name in tensors}
    with pytest.raises(UserError, match=r"has hidden_size 24, and architecture.hidden_size says 48; leave it out: who"):
        text.architecture_of(tmp_path, {"hidden_size": 48})


def test_directories_that_are_no_model_of_this_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        text.architecture_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not readable as JSON"):
        text.architecture_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="describes a 'gpt2' model; this encoder type continues from modernbert or "):
        text.architecture_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "modernbert"}')
    with pytest.raises(UserError, match="does not open as a model"):
        text.architecture_of(tmp_path)


def test_a_directory_that_lacks_a_shared_tensor(tmp_path: Path, architecture: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    text.export_shared(tmp_path, architecture, text.initial(architecture, 7), "", {})
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layers.1.mlp.Wo.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 shared tensors, 'layers\.1\.mlp\.Wo\.weight' the first"):
        text.architecture_of(tmp_path)
