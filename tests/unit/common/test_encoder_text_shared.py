"""Encoder type `text` with one vocabulary for all: every model that it knows, private corrections, what travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import AutoModelForMaskedLM, AutoTokenizer

from common.encoders import masked_lm
from common.encoders.base import Batch
from common.encoders.shared_vocabulary import TOKENIZER, make
from common.encoders.text import TextEncoderType
from common.encoders.text_model import WITH_PRIVATE, TextModel
from common.encoders.vocabulary import SMALLEST
from common.errors import UserError

SENTENCE = "the node trains and sends an update to the master which counts it once"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 20 + i % 9)) for i in range(80)]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}

text = TextEncoderType()

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reference") / "texts.txt"
    place.write_text("\n\n".join(TEXTS))
    return place


def prepared(reference: Path, model_type: str, **changes: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    sizes = {"dim": 16, "n_heads": 2, "hidden_dim": 24} if model_type == "distilbert" else SIZES
    given = {"model_type": model_type, "sequence_length": 16, "entries": 300, **sizes, **changes}
    return text.assets(text.architecture(given), {"reference": str(reference)})


def built(reference: Path, model_type: str = "modernbert", **changes: Any) -> TextModel:
    architecture, assets = prepared(reference, model_type, **changes)
    return text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), seed=1)


def train(model: TextModel, steps: int = 25) -> None:
    generator = torch.Generator().manual_seed(2)
    encoded = model.encode(TEXTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model.backward(model.loss(model.batch(encoded, 8, generator)))
        optimizer.step()
    model.eval()


def held_out(model: TextModel) -> Batch:
    model.eval()
    return model.batch(model.encode(TEXTS), 8, torch.Generator().manual_seed(9))


@pytest.mark.parametrize("model_type", masked_lm.KINDS)
def test_every_model_trains_and_both_exports_are_plain_models(tmp_path: Path, reference: Path, model_type: str) -> None:
    architecture, assets = prepared(reference, model_type)
    assert json.loads(json.dumps(architecture)) == architecture
    model = text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), seed=1)
    initial = text.initial(architecture, 5)
    assert [(n, t.shape) for n, t in initial.items()] == [(n, p.shape) for n, p in model.shared_parameters().items()]
    batch = held_out(model)
    before = model.loss(batch)
    assert torch.allclose(before, model.network(**{k: batch[k] for k in ("input_ids", "labels")}).loss, atol=1e-5)
    train(model)
    after = model.loss(batch)
    assert after < before - 0.5, "it learns"

    model.export(tmp_path / "node")
    opened, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "node", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    theirs = opened.eval()(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert torch.allclose(theirs, after, atol=1e-5), "the corrections are in the matrices"

    tensors = {name: parameter.detach() for name, parameter in model.shared_parameters().items()}
    text.export_shared(tmp_path / "shared", architecture, tensors, "# card", assets)
    opened, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "shared", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight, "save and load keep the tie"
    assert not opened.get_output_embeddings().bias.any(), "the bias is each node's own"
    theirs = opened.eval()(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    without = model.loss({**batch, WITH_PRIVATE: torch.tensor(False)})
    assert torch.allclose(theirs, without, atol=1e-5), "what is trained without private parts is what is exported"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "shared")
    (ids,) = model.vocabulary.tokenise(TEXTS[:1])
    assert tokenizer(TEXTS[0])["input_ids"] == ids.tolist()

    again, loaded = text.architecture_of(tmp_path / "shared")
    again, same = text.assets(again, {"tokenizer": str(tmp_path / "shared")})
    assert same == assets and (again["vocab_size"], again["tokens"]) == (300, architecture["tokens"])
    assert list(loaded) == list(tensors) and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert {n: t.shape for n, t in text.initial(again, 0).items()} == {n: t.shape for n, t in tensors.items()}


def test_private_corrections_begin_as_nothing_and_never_travel(reference: Path) -> None:
    model = built(reference)
    batch = held_out(model)
    assert torch.equal(model.loss(batch), model.loss({**batch, WITH_PRIVATE: torch.tensor(False)}))
    private, shared = model.private_parameters(), model.shared_parameters()
    assert not {id(p) for p in private.values()} & {id(p) for p in shared.values()}
    assert {id(p) for p in (*private.values(), *shared.values())} == {id(p) for p in model.parameters()}
    assert sorted(name for name in private if not name.startswith("adapters.")) == ["network.decoder.bias"]
    assert {name.split(".")[1].split("_")[0] for name in private if name.startswith("adapters.")} == {
        "embeddings", "block0", "block1", "decoder",
    }  # fmt: skip
    train(model)
    assert not torch.equal(model.loss({**batch, WITH_PRIVATE: torch.tensor(False)}), model.loss(batch)), "they do now"


def test_a_share_of_the_batches_is_trained_without_them(reference: Path) -> None:
    architecture, assets = prepared(reference, "modernbert")
    drawn = []
    for rest in (0.25, 0.75):
        model = text.build(architecture, text.fit_private(TEXTS, architecture, {"adapter_rest": rest}, assets), seed=1)
        encoded, generator = model.encode(TEXTS), torch.Generator().manual_seed(0)
        model.train()
        drawn.append(sum(bool(model.batch(encoded, 1, generator)[WITH_PRIVATE]) for _ in range(200)) / 200)
        model.eval()
        assert WITH_PRIVATE not in model.batch(encoded, 1, generator)
    assert drawn == pytest.approx([0.75, 0.25], abs=0.08)
    plain = text.build(architecture, text.fit_private(TEXTS, architecture, {"adapter_rank": 0}, assets), seed=1)
    assert list(plain.private_parameters()) == ["network.decoder.bias"]


def test_with_the_trunk_alone_nothing_of_the_vocabulary_travels(reference: Path) -> None:
    model = built(reference, shared="trunk")
    assert not any(model.entries in p.shape for p in model.shared_parameters().values())
    assert "network.model.embeddings.tok_embeddings.weight" in model.private_parameters()


def test_windows_are_framed_where_the_vocabulary_has_a_classifier(tmp_path: Path, reference: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: index for index, word in enumerate([*names, *sorted(set(WORDS))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        architecture, assets = text.assets(
            text.architecture({**SIZES, "model_type": "bert", "sequence_length": 12}), {"tokenizer": str(source)}
        )
        assert architecture["tokens"] == {
            "pad": "[PAD]", "mask": "[MASK]", "separator": "[SEP]", "classifier": "[CLS]",
        }  # fmt: skip
        model = text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), seed=0)
        batch = held_out(model)
        shown, labels = batch["input_ids"], batch["labels"]
        assert shown.shape == (8, 12) and (shown[:, 0] == 2).all() and (shown[:, -1] == 3).all()
        special = torch.tensor([0, 2, 3, 4])
        assert not torch.isin(labels[labels >= 0], special).any(), "special tokens are not predicted"


def test_where_the_vocabulary_comes_from(tmp_path: Path, reference: Path) -> None:
    assert make({}, 999).entries == 2048, "the one that is shipped"
    assert make({"tokenizer": "bytes"}, 999).entries == SMALLEST
    trained = make({"reference": str(reference)}, 280)
    assert trained.entries == 280 and make({"reference": str(reference.parent)}, 280).tokens == trained.tokens
    (tmp_path / "t.json").write_text(trained.tokenizer.to_str())
    again = make({"tokenizer": str(tmp_path / "t.json")}, 5)
    assert again.tokenizer.to_str() == trained.tokenizer.to_str() and again.ids == trained.ids
    (tmp_path / "odd.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for sources, said in [
        ({"tokenizer": str(tmp_path / "odd.json")}, "the tokenizer does not open"),
        ({"tokenizer": str(tmp_path / "empty")}, "does not open as a tokenizer"),
        ({"tokenizer": str(tmp_path / "absent")}, "does not exist; set encoder.tokenizer to"),
        ({"reference": str(tmp_path / "absent")}, "does not exist; set encoder.reference to"),
        ({"reference": str(tmp_path / "empty")}, "holds no texts; encoder.reference takes"),
        ({"reference": str(reference), "tokenizer": "bytes"}, "name a vocabulary each"),
    ]:
        with pytest.raises(UserError, match=said):
            make(sources, 300)


def test_what_an_owner_may_set_and_forbid(reference: Path) -> None:
    architecture, assets = prepared(reference, "modernbert")
    with capture_logs() as logs:
        text.fit_private(TEXTS, architecture, {}, assets)
    assert [entry["event"] for entry in logs if "which of their rows move tells the master" in entry["event"]]
    for settings, given, said in [
        ({"share_embeddings": False}, assets, "share_embeddings = false forbids it"),
        ({}, {}, "its tokenizer.json did not come"),
        ({}, {TOKENIZER: b"\xff"}, "is no text"),
        ({}, {TOKENIZER: b"{}"}, "does not open"),
        ({}, {TOKENIZER: make({}, 0).tokenizer.to_str().encode()}, "has 2,048 entries, not 300"),
    ]:
        with pytest.raises(UserError, match=said):
            text.fit_private(TEXTS, architecture, settings, given)
    with_own = text.fit_private(TEXTS, architecture, {"vocabulary": 280}, assets)
    assert with_own == text.fit_private(TEXTS, architecture, {}, assets), "it is for encoders that have none"
    trunk, assets = prepared(reference, "modernbert", shared="trunk")
    assert text.fit_private(TEXTS, trunk, {"share_embeddings": False}, assets)["tokenizer"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"vocabulary": "private", "shared": "all"}, 'vocabulary "private" shares the trunk alone'),
        ({"entries": 100}, f"entries: input should be a whole number from {SMALLEST}"),
        ({"model_type": "gpt2"}, "model_type: "),
        ({"model_type": "bert", "hiden_size": 16}, "there is no setting 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "bert", "hidden_size": 0.5}, "hidden_size: input should be a whole number"),
        ({"model_type": "bert", "vocab_size": 16}, "there is no setting 'vocab_size'"),
        ({"model_type": "roberta", "max_position_embeddings": 33}, "more than the 31 tokens"),
    ],
)
def test_what_cannot_be(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        text.architecture(overrides)
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_go_together() -> None:
    architecture, _ = text.assets(text.architecture({"model_type": "bert", "hidden_size": 63}), {"tokenizer": "bytes"})
    with pytest.raises(UserError, match="a bert with these settings cannot be made: The hidden size"):
        text.initial(architecture, 0)
