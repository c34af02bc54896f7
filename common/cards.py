"""The README.md of an export, in the form that model hubs read: front matter, then how to load it and what it is.

Pure text. The title behind the front matter is how an export is recognised as ours: see `common.exports`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

#: How the first line behind the front matter begins.
TITLE = "# Shared encoder "
_FENCE = "---\n"
_EVALUATION = "## Evaluation"
_LIMITS = "## Limits"
#: Words that YAML 1.1 takes for booleans and nothing; `no` is also the code of a language.
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}

#: What a hub files a model under: by encoder type, the encoder alone and the whole model with its head.
_PIPELINES = {
    "text": ("feature-extraction", "fill-mask"),
    "image": ("image-feature-extraction", "image-feature-extraction"),
}
_LOADING = {
    ("text", False): (
        "from transformers import AutoModel",
        'model = AutoModel.from_pretrained("DIRECTORY")  # the encoder alone: it has no vocabulary yet',
        "features = model(inputs_embeds=embedded).last_hidden_state  # or: shared-encoder attach DIRECTORY --corpus …",
    ),
    ("text", True): (
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        'model, tokenizer = (each.from_pretrained("DIRECTORY") for each in (AutoModelForMaskedLM, AutoTokenizer))',
        'logits = model(**tokenizer("some text", return_tensors="pt")).logits',
    ),
    ("image", False): (
        "from transformers import AutoModel",
        'model = AutoModel.from_pretrained("DIRECTORY")  # its patch stem is a placeholder: put your own there',
        "features = model(pixel_values=pixels).last_hidden_state.mean(dim=1)",
    ),
    ("image", True): (
        "from transformers import AutoImageProcessor, AutoModel",
        'processor, model = AutoImageProcessor.from_pretrained("DIRECTORY"), AutoModel.from_pretrained("DIRECTORY")',
        'features = model(**processor(image, return_tensors="pt")).last_hidden_state.mean(dim=1)',
    ),
}


def is_whole(architecture: Mapping[str, Any]) -> bool:
    """Whether the export is a whole model: vocabulary, encoder and head, an updated base too."""
    return architecture.get("shared") in ("all", "lora")


def front_matter(
    encoder_type: str, *, whole: bool, license: str | None = None, language: str | None = None, tags: Sequence[str] = ()
) -> str:
    """The YAML lines that a hub reads, fences included. `whole`: with vocabulary or stem, and head.

    A type of another package says neither library nor pipeline, because only that package knows them.
    """
    fields: dict[str, str] = {}
    if encoder_type in _PIPELINES:
        fields = {"library_name": "transformers", "pipeline_tag": _PIPELINES[encoder_type][whole]}
    fields |= {key: value for key, value in (("license", license), ("language", language)) if value}
    lines = [f"{key}: {_scalar(value)}" for key, value in fields.items()]
    lines += ["tags:", *(f"- {_scalar(tag)}" for tag in ("shared-encoder", "federated-learning", encoder_type, *tags))]
    return _FENCE + "\n".join(lines) + "\n" + _FENCE + "\n"


def title(text: str) -> str:
    """What follows TITLE in the first heading of a card, front matter or not; empty if the text is no card of ours."""
    body = text
    if text.startswith(_FENCE):
        _, _, body = text[len(_FENCE) :].partition(f"\n{_FENCE}")
    heading, _, _ = body.lstrip("\n").partition("\n")
    return heading.removeprefix(TITLE) if heading.startswith(TITLE) else ""


def is_card(text: str) -> bool:
    """Whether a README.md, or its beginning, is one of an export of ours."""
    return bool(title(text))


def loading(encoder_type: str, *, whole: bool) -> str:
    """The section on how to open it; empty for a type of another package."""
    lines = _LOADING.get((encoder_type, whole))
    return "" if lines is None else "## How to load it\n\n```python\n" + "\n".join(lines) + "\n```\n\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of Markdown, the first column to the left and the others to the right."""
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def architecture(of: Mapping[str, Any]) -> str:
    """The section that says how the encoder is built."""
    plain = {key: value for key, value in of.items() if isinstance(value, str | int | float | bool) or value is None}
    return "## Architecture\n\n" + table(("setting", "value"), [(f"`{key}`", plain[key]) for key in plain]) + "\n"


def with_evaluation(card: str, figures: str) -> str:
    """A card with this text as its section of evaluation, in the place of an earlier one; before the limits."""
    head, heading, after = card.partition(f"\n{_EVALUATION}\n")
    if heading:
        _, next_heading, rest = after.partition("\n## ")
        tail = f"## {rest}" if next_heading else ""
    else:
        head, limits, rest = card.partition(f"\n{_LIMITS}\n")
        tail = f"{_LIMITS}\n{rest}" if limits else ""
    return f"{head.rstrip()}\n\n{_EVALUATION}\n\n{figures.strip()}\n" + (f"\n{tail}" if tail else "")


def _scalar(value: str) -> str:
    """A string of YAML: plain where nothing in it could mean something else, in double quotes otherwise."""
    plain = value.isascii() and value.replace("-", "").replace(".", "").isalnum() and value[0].isalpha()
    if plain and value.lower() not in _YAML_WORDS:
        return value
    # JSON's escapes are YAML's too, but for pairs of surrogates
    return '"' + "".join(json.dumps(c)[1:-1] if ord(c) < 1 << 16 else f"\\U{ord(c):08x}" for c in value) + '"'
