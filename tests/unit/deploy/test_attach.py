"""`attach`: an export and some texts become a model that transformers opens, and what was trained is better for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ModernBertForMaskedLM,
)

from common.cards import is_card
from common.encoders import get_encoder_type, masked_lm, vocabulary
from common.encoders.text_model import TextModel
from common.errors import UserError
from common.numbers.parameters import ParameterSet
from deploy.attach import AttachBudget, attach, attached
from deploy.masked_model import MaskedLanguageModel, fast_tokenizer
from tests.unit.deploy.conftest import Command

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
TEXTS = [
    f"the {kind} of patient {i} was seen on day {i % 7} and again on day {i % 5}" for i in range(60) for kind in "ab"
]
BUDGET = AttachBudget(frozen_steps=20, steps=20, lr=2e-2, batch_size=8)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A master's export with a trunk alone."""
    text = get_encoder_type("text")
    architecture = text.architecture({**SMALL, "vocabulary": "private"})
    tensors = ParameterSet.from_tensors(text.initial(architecture, 3)).tensors()
    text.export_shared(tmp_path / "encoder", architecture, tensors, "# Shared encoder text-1\n", {})
    return tmp_path / "encoder"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A master's export with the vocabulary that everybody uses."""
    return exported_whole(tmp_path / "whole-encoder")[0]


def exported_whole(directory: Path) -> tuple[Path, TextModel]:
    """The export, and a node's model around it whose private corrections are not zero."""
    text = get_encoder_type("text")
    words = directory.with_name("words.jsonl")
    words.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    architecture, assets = text.assets(text.architecture({**SMALL, "entries": 300}), {"reference": str(words)})
    text.export_shared(directory, architecture, text.initial(architecture, 3), "# Shared encoder text-1\n", assets)
    model = text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), 0)
    assert isinstance(model, TextModel)
    for correction in model.adapters.values():
        torch.nn.init.normal_(correction.up, std=0.1)
    return directory, model


def trunk(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
        if "layers." in name
    }


