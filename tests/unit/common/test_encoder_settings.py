"""Settings of the built-in encoder types: what is left out has its default, and what is wrong is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from common.encoders.image import ImageEncoderType
from common.encoders.image_settings import ImageArchitecture, ImagePrivate
from common.encoders.lora import LoraTask
from common.encoders.settings import LARGEST, EncoderSettings
from common.encoders.text import TextEncoderType
from common.encoders.text_settings import TextArchitecture, TextPrivate
from common.encoders.vocabulary import SMALLEST
from common.errors import UserError

text, image = TextEncoderType(), ImageEncoderType()
IMAGES = np.zeros((2, 32, 32), np.uint8)

#: What is checked: the model, its name in errors, and the call by which a person's settings reach it.
Case = tuple[type[EncoderSettings], str, Callable[[Mapping[str, Any]], dict[str, Any]]]
CASES: list[Case] = [
    (TextArchitecture, "architecture of type text", text.architecture),
    (ImageArchitecture, "architecture of type image", image.architecture),
    (TextPrivate, "private settings of type text", lambda given: text.fit_private(["a text"], {}, given, {})),
    (ImagePrivate, "private settings of type image", lambda given: image.fit_private(IMAGES, {}, given, {})),
    (LoraTask, "architecture of type text", lambda given: text.architecture({"shared": "lora", **given})),
]
FIELDS = [(case, key) for case in CASES for key in case[0].model_fields]

#: By a default's type, what does not fit it whatever the key is: wrong types, and numbers out of every range.
WRONG: dict[type, list[Any]] = {
    int: ["64", "", True, 64.0, 64.5, None, [64], {"a": 1}, 0, -1, LARGEST + 1, 10**400, float("nan"), float("inf")],
    float: ["0.5", "nan", True, None, [0.5], 0, 0.0, -0.5, float("nan"), float("inf"), float("-inf")],
    bool: [0, 1, "true", "yes", None, 1.0, []],
    str: ["gelo", "", 7, None, True, ["gelu"], b"gelu"],
    # a word that has no default
    type(None): ["gelo", "", 7, True, ["gelu"], b"gelu"],
}


def line_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 3000
    return line


@pytest.mark.parametrize(("case", "key"), FIELDS, ids=lambda value: value if isinstance(value, str) else value[1])
def test_every_field_refuses_what_does_not_fit_in_one_line_that_names_it(case: Case, key: str) -> None:
    model, what, call = case
    default = model.model_fields[key].default
    wrong = WRONG[type(default)]
    if key in ("adapter_rank", "lora_seed"):
        wrong = [value for value in wrong if value != 0]  # none of them is a choice too, and as good a seed as any
    if key == "base":
        wrong = [value for value in wrong if not isinstance(value, str)]  # any word may be the name of a directory
    for value in wrong:
        line = line_of(lambda value=value: call({key: value}))  # type: ignore[misc]
        assert line.startswith(f"{what}: {key}: ") and len(line) > len(f"{what}: {key}: "), value


@pytest.mark.parametrize(("case", "key"), FIELDS, ids=lambda value: value if isinstance(value, str) else value[1])
def test_every_misspelt_key_suggests_the_right_one(case: Case, key: str) -> None:
    model, what, call = case
    wrong = key[:3] + key[4:]
    line = line_of(lambda: call({wrong: model.model_fields[key].default}))
    assert line == f"{what}: there is no setting {wrong!r}; did you mean {key!r}?"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
def test_a_key_like_no_other_lists_those_that_there_are(case: Case) -> None:
    model, what, call = case
    line = line_of(lambda: call({"zzz\nzzz": 1}))
    assert line == rf"{what}: there is no setting 'zzz\nzzz'; there are: {', '.join(sorted(model.model_fields))}"


@pytest.mark.parametrize(
    ("call", "given", "said"),
    [
        (text.architecture, {"hidden_size": 0}, "hidden_size: input should be greater than or equal to 1"),
        (text.architecture, {"hidden_size": 1 << 21}, "hidden_size: input should be less than or equal to 1048576"),
        (text.architecture, {"mask_rate": 1.0}, "mask_rate: input should be less than 1"),
        (text.architecture, {"hidden_activation": "gelo"}, "hidden_activation: 'gelo' is unknown; did you mean 'gelu'"),
        (text.architecture, {"norm_bias": 1}, "norm_bias: input should be a valid boolean"),
        (image.architecture, {"mask_ratio": float("nan")}, "mask_ratio: input should be a finite number"),
        (
            lambda given: text.fit_private(["a text"], {}, given, {}),
            {"vocabulary": "words"},
            f'vocabulary: input should be a whole number from {SMALLEST} to 1,048,576, or "bytes"',
        ),
    ],
)
def test_a_wrong_value_says_what_is_wanted(call: Callable[[Any], Any], given: dict[str, Any], said: str) -> None:
    assert said in line_of(lambda: call(given))


@pytest.mark.parametrize("value", [SMALLEST - 1, LARGEST + 1, "Bytes", 300.0, True, None])
def test_a_vocabulary_out_of_its_bounds(value: Any) -> None:
    assert "vocabulary: input should be a whole number" in line_of(lambda: CASES[2][2]({"vocabulary": value}))
    assert TextPrivate(vocabulary=LARGEST).entries == LARGEST
    assert TextPrivate(vocabulary="bytes").entries == TextPrivate(vocabulary=SMALLEST).entries == SMALLEST


def test_the_dictionaries_that_travel_are_what_they_always_were() -> None:
    """Keys, order, defaults and kinds of numbers: recorded logs hold them as JSON, byte for byte."""
    assert json.dumps(text.architecture({"num_hidden_layers": 1, "hidden_size": 16, "local_rope_theta": 7})) == (
        '{"model_type": "modernbert", "vocabulary": "shared", "entries": 2048, "shared": "all", "sequence_length": 32, '
        '"mask_rate": 0.25, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, '
        '"intermediate_size": 128, "max_position_embeddings": 512, "local_attention": 128, '
        '"global_attn_every_n_layers": 3, "global_rope_theta": 100.0, "local_rope_theta": 7.0, '
        '"hidden_activation": "gelu", "initializer_range": 0.1, "norm_eps": 1e-05, "norm_bias": false, '
        '"attention_bias": false, "mlp_bias": false}'
    )
    assert json.dumps(image.architecture({"qkv_bias": False, "initializer_range": 1})) == (
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, '
        '"hidden_act": "gelu", "initializer_range": 1.0, "layer_norm_eps": 1e-06, "qkv_bias": false, '
        '"mask_ratio": 0.75, "norm_pix_loss": false}'
    )
    assert json.dumps(image.fit_private(IMAGES, {}, {"decoder_hidden_size": 16}, {})) == (
        '{"patch_size": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, '
        '"decoder_num_attention_heads": 4, "decoder_intermediate_size": 128, "image_size": 32, "num_channels": 1, '
        '"mean": [0.0], "std": [1.0]}'
    )
    assert list(text.fit_private(["a text"], {}, {"vocabulary": "bytes"}, {})) == ["tokenizer", "feature_tokens"]


def test_settings_do_not_change_after_they_were_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ImagePrivate().patch_size = 7  # type: ignore[misc]
