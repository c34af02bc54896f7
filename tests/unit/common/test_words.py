"""Counting words, and the vocabulary of the counts: pure, bounded, and whatever the order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.encoders import get_encoder_type, shared_vocabulary, words
from common.encoders.vocabulary import Vocabulary
from common.encoders.words import MOST_DOCUMENTS, WordList, shown, summed, training_text, word_list, written
from common.errors import UserError, WordsNeeded
from common.wire.codec import encode
from common.wire.fields import MAX_COUNT, MAX_WORD_BYTES, MAX_WORD_LENGTH, MAX_WORDS
from common.wire.to_master import Words

#: Texts of few different words, so that some are in many; and of anything at all.
SOME = st.lists(st.sampled_from(["fever", "Fever", "the", "naïve", "x2", "2024", "a_b", "müde", "¼"]), max_size=6)
TEXTS = st.lists(SOME.map(" ".join) | st.text(max_size=20), max_size=30)


@settings(deadline=None)
@given(TEXTS, st.integers(2, 5), st.randoms(use_true_random=False))
def test_a_word_is_counted_once_in_each_different_document_and_only_what_is_in_enough_is_there(
    texts: list[str], least: int, random: Any
) -> None:
    found = word_list(texts, least)
    again = [*texts, *texts[:3]]
    random.shuffle(again)
    assert word_list(again, least) == found, "neither the order nor what is there twice makes a difference"
    different = set(texts)
    assert found.documents == len(different)
    for word, count in found.words:
        assert word.isalpha() and least <= count <= sum(word in text for text in different)
    # the word itself, with nothing about it that is part of one
    for word in ("fever", "the", "müde"):
        plain = sum(word in text.split(" ") for text in different)
        assert dict(found.words).get(word, 0) >= (plain if plain >= least else 0)
    lines = [line.split("\t") for line in shown(found).splitlines() if not line.startswith("#")]
    assert [(word, int(count)) for count, word in lines] == list(found.words)


def test_numbers_and_what_has_a_digit_in_it_stay_here_and_so_does_what_is_too_long() -> None:
    text = f"Patient 4711 B12 x_y m² {'w' * (MAX_WORD_LENGTH + 1)} {'v' * MAX_WORD_LENGTH} don't"
    found = word_list([f"{text} {n}" for n in range(3)], 2)
    assert {word for word, _ in found.words} == {"Patient", "x", "y", "v" * MAX_WORD_LENGTH, "don", "t"}


def test_a_contribution_is_bounded_in_words_and_bytes_and_travels_below_a_mebibyte() -> None:
    letters = [chr(0x4E00 + n) for n in range(180)]
    short = [a + b for a in letters for b in letters]
    often = " ".join(short[:9])
    found = word_list([" ".join(short), f"{often} " + " ".join(short[::-1]), often], 2)
    assert len(found.words) == MAX_WORDS < len(short) and {w for w, _ in found.words[:9]} == set(short[:9])
    wide = [a + b + "𐐷" * (MAX_WORD_LENGTH - 2) for a in letters for b in letters][:MAX_WORDS]
    broad = word_list([" ".join(wide), " ".join(wide[::-1])], 2)
    assert MAX_WORD_BYTES - 256 < sum(len(word.encode()) for word, _ in broad.words) <= MAX_WORD_BYTES
    for each in (found, broad):
        plain = {"node": "n" * 64, "incarnation": "i" * 64, "encoder": "e" * 64}
        many = [(word, (1 << 62) - 1) for word, _ in each.words]
        assert len(encode(Words(**plain, documents=(1 << 62) - 1, words=many))) < 1 << 20
    with pytest.raises(ValidationError, match="bytes"):
        Words(node="a", incarnation="i", encoder="e", documents=2, words=[(word, 2) for word in wide])


@pytest.mark.parametrize(
    "changes",
    [
        {"words": [("fever", 2), ("fever", 3)]},
        {"words": [("fever", 1)]},
        {"words": [("fever", 6)]},
        {"words": [("fever", 4)], "min_documents": 5},
        {"min_documents": 1},
        {"words": [("two words", 2)]},
        {"words": [("", 2)]},
        {"words": [("line\n", 2)]},
        {"words": [("a1", 2)]},
        {"words": [("don't", 2)]},
        {"words": [("\u200b", 2)]},
        {"words": [("w" * (MAX_WORD_LENGTH + 1), 2)]},
        {"words": [(str(n), 2) for n in range(MAX_WORDS + 1)]},
    ],
)
def test_what_no_node_may_contribute_is_no_message(changes: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"node": "a", "incarnation": "i", "encoder": "e", "documents": 5}
    assert Words(**plain, words=[("fever", 2)])
    with pytest.raises(ValidationError):
        Words(**{**plain, **changes})


@settings(deadline=None)
@given(st.permutations(["ab", "abc", "bcd", "xab"]), st.permutations([2, 3, 5]))
def test_the_vocabulary_is_that_of_the_sums_in_whatever_order_they_come(kinds: list[str], counts: list[int]) -> None:
    lists = [WordList(9, 2, tuple((kind, count) for kind in kinds)) for count in counts]
    total = summed(lists)
    assert total == dict.fromkeys(kinds, 10)
    made = shared_vocabulary.agreed({words.SOURCE: written(total)}, 262)
    plain = shared_vocabulary.agreed({words.SOURCE: json.dumps(dict.fromkeys(reversed(kinds), 10))}, 262)
    assert made.tokenizer.to_str() == plain.tokenizer.to_str()


LISTS = st.lists(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(2, MAX_COUNT), min_size=1).flatmap(
        lambda counts: st.integers(max(counts.values()), MAX_COUNT).map(
            lambda documents: WordList(documents, 2, tuple(counts.items()))
        )
    ),
    max_size=5,
)


@settings(deadline=None)
@given(LISTS, st.randoms(use_true_random=False))
def test_no_list_counts_for_more_than_so_many_documents_whatever_it_claims(lists: list[WordList], random: Any) -> None:
    total = summed(lists)
    for word, count in total.items():
        assert sum(word in dict(each.words) for each in lists) <= count <= MOST_DOCUMENTS * len(lists)
    shuffled = random.sample(lists, len(lists))
    assert summed(shuffled) == total
    for each in lists:
        alone = summed([each])
        # its own order of words stays, and a list that is small enough as it is
        assert all(alone[a] <= alone[b] for a, m in each.words for b, n in each.words if m <= n)
        assert each.documents > MOST_DOCUMENTS or alone == dict(each.words)
        assert summed(other for other in lists if other is not each) == {
            word: count - alone.get(word, 0) for word, count in total.items() if count > alone.get(word, 0)
        }


@settings(deadline=None)
@given(st.text(max_size=5), st.integers(0, 12), st.integers(0, 12))
def test_a_message_takes_letters_alone_in_no_more_documents_than_there_are(word: str, count: int, many: int) -> None:
    try:
        Words(node="a", incarnation="i", encoder="e", documents=many, words=[(word, count)])
        taken = True
    except ValidationError:
        taken = False
    assert taken == (word.isalpha() and 2 <= count <= many)


def test_a_word_that_is_in_many_documents_becomes_a_token_before_one_that_is_in_few() -> None:
    counts = {"often": 1000, "seldom": 3}
    made = shared_vocabulary.agreed({words.SOURCE: written(counts)}, 264)
    assert made.tokenizer.encode(" often").tokens[:-1] == ["Ġoften"] and len(made.tokenizer.encode(" seldom").ids) > 5
    # far beyond what a trainer is given: scaled down together, and nothing gone
    huge = {word: count * (1 << 40) for word, count in counts.items()} | {"once": 2}
    text = training_text(huge)
    assert sum(map(len, text)) < 20_000_000 and {piece.split()[0] for piece in text} == set(huge)
    assert 250 < len(text[0].split()) / len(text[2].split()) < 400  # often, once, seldom


def test_more_kinds_of_words_than_a_trainer_takes_are_cut_at_the_rare_end() -> None:
    many = {f"{'abcdefghij'[n % 10]}{n:x}" * 4: 2 for n in range(200_010)} | {"often": 1000}
    text = training_text(many)
    assert len(text) == 200_000 and sum(map(len, text)) < 20_000_000 and any(" often" in piece for piece in text)


def test_an_agreed_vocabulary_wants_words_and_without_any_says_what_to_do() -> None:
    text = get_encoder_type("text")
    architecture = text.architecture({"vocabulary": "agreed", "entries": 270})
    assert architecture["shared"] == "all"
    with pytest.raises(WordsNeeded):
        text.assets(architecture, {})
    with pytest.raises(UserError, match=r"^no node contributed a word .*private\.contribute_words = true"):
        text.assets(architecture, {words.SOURCE: "{}"})
    with pytest.raises(UserError, match=r"leave it out$"):
        text.assets(architecture, {"reference": "texts"})
    completed, assets = text.assets(architecture, {words.SOURCE: written({"fever": 9})})
    made = Vocabulary(assets[shared_vocabulary.TOKENIZER].decode(), completed["tokens"])
    assert completed["vocab_size"] == made.entries > 259 and completed["vocabulary"] == "agreed"
    # one that was agreed on before is named like any other
    assert text.assets(architecture, {"tokenizer": "bytes"})[0]["vocabulary"] == "agreed"
    trunk = text.architecture({"vocabulary": "agreed", "shared": "trunk"})
    assert trunk["shared"] == "trunk" and set(text.assets(trunk, {words.SOURCE: '{"a": 2}'})[1]) == set(assets)