def test_a_trunk_gets_a_vocabulary_and_a_head_and_opens_everywhere(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "whole"
    model, tokenizer = attach(encoder, TEXTS, entries=300, out=out, budget=BUDGET)
    assert isinstance(model, ModernBertForMaskedLM) and len(tokenizer) == 300 == model.config.vocab_size
    opened, report = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    again = AutoTokenizer.from_pretrained(out)
    inputs = again(TEXTS[0], return_tensors="pt")
    assert inputs["input_ids"].tolist() == tokenizer(TEXTS[0], return_tensors="pt")["input_ids"].tolist()
    assert again.model_max_length == 512 == model.config.max_position_embeddings
    assert again.mask_token_id == vocabulary.MASK_ID == tokenizer.mask_token_id
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    card = (out / "README.md").read_text()
    assert is_card(card) and "Shared encoder text-1, fitted to" in card and "trunk frozen" in card
    for name in [module["path"] for module in json.loads((out / "modules.json").read_text())]:
        assert (out / name).is_dir()


def test_the_page_on_using_it_reads_features_that_tell_texts_apart_whatever_stands_beside_them(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines are run as they stand there, and again with a long text in the batch: padding changes nothing."""
    attach(encoder, TEXTS, entries=300, out=tmp_path / "mine", budget=BUDGET)
    page = (Path(__file__).parents[3] / "docs/use-the-encoder.md").read_text()
    [lines] = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "features = (hidden * mask)" in block
    ]
    monkeypatch.chdir(tmp_path)
    alone, beside = {}, {}
    exec(lines, alone)
    exec(lines.replace('documents."]', 'documents.", "a long one " * 30]'), beside)
    assert alone["features"].shape == (2, 16) and beside["features"].shape == (3, 16)
    assert torch.allclose(alone["features"], beside["features"][:2], atol=1e-5)
    assert not torch.allclose(alone["features"][0], alone["features"][1], atol=1e-2)


@pytest.mark.parametrize(("frozen", "free"), [(10, 0), (0, 10)])
def test_the_trunk_stands_still_while_it_is_frozen_and_moves_after(
    encoder: Path, tmp_path: Path, frozen: int, free: int
) -> None:
    out = tmp_path / "whole"
    attach(encoder, TEXTS, entries=300, out=out, budget=AttachBudget(frozen_steps=frozen, steps=free, lr=2e-2))
    before, after = trunk(encoder), trunk(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before) is (free == 0)


def figures(encoder: Path, texts: list[str] = TEXTS, **changes: object):  # type: ignore[no-untyped-def]
    usual = {"tokenizer": None, "entries": 300, "own_vocabulary": False, "out": None, "budget": BUDGET, "device": "cpu"}
    return attached(encoder, texts, progress=lambda *_: None, **{**usual, **changes})  # type: ignore[arg-type]


def test_the_held_out_loss_falls_in_both_stages_and_the_best_is_kept(encoder: Path) -> None:
    found = figures(encoder)
    assert found.before > found.after_frozen > found.after_free
    assert found.before == pytest.approx(5.7, abs=0.6), "nothing is known yet: the logarithm of 300 entries"
    # a rate that only destroys: training stops early, and what is kept is what was there
    wild = figures(encoder, budget=AttachBudget(frozen_steps=50, steps=50, lr=1e4))
    assert wild.after_free <= wild.after_frozen <= wild.before
    assert wild.frozen_steps == wild.free_steps == 30


def test_an_export_with_a_vocabulary_keeps_it_unless_another_is_asked_for(encoder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    attach(encoder, TEXTS, entries=300, out=first, budget=BUDGET)
    untouched = AttachBudget(frozen_steps=5, steps=0)
    kept = figures(first, budget=untouched)
    assert len(kept.tokenizer) == 300 and kept.frozen_steps == 0, "nothing is missing, so nothing is fitted alone"
    assert torch.equal(kept.model.get_input_embeddings().weight, embeddings(first))
    other = figures(first, budget=untouched, own_vocabulary=True, entries=280)
    assert len(other.tokenizer) == 280 and other.frozen_steps == 5
    given = fast_tokenizer(vocabulary.train_vocabulary(["other words entirely"] * 3, 270))
    found = figures(first, budget=AttachBudget(frozen_steps=0, steps=0), tokenizer=given)
    assert found.tokenizer is given and found.model.config.vocab_size == len(given)
    same = dict(found.model.named_parameters())["model.layers.0.mlp.Wi.weight"]
    assert torch.equal(same, dict(kept.model.named_parameters())["model.layers.0.mlp.Wi.weight"])
    head = dict(found.model.named_parameters())["head.dense.weight"]
    assert torch.equal(head, dict(kept.model.named_parameters())["head.dense.weight"]), "a head fits any vocabulary"


def test_an_export_with_the_shared_vocabulary_lacks_nothing_and_is_trained_on_as_it_is(
    whole: Path, tmp_path: Path
) -> None:
    before = AutoModelForMaskedLM.from_pretrained(whole)
    found = figures(whole, out=tmp_path / "mine")
    assert (found.lacked, found.frozen_steps) == (False, 0) and found.before == found.after_frozen > found.after_free
    ours, theirs = (
        tokenizer(TEXTS[0])["input_ids"] for tokenizer in (found.tokenizer, AutoTokenizer.from_pretrained(whole))
    )
    assert ours == theirs and len(found.tokenizer) == before.config.vocab_size
    assert found.model.get_output_embeddings().weight is found.model.get_input_embeddings().weight, "still tied"
    assert found.model.get_output_embeddings().bias.any(), "zero in the export, and learned now"
    _, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    card = (tmp_path / "mine/README.md").read_text()
    assert "those that the encoder came with" in card and "trunk frozen" not in card
    # what is left of it under another vocabulary is encoder and head
    other = figures(whole, own_vocabulary=True, entries=280, budget=AttachBudget(frozen_steps=0, steps=0))
    assert other.lacked and len(other.tokenizer) == other.model.config.vocab_size == 280
    kept, names = dict(other.model.named_parameters()), dict(before.named_parameters())
    same = {name for name in names if names[name].shape == kept[name].shape and torch.equal(names[name], kept[name])}
    assert names.keys() - same == {"model.embeddings.tok_embeddings.weight", "decoder.bias"}


def test_a_nodes_own_export_is_a_plain_model_too_with_its_decoder_untied(tmp_path: Path) -> None:
    _, node = exported_whole(tmp_path / "encoder")
    (tmp_path / "node").mkdir()
    node.export(tmp_path / "node")
    untouched = figures(tmp_path / "node", budget=AttachBudget(frozen_steps=5, steps=0))
    assert not untouched.lacked and untouched.frozen_steps == 0
    inputs = untouched.tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        theirs, ours = untouched.model(**inputs).logits, node.eval().network(**inputs).logits
    assert torch.allclose(theirs, ours, atol=1e-4), "corrections are in the matrices"
    found = figures(tmp_path / "node", out=tmp_path / "mine")
    assert found.after_free < found.before
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "mine")
    assert not torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, found.model(**inputs).logits)
    other = figures(tmp_path / "node", own_vocabulary=True, entries=280)
    assert other.lacked and other.after_free < other.after_frozen < other.before


def embeddings(directory: Path) -> torch.Tensor:
    return AutoModelForMaskedLM.from_pretrained(directory).get_input_embeddings().weight


def test_any_masked_language_model_of_transformers(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, max_position_embeddings=40, type_vocab_size=1, **SMALL)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    found = figures(tmp_path / "bert")
    assert isinstance(found.model, BertForMaskedLM) and found.after_free < found.before
    assert found.model.get_input_embeddings().weight is found.model.get_output_embeddings().weight, "still tied"


@pytest.mark.parametrize(
    ("model_type", "more"),
    [*((model_type, {}) for model_type in masked_lm.KINDS), ("deberta-v2", {"legacy": False}), ("mpnet", {})],
)
def test_a_loss_is_that_of_the_whole_models_logits_at_masked_tokens(model_type: str, more: dict[str, Any]) -> None:
    """Whether the head runs there alone, or the model is one whose head is not known."""
    small = SMALL if model_type != "distilbert" else {"dim": 16, "hidden_dim": 16, "n_heads": 2, "n_layers": 1}
    config = AutoConfig.for_model(model_type, vocab_size=300, **small, **more, pad_token_id=0)
    network = AutoModelForMaskedLM.from_config(config).eval()
    model = MaskedLanguageModel(network, fast_tokenizer(vocabulary.train_vocabulary(TEXTS, 300)))
    batch = model.batch(model.encode(TEXTS), 4, torch.Generator().manual_seed(0))
    logits = network(input_ids=batch["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert (batch["labels"] >= 0).sum() > 4
    torch.testing.assert_close(model.loss(batch), expected)


def test_what_cannot_be_attached_is_one_line(encoder: Path, tmp_path: Path, command: Command) -> None:
    texts, empty, other = tmp_path / "texts.jsonl", tmp_path / "empty.txt", tmp_path / "other"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    empty.write_text("\n")
    other.mkdir()
    (other / "notes").write_text("mine")
    image = tmp_path / "image"
    kind = get_encoder_type("image")
    architecture = kind.architecture(SMALL)
    kind.export_shared(image, architecture, kind.initial(architecture, 0), "# Shared encoder image-1\n", {})
    for arguments, words in (
        ([tmp_path / "none", "--corpus", texts], "is no exported encoder: it has no config.json"),
        ([image, "--corpus", texts], "does not open as a masked language model"),
        ([encoder, "--corpus", empty], "empty.txt"),
        ([encoder, "--corpus", tmp_path / "no.txt"], "no such file"),
        ([encoder, "--corpus", texts, "--tokenizer", other], "holds no tokenizer that opens"),
        ([encoder, "--corpus", texts, "--vocabulary", 20], "a vocabulary has at least 259 entries"),
        ([encoder, "--corpus", texts, "--out", other], "holds something else than an exported encoder"),
    ):
        code, _, err = command("attach", *arguments, *([] if "--out" in arguments else ["--out", tmp_path / "out"]))
        assert (code, words in err.splitlines()[-1]) == (2, True), err
        assert "Traceback" not in err and not (tmp_path / "out").exists()
    torn = tmp_path / "torn"
    shutil.copytree(encoder, torn)
    kept = {name: tensor for name, tensor in load_file(torn / "model.safetensors").items() if "Wi" not in name}
    save_file(kept, torn / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of the encoder, '.*layers\.0\.mlp\.Wi\.weight' the first"):
        attach(torn, TEXTS, entries=300)
    fast_tokenizer(vocabulary.train_vocabulary(TEXTS, 300)).save_pretrained(encoder)
    with pytest.raises(UserError, match="has 1 embeddings for a vocabulary of 300"):
        attach(encoder, TEXTS)
    with pytest.raises(UserError, match="at least two that differ"):
        attach(encoder, ["alike", "alike"])


def test_the_command_says_the_losses_and_where_the_model_is(
    encoder: Path, whole: Path, tmp_path: Path, command: Command
) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    arguments = ["--corpus", texts, "--out", out, "--vocabulary", 300, "--frozen-steps", 10, "--steps", 10]
    code, printed, err = command("attach", encoder, *arguments)
    assert code == 0, err
    assert "held-out loss 5." in printed and "after 10 steps with the trunk frozen" in printed and str(out) in printed
    assert AutoModelForMaskedLM.from_pretrained(out).config.vocab_size == 300
    code, printed, err = command("attach", whole, "--corpus", texts, "--out", out, "--steps", 10)
    assert code == 0, err
    assert "after 10 steps with all free" in printed and "frozen" not in printed
