"""A vocabulary that nodes agree on, from the first wish to the export: real master, real nodes, real text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from common.brokers.memory import MemoryServer
from common.encoders import get_encoder_type, shared_vocabulary
from common.encoders.vocabulary import Vocabulary
from common.encoders.words import WordList, summed, training_text
from common.errors import UserError
from common.wire.codec import decode
from common.wire.to_master import Stop, Words
from common.wire.update_rule import FinishRule, ReturnWhen, UpdateRule
from deploy.commands.observe import Observer, request_encoder
from master_service.arithmetic.generation import generated
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Generate
from master_service.decisions.records import Gathering, Generated, Loggable, Provided
from master_service.decisions.settings import WordsRule
from master_service.history.replay import origin, verify
from master_service.history.state_directory import Journal
from master_service.log.message_log import MessageLog, open_log
from tests.integration.harness import SMALL, TOPOLOGY, connection, decided, eventually, running_master
from tests.integration.test_federation import Node, lines, nodes
from tests.integration.test_master_recovery import Bang, dying_master

ENTRIES = 290
SETTINGS = decided(
    architecture={**SMALL, "vocabulary": "agreed", "entries": ENTRIES},
    min_nodes=3,
    update_rule=UpdateRule(when=ReturnWhen(steps=2), finish=FinishRule(what="none")),
    words=WordsRule(nodes=3, seconds=600),
)
OPEN = {"contribute_words": True, "min_documents": 5}


@contextmanager
def three_nodes(server: MemoryServer, tmp_path: Path) -> Iterator[list[Node]]:
    """Two that contribute, one of which has a word in four documents alone, and one whose owner has said nothing."""
    own = [f"{line} quagga" if number < 4 else line for number, line in enumerate(lines(0))]
    made = [
        Node(server, tmp_path, "a", own, private=OPEN),
        Node(server, tmp_path, "b", lines(1, " okapi"), private=OPEN),
        Node(server, tmp_path, "closed", lines(2, " secretword"), private={}),
    ]
    with nodes(*made):
        yield made


def left(node: Node) -> list[Words]:
    """What of words left a node."""
    keyed = [each.body for each in node.broker.left if each.routing_key.endswith(".words")]
    return [message for body in keyed if isinstance(message := decode(body), Words)]


def bodies(log: MessageLog, kind: type[Any]) -> list[Any]:
    return [entry.body for entry in log.entries() if isinstance(entry.body, kind)]


def check_the_log(directory: Path, contributions: list[Words]) -> None:
    """The tokenizer in it is that of the sums of these, and the log alone leads to it again, bit for bit."""
    log = open_log(directory, read_only=True)
    total = summed(WordList(each.documents, each.min_documents, tuple(each.words)) for each in contributions)
    plain = shared_vocabulary.trained(training_text(total), ENTRIES).tokenizer.to_str().encode()
    asset = bodies(log, Provided)[-1]
    assert log.payloads.read(asset.digest) == plain
    coordinator, orders = Coordinator(), []
    for entry in log.entries():
        orders += [effect for effect in coordinator.handle(entry) if isinstance(effect, Generate)]
    again = generated(orders[-1])
    assert [outcome.body for outcome in again] == [asset, *bodies(log, Generated)] and again[0].payload == plain
    checks = [check for _, check in verify(log, origin(log).fold) if check is not None]
    assert checks and all(check.identical for check in checks)
    log.close()


def test_words_become_the_tokenizer_that_everybody_trains_with_and_a_late_joiner_gets_it(tmp_path: Path) -> None:
    server = MemoryServer()
    with (
        capture_logs() as told,
        running_master(server, tmp_path / "m", SETTINGS, export_dir=tmp_path / "encoder") as master,
        three_nodes(server, tmp_path) as made,
    ):
        state = master.service.master.state
        encoder = eventually(lambda: next((e for e in state.encoders.values() if e.version >= 2), None), 60)
        late = Node(server, tmp_path, "late", lines(9, " latecomer"), private=OPEN)
        with nodes(late):
            eventually(lambda: "late" in encoder.members and encoder.members["late"].returns > 0, 60)
            operator = connection(server, "operator")
            observer = Observer(operator, TOPOLOGY)
            observer.say(Stop(sender=observer.name))
            for node in (*made, late):
                eventually(lambda node=node: node.party.wait(0.0), 60)  # they end by themselves
            observer.close()
            operator.close()
    assert encoder.answered == {"a": True, "b": True, "closed": False}
    contributions = {node.service.name: left(node)[0] for node in made}
    assert left(late) == [] and contributions["closed"].words == []
    sent = {name: {word for word, _ in said.words} for name, said in contributions.items()}
    assert "okapi" in sent["b"] and "quagga" not in sent["a"] and sent["a"] < sent["b"]
    for node, word in ((made[0], b"quagga"), (made[2], b"secretword"), (late, b"latecomer")):
        assert not any(word in each.body for each in node.broker.left), word
    [listed] = (tmp_path / "b" / "words").iterdir()
    assert listed.read_text().count("\tokapi\n") == 1 and not (tmp_path / "closed" / "words").exists()
    events = [line["event"] for line in told if line["log_level"] == "info"]
    assert sum(f"the list is in {listed};" in event for event in events) == 1
    assert sum(event.startswith("taking part in") for event in events) == 1
    check_the_log(tmp_path / "m", [*contributions.values()])
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    [model] = (tmp_path / "late" / "encoders").glob("*/model")
    for place in (tmp_path / "encoder", model):
        tokenizer = AutoTokenizer.from_pretrained(place)
        found = AutoModelForMaskedLM.from_pretrained(place)
        assert len(tokenizer) == found.config.vocab_size == ENTRIES
        assert len(tokenizer.tokenize(" alpha")) < len(" alpha"), "it knows the words that were contributed"
    # whoever goes on from it goes on with its vocabulary, and asks nobody
    text = get_encoder_type("text")
    completed, assets = text.assets(
        text.architecture_of(tmp_path / "encoder")[0], {"tokenizer": str(tmp_path / "encoder")}
    )
    assert (completed["vocabulary"], completed["shared"], completed["vocab_size"]) == ("agreed", "all", ENTRIES)
    assert Vocabulary(assets["tokenizer.json"].decode(), completed["tokens"]).entries == ENTRIES
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "Its vocabulary is an agreed one: 2 of the 3 nodes that answered contributed words" in card


def test_a_master_that_is_killed_between_the_rows_goes_on_and_counts_every_node_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, directory = MemoryServer(), tmp_path / "m"
    real = Journal.append

    def dies(kind: type[Any], number: int, *, after: bool) -> Any:
        """Dies of the row of this kind and number, before it is written or after."""
        seen = 0

        def append(self: Journal, body: Loggable, **named: Any) -> Any:
            nonlocal seen
            seen += isinstance(body, kind)
            mine = isinstance(body, kind) and seen == number
            if mine and not after:
                raise Bang
            entry = real(self, body, **{**named, "together": False})  # each row durable, to die between two
            if mine:
                raise Bang
            return entry

        return append

    deaths = [(Gathering, 1, False), (Words, 1, True), (Words, 1, False), (Provided, 1, True)]
    with three_nodes(server, tmp_path) as made:
        for kind, number, after in deaths:
            with monkeypatch.context() as patch:
                patch.setattr(Journal, "append", dies(kind, number, after=after))
                with dying_master(server, directory, SETTINGS):
                    pass
        with running_master(server, directory, SETTINGS) as master:
            state = master.service.master.state
            encoder = eventually(lambda: next((e for e in state.encoders.values() if e.version >= 1), None), 60)
            assert encoder.answered == {"a": True, "b": True, "closed": False}
        contributions = {node.service.name: left(node) for node in made}
    assert all(each == [each[0]] * len(each) for each in contributions.values()), "asked again it says the same"
    log = open_log(directory, read_only=True)
    assert sorted(row.node for row in bodies(log, Words)) == ["a", "b", "closed"], "what does not count is no row"
    assert len(bodies(log, Gathering)) == 1 < len(bodies(log, Provided))
    log.close()
    check_the_log(directory, [each[0] for each in contributions.values()])


def test_who_waits_for_an_encoder_that_nobody_contributes_to_is_told_why_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = MemoryServer()
    settings = SETTINGS.model_copy(update={"words": WordsRule(nodes=1), "min_nodes": 1})
    closed = Node(server, tmp_path, "closed", lines(2), private={})
    # private: who asks waits so long between two questions, and a test has no time for that
    monkeypatch.setattr("deploy.commands.observe._ASK_EVERY", 0.02)
    monkeypatch.setattr("deploy.commands.observe.connect", lambda *arguments: connection(server, "reader"))
    with (
        running_master(server, tmp_path / "m", settings),
        nodes(closed),
        pytest.raises(UserError, match=r"was not made: no node contributed a word .* private\.contribute_words = true"),
    ):
        flags = {"broker": {"namespace": TOPOLOGY.namespace}}
        request_encoder(flags, None, 60.0, encoder_type="text", out=tmp_path / "out")
    assert ": gathering, version 0" in capsys.readouterr().out
