"""Cards: front matter that a hub reads, a title that tells ours from others', a section that is written again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.cards import TITLE, architecture, front_matter, is_card, loading, table, title, with_evaluation
from common.errors import UserError
from common.exports import check_export_directory

WORDS = st.one_of(
    st.none(), st.text(st.characters(min_codepoint=32, exclude_categories=("Cs",)), min_size=1, max_size=40)
)


def parsed(card: str) -> dict[str, object]:
    _, front, _ = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


@given(WORDS, WORDS, st.sampled_from(["text", "image", "sounds"]), st.booleans())
def test_front_matter_says_what_it_was_given_whatever_that_is(
    license: str | None, language: str | None, kind: str, whole: bool
) -> None:
    front = parsed(front_matter(kind, whole=whole, license=license, language=language))
    assert (front.get("license"), front.get("language")) == (license, language)
    assert front["tags"] == ["shared-encoder", "federated-learning", kind]
    assert ("library_name" in front) == ("pipeline_tag" in front) == (kind != "sounds")


def test_what_yaml_would_take_for_something_else_stays_a_word() -> None:
    """Norwegian is `no`, which YAML reads as false."""
    for word in ("no", "on", "1.0", "cc-by-4.0", "apache-2.0", "en: de", "# x", "null", "de, fr"):
        assert parsed(front_matter("text", whole=True, license=word))["license"] == word
    assert "license: apache-2.0\n" in front_matter("text", whole=True, license="apache-2.0"), (
        "and reads as one writes it"
    )


@pytest.mark.parametrize(
    "front", ["", front_matter("text", whole=True, license="mit"), front_matter("sounds", whole=False)]
)
def test_an_export_is_recognised_with_front_matter_and_without(tmp_path: Path, front: str) -> None:
    (tmp_path / "README.md").write_text(f"{front}{TITLE}text-1\n\nType `text`.\n")
    check_export_directory(tmp_path)
    assert title((tmp_path / "README.md").read_text()) == "text-1"


@pytest.mark.parametrize(
    "text",
    [
        "# My project\n",
        f"---\nlicense: mit\n---\n# My project\n\n{TITLE}text-1\n",
        f"---\nlicense: mit\n{TITLE}text-1\n",
        f"Notes\n{TITLE}text-1\n",
        "---\n",
        "",
    ],
)
def test_what_is_somebody_elses_stays_so(tmp_path: Path, text: str) -> None:
    assert not is_card(text)
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match="something else"):
        check_export_directory(tmp_path)


def test_an_evaluation_is_written_before_the_limits_and_written_over() -> None:
    card = f"{TITLE}text-1\n\nIt is one.\n\n## Training\n\nlong\n\n## Limits\n\nsome\n\n## Lineage\n\nlog\n"
    once = with_evaluation(card, "| first |")
    assert once.index("## Training") < once.index("## Evaluation\n\n| first |\n\n## Limits") < once.index("## Lineage")
    assert with_evaluation(once, "| first |") == once
    twice = with_evaluation(once, "| second |")
    assert twice == once.replace("first", "second"), "nothing else of the card is touched"
    older = f"{TITLE}text-1\n\nType `text`.\n"
    assert with_evaluation(with_evaluation(older, "a"), "b") == f"{older}\n## Evaluation\n\nb\n"


def test_tables_hold_what_would_break_them() -> None:
    assert table(("a", "b"), [("x|y", "1\n2")]) == "| a | b |\n|---|---:|\n| x\\|y | 1 2 |\n"
    assert "| `width` | 8 |" in architecture({"width": 8, "tensors": [1, 2]}) and "tensors" not in architecture(
        {"tensors": []}
    )


def test_how_to_load_it_is_three_lines_of_python() -> None:
    for kind in ("text", "image"):
        for whole in (False, True):
            code = loading(kind, whole=whole).split("```python\n")[1].split("\n```")[0]
            assert len(code.splitlines()) == 3
            compile(code, "card", "exec")
    assert loading("sounds", whole=True) == ""
