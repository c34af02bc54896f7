"""What a node contributes to an agreed vocabulary: nothing without a yes, and nothing that its owner cannot read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.to_master import Words
from common.wire.to_node import WordsWanted
from node_service.agent import Agent, Contribute
from node_service.corpus.corpus import Corpus
from node_service.handover.contributing import Contributions, answer
from node_service.handover.local_state import LocalState
from node_service.handover.store import DirectoryStore, MemoryStore
from tests.unit.stepped import HandMaster, SteppedNode

WANTED = WordsWanted(encoder="text-1", encoder_type="text")
TEXTS = ["one fever", "two fever", "three fever", "secret"]
OPEN = {"contribute_words": True, "min_documents": 2}


def contributions(texts: list[str], private: dict[str, Any]) -> Contributions:
    """Of a corpus whose held-out texts say `held` in every one of them."""
    return Contributions({"text": Corpus("text", texts, None, ["held out"] * 99, None, ["held back"] * 99)}, private)


def state(store: Any = None) -> LocalState:
    return LocalState(store or MemoryStore(), "node-7", new_incarnation=lambda: "first")


def strings(value: Any) -> set[str]:
    """Every string of a message that is not a name of a field."""
    if isinstance(value, dict):
        return {found for each in value.values() for found in strings(each)}
    if isinstance(value, list):
        return {found for each in value for found in strings(each)}
    return {value} if isinstance(value, str) else set()


def listed(content: str) -> set[str]:
    """The words of a list as its owner reads it."""
    return {line.split("\t")[1] for line in content.splitlines() if not line.startswith("#")}


@settings(deadline=None)
@given(
    st.lists(st.lists(st.text("abé1_ ", max_size=5), max_size=8).map(" ".join), max_size=15),
    st.booleans(),
    st.integers(2, 4),
)
def test_the_bytes_that_are_sent_hold_no_word_that_is_not_in_the_list(
    texts: list[str], contributes: bool, least: int
) -> None:
    store = MemoryStore()
    private = {"contribute_words": contributes, "min_documents": least}
    said = answer(WANTED, contributions(texts, private), state(store))
    files = [content.decode() for name, content in store.files.items() if name.startswith("words/")]
    assert len(files) == contributes
    about = {said.kind, said.node, said.incarnation, said.encoder}
    told = strings(msgpack.unpackb(encode(said))) - about
    assert told == {word for content in files for word in listed(content)}
    assert not told & {"held", "out", "back"}
    assert all(sum(word in text for text in set(texts)) >= least for word in told)


def said_of(private: dict[str, Any], tmp_path: Path, texts: list[str] = TEXTS) -> tuple[Words, list[str]]:
    """The answer, and the lines of the log."""
    with capture_logs() as lines:
        said = answer(WANTED, contributions(texts, private), state(DirectoryStore(tmp_path)))
    return said, [line["event"] for line in lines]


def test_its_owner_is_told_in_one_sentence_and_finds_the_list_where_it_says(tmp_path: Path) -> None:
    said, [line] = said_of(OPEN, tmp_path)
    assert (said.documents, said.min_documents, said.words) == (4, 2, [("fever", 3)])
    [path] = tmp_path.glob("words/*.txt")
    assert str(path) in line and "contributing 1 words" in line
    assert "at least 2 of 4 documents here, which may all be about one person" in line
    assert "who gets the exported encoder gets a tokenizer that is made of them" in line
    assert "in how many of the documents each is, and that it is this node which has them" in line
    assert path.read_text().splitlines()[-1] == "3\tfever" and "1 words, each in at least 2 of 4" in path.read_text()
    said_of({**OPEN, "min_documents": 4}, tmp_path)
    assert len([*tmp_path.glob("words/*.txt")]) == 2, "what may have left before can still be read"


@pytest.mark.parametrize(
    ("private", "reason"),
    [
        ({}, "private.contribute_words = true"),
        ({"contribute_words": False, "min_documents": 2}, "private.contribute_words = true"),
        ({"contribute_words": True, "min_documents": 1}, "min_documents"),
        ({"contribute_words": "yes"}, "contribute_words"),
    ],
)
def test_without_a_clear_yes_it_takes_part_and_contributes_nothing(
    private: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with capture_logs() as lines:
        said = answer(WANTED, contributions(TEXTS, private), state(DirectoryStore(tmp_path)))
    assert said == Words(node="node-7", incarnation="first", encoder="text-1") and not (tmp_path / "words").exists()
    assert lines[-1]["event"].startswith("taking part in text-1 without contributing words")
    assert any(reason in str(line) for line in lines)


def test_ten_documents_are_asked_of_a_word_where_nothing_else_is_said(tmp_path: Path) -> None:
    texts = [f"{'fever ' if n < 9 else ''}{'the ' if n < 10 else ''}{n}" for n in range(20)]
    said, _ = said_of({"contribute_words": True}, tmp_path, texts)
    assert said.words == [("the", 10)] and said.min_documents == 10


def test_the_list_is_on_disk_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    server, clock = MemoryServer(VirtualClock().now), VirtualClock(1000.0)
    happened: list[str] = []

    class Watched(MemoryStore):
        def write(self, name: str, content: bytes) -> None:
            super().write(name, content)
            happened.append(name.partition("/")[0])

    master = HandMaster(server, clock)
    node = SteppedNode(server, clock, store=Watched(), private=OPEN).start()
    publish: Callable[..., None] = node.broker.publish

    def watched(*publications: Publication, timeout: float = 60.0) -> None:
        happened.extend(each.routing_key for each in publications)
        publish(*publications, timeout=timeout)

    monkeypatch.setattr(node.broker, "publish", watched)
    master.say(WANTED)
    node.turn()
    assert happened.index("words") < happened.index("a.words") and happened.count("a.words") == 1
    # asked again, as by a master that has started again: the same answer, which the master knows
    master.say(WANTED)
    node.turn()
    first, second = master.heard(Words)
    assert first == second and first.node == "a"
    # of a type that this node has no samples of it says nothing
    master.say(WordsWanted(encoder="image-1", encoder_type="image"))
    node.turn()
    assert len(master.heard(Words)) == 2


def test_words_are_counted_once_in_a_process_and_few_encoders_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = contributions(TEXTS, OPEN)
    first = answer(WANTED, counted, state())
    monkeypatch.setattr("node_service.handover.contributing.word_list", None)
    assert answer(WANTED.model_copy(update={"encoder": "text-2"}), counted, state()).words == first.words != []
    agent = Agent("a", "first", ("text",))
    for number in range(1000):
        wanted = WordsWanted(encoder=f"text-{number}", encoder_type="text")
        assert [agent.receive(wanted), agent.receive(wanted)] == [
            [Contribute(wanted)],
            [Contribute(wanted, again=True)],
        ]
    assert len(agent.contributed) < 100
