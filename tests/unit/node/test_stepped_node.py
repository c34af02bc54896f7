"""The shipped Node, stepped by hand under a virtual clock: what it does while time passes, and while nobody answers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.brokers.memory import MemoryBroker, MemoryServer
from common.brokers.memory_rules import Permissions
from common.clock import VirtualClock
from common.errors import AccessRefused, BrokerUnavailable
from common.wire.bounds import MAX_WHOLE
from common.wire.broker import BrokerStatus, Publication
from common.wire.fields import MAX_ATTEMPT
from common.wire.to_master import Alive, InstructionAck, Join, Leave, UpdateManifest
from common.wire.to_node import Finish, Instruction, Notice, Resend
from common.wire.update_rule import ReturnWhen, UpdateRule
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.handover.local_state import open_local_state
from node_service.handover.receipt_book import Ledger
from node_service.node import Node
from node_service.service import NodeService
from tests.unit.stepped import DIGEST, TOPOLOGY, CountingTraining, HandMaster, SteppedNode

STEPS = 4
RULE = UpdateRule(when=ReturnWhen(steps=STEPS), encoding="float32", max_unanswered=2)


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(VirtualClock().now)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def training_node(
    server: MemoryServer, clock: VirtualClock, rule: UpdateRule = RULE, **options: Any
) -> tuple[HandMaster, SteppedNode]:
    """A node that has been let in and has its first version."""
    master = HandMaster(server, clock)
    node = SteppedNode(server, clock, **options).start()
    node.turn()
    master.let_in(rule)
    node.turn()
    assert node.training.version == 0
    return master, node


def handed_in(master: HandMaster) -> list[UpdateManifest]:
    """Every update, without those that were sent again."""
    return [update for update in master.heard(UpdateManifest) if update.attempt == 0]


@pytest.mark.parametrize("config", [{"named": True}, {}])
def test_a_node_is_named_to_others_only_if_its_owner_said_so(
    server: MemoryServer, clock: VirtualClock, config: dict[str, Any]
) -> None:
    master, _ = training_node(server, clock, **config)
    assert [ack.named for ack in master.heard(InstructionAck)] == [bool(config)]


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step_seconds", "most", "steps"), [(0.5, None, 120), (0.5, 1.0, 60), (4.0, 0.2, 12)])
def test_f12_a_node_returns_after_so_many_seconds_of_training_throttled_or_not(
    server: MemoryServer, clock: VirtualClock, step_seconds: float, most: float | None, steps: int
) -> None:
    rule = UpdateRule(when=ReturnWhen(seconds=60.0), encoding="float32")
    options = {"training": {"seconds": step_seconds}, "max_steps_per_second": most}
    master, node = training_node(server, clock, rule, **options)
    began = clock.monotonic()
    while not (updates := master.heard(UpdateManifest)):
        clock.wait(node.turn())
    pause = max(step_seconds, 1.0 / most if most else 0.0)
    assert clock.monotonic() - began == pytest.approx(60.0, abs=pause)
    assert updates[0].seconds == pytest.approx(60.0, abs=pause) and abs(updates[0].steps - steps) <= 1


def test_f12_time_of_waiting_for_the_master_is_not_time_of_training(server: MemoryServer, clock: VirtualClock) -> None:
    rule = UpdateRule(when=ReturnWhen(seconds=60.0), encoding="float32", wait=True)
    master, node = training_node(server, clock, rule)
    node.run(70.0)
    [first] = master.heard(UpdateManifest)
    node.run(500.0)  # nobody answers, and a rule that waits waits
    assert handed_in(master) == [first] and node.node.figures.waiting_seconds > 400.0
    master.answer(first)
    master.publish(1)
    master.say(Notice(encoder="text-1", version=1, digest=DIGEST, published_at=0.0))
    node.run(55.0)
    assert len(handed_in(master)) == 1, "as if the waiting had counted"
    node.run(10.0)
    assert [update.seconds for update in handed_in(master)] == [pytest.approx(60.0, abs=0.5)] * 2


# --- the master is away ----------------------------------------------------------------------------------------------


def owing(server: MemoryServer, clock: VirtualClock, rule: UpdateRule = RULE, **options: Any) -> Any:
    """A node that has handed in as much as it may, and hears nothing more."""
    master, node = training_node(server, clock, rule, **options)
    node.run(2 * STEPS * 0.5 + STEPS * 0.5 + 0.1)
    assert len(node.node.state.owed) == RULE.max_unanswered and node.training.since.steps == STEPS
    return master, node


def test_f13_a_node_trains_on_while_the_master_is_away_and_hands_it_in_as_one_update(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master, node = owing(server, clock, away_after_seconds=20.0)
    since = node.node.figures.waiting_since
    assert since == pytest.approx(clock.now(), abs=1.0), "it says since when"
    node.run(10.0)
    assert node.training.since.steps == STEPS and not node.node.ready, "the master may only be busy"
    node.run(100.0)
    assert node.training.since.steps > 100 and node.node.ready
    assert node.node.figures.waiting_since == since, "it waits still, though it trains"
    assert len(master.heard(UpdateManifest)) == 2
    first, second = master.heard(UpdateManifest)
    trained = node.training.since.steps
    master.answer(first)
    node.turn()
    _, _, third = master.heard(UpdateManifest)
    assert third.steps == trained and third.sequence == 2, "all of it, and as one update"
    assert first.steps + second.steps + third.steps + node.training.since.steps == node.training.steps
    assert node.node.figures.waiting_since is None


def test_checkpoints_cost_a_fiftieth_of_the_time_at_most(server: MemoryServer, clock: VirtualClock) -> None:
    saved_at: list[float] = []

    class SlowToSave(CountingTraining):
        def save(self, incarnation: str, next_sequence: int) -> None:
            saved_at.append(clock.time)
            clock.wait(3.0 if len(saved_at) > 1 else 0.5)

    rule = UpdateRule(when=ReturnWhen(steps=10**6), encoding="float32")
    master, node = HandMaster(server, clock), SteppedNode(server, clock, checkpoint_every_seconds=60.0).start()
    node.build = lambda instruction, corpus, ledger, assets: SlowToSave(instruction, saved=[])
    node.turn()
    master.let_in(rule)
    node.run(500.0)
    apart = [later - sooner for sooner, later in itertools.pairwise(saved_at)]
    assert apart[:3] == pytest.approx([60.0, 150.0, 150.0], abs=1.0)


def test_f13_a_pulse_is_a_sign_of_life(server: MemoryServer, clock: VirtualClock) -> None:
    master, node = owing(server, clock, away_after_seconds=20.0)
    for _ in range(30):
        master.pulse()
        node.run(10.0)
    assert node.training.since.steps == STEPS, "a master that is there is waited for"
    node.run(60.0)
    assert node.training.since.steps > STEPS


def test_f13_how_far_a_node_trains_on_is_bounded_by_the_rule(server: MemoryServer, clock: VirtualClock) -> None:
    _, node = owing(server, clock, RULE.model_copy(update={"away_steps": 30}))
    node.run(1000.0)
    assert node.training.since.steps == 30


def test_f13_a_rule_that_waits_waits_however_long_the_master_is_away(server: MemoryServer, clock: VirtualClock) -> None:
    master, node = training_node(server, clock, RULE.model_copy(update={"wait": True}))
    node.run(1000.0)
    assert node.training.steps == STEPS and len(handed_in(master)) == 1
    assert node.node.figures.waiting_since == pytest.approx(1000.0 + STEPS * 0.5, abs=1.0)


def test_f13_figures_and_signs_of_life_are_of_one_training(server: MemoryServer, clock: VirtualClock) -> None:
    master, node = training_node(server, clock)
    for version in (1, 2, 3):
        node.run(5.0)
        for update in master.heard(UpdateManifest):
            master.answer(update, version)
    node.run(5.0)
    said = master.heard(Alive)[-1]
    assert said.encoder == "text-1" and said.steps > 10 and said.steps_per_second > 0 and said.loss == 1.0
    assert said.bytes_sent > 500
    figures = node.node.figures
    assert figures.handed_in > 1 and figures.accepted > 1 and figures.training_seconds > 5.0
    end = Finish(encoder="text-1", encoder_type="text", version=0, digest=DIGEST, published_at=0.0)
    master.say(end)
    node.turn()
    sent = node.broker.status().bytes_out
    master.let_in(RULE, "text-2", version=7)
    clock.wait(5.0)
    node.turn()
    said = master.heard(Alive)[-1]
    assert (said.encoder, said.version, said.steps, said.waiting_seconds) == ("text-2", 7, 1, 0.0)
    assert said.steps_per_second == 2.0 and said.bytes_sent <= node.broker.status().bytes_out - sent
    assert (figures.handed_in, figures.accepted, figures.last_weight, figures.staleness) == (0, 0, 0.0, 0)


# --- what the master says --------------------------------------------------------------------------------------------


def test_f6_a_slow_sender_is_told_how_much_of_its_update_came(server: MemoryServer, clock: VirtualClock) -> None:
    master, node = training_node(server, clock)
    node.run(STEPS * 0.5 + 0.5)
    [update] = master.heard(UpdateManifest)
    again = Resend(
        encoder=update.encoder,
        node="a",
        incarnation=update.incarnation,
        sequence=update.sequence,
        attempt=1,
        detail="1 of 3 chunks came, and then none for a while",
    )
    with structlog.testing.capture_logs() as logs:
        master.say(again)
        master.say(again)  # as it comes twice after a crash: the second begets nothing
        node.turn()
    [line] = [each for each in logs if each["log_level"] == "warning"]
    assert (line["update"], line["attempt"], line["detail"]) == (update.update_id, 1, again.detail)
    assert [each.attempt for each in master.heard(UpdateManifest)] == [0, 1]


@pytest.mark.parametrize("highest", [{"beyond": MAX_WHOLE}, {"beyond": MAX_WHOLE - 1}, {"attempt": MAX_ATTEMPT}])
def test_whom_a_message_takes_to_the_end_of_its_numbers_goes_on_as_another(
    server: MemoryServer, clock: VirtualClock, highest: dict[str, int]
) -> None:
    """A number beyond what is read would set aside all that the node sends from then on."""
    master, node = training_node(server, clock)
    node.run(STEPS * 0.5 + 0.5)
    [update] = master.heard(UpdateManifest)
    about = {"node": "a", "encoder": update.encoder, "incarnation": update.incarnation, "sequence": update.sequence}
    master.say(Resend(**{"attempt": 1, **about, **highest}))
    node.run(2.0)
    [*_, joined] = master.heard(Join)
    assert joined.incarnation != update.incarnation and not node.node.state.owed
    assert node.node.state.identity.next_order == 1


# --- the end ---------------------------------------------------------------------------------------------------------


class Service:
    """A NodeService in this thread over the embedded broker; `on_change` gets the master's part done."""

    def __init__(self, directory: Path, **training: Any) -> None:
        self.server, self.clock = MemoryServer(), VirtualClock()
        self.master = HandMaster(self.server, self.clock)
        self.saved: list[int] = []
        self.stop = threading.Event()
        self.broker = connection_with_thread(self.server)
        self._training = training
        corpora = {"text": Corpus("text", ["one"], None, [], None)}
        config = NodeConfig(state_dir=directory, checkpoint_every_seconds=1e9)
        self.service = NodeService("a", config, corpora, self.broker, TOPOLOGY, self.look, build=self._build)
        self._let_in = False
        self.on_step: Any = lambda steps: None

    def _build(
        self, instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]
    ) -> CountingTraining:
        return CountingTraining(instruction, seconds=0.0, saved=self.saved, **self._training)

    def look(self, service: NodeService) -> None:
        if not self._let_in and self.master.heard(Join):
            self._let_in = True
            self.master.let_in(UpdateRule(when=ReturnWhen(steps=1000), encoding="float32"))
        training = service.node.training if service.node is not None else None
        if training is not None:
            self.on_step(training.steps)

    def run(self) -> None:
        try:
            self.service.run(self.stop)
        finally:
            self.broker.close()


def connection_with_thread(server: MemoryServer) -> MemoryBroker:
    return MemoryBroker(server, user="a", dead_letters=TOPOLOGY.dead_letters)


def stop_after(service: Service, steps: int) -> None:
    service.on_step = lambda taken: service.stop.set() if taken >= steps else None


def test_f5_a_clean_stop_hands_in_saves_and_leaves(tmp_path: Path) -> None:
    service = Service(tmp_path)
    stop_after(service, 7)
    service.run()
    [update] = service.master.heard(UpdateManifest)
    assert service.saved == [update.steps] and update.steps >= 7 and len(service.master.heard(Leave)) == 1


def test_a_node_that_is_cut_off_ends_at_once_with_what_it_owes_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(tmp_path)
    stop_after(service, 7)

    def away(*publications: Publication, timeout: float = 60.0) -> None:
        raise BrokerUnavailable("no broker answers")

    def cut_off(node: Node) -> None:
        away_status = dataclasses.replace(service.broker.status(), connected=False)
        monkeypatch.setattr(service.broker, "publish", away)
        monkeypatch.setattr(service.broker, "status", lambda: away_status)
        goodbye(node)

    goodbye = Node.goodbye
    monkeypatch.setattr(Node, "goodbye", cut_off)
    # private: it must not be the time that ends it
    monkeypatch.setattr("node_service.service._FLUSH_SECONDS", 1e9)
    with structlog.testing.capture_logs() as logs:
        service.run()
    assert "it is kept and sent at the next start" in logs[-1]["event"]
    with contextlib.closing(open_local_state(tmp_path, "a")) as state:
        [owed] = state.owed.values()
    assert owed.steps >= 7 and service.saved == [owed.steps]


def test_f5_after_an_error_in_training_nothing_is_handed_in_saved_or_said(tmp_path: Path) -> None:
    service = Service(tmp_path, fails_at=7)
    with pytest.raises(ArithmeticError, match="a training step failed"):
        service.run()
    assert not service.saved
    assert not service.master.heard(UpdateManifest) and not service.master.heard(Leave)


@pytest.mark.parametrize("where", ["hear", "version_read", "work"])
def test_f5_nor_after_an_error_anywhere_else_in_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    service, taken = Service(tmp_path), threading.Event()
    original = getattr(Node, where)

    def failing(node: Node, *arguments: Any) -> Any:
        done = original(node, *arguments)
        steps = node.training.steps if node.training is not None else 0
        if steps >= 3 or (where != "work" and node.training is not None):
            taken.set()
            raise ArithmeticError(f"{where} failed")
        return done

    monkeypatch.setattr(Node, where, failing)
    with pytest.raises(ArithmeticError, match=f"{where} failed"):
        service.run()
    assert taken.is_set() and not service.saved
    assert not service.master.heard(UpdateManifest) and not service.master.heard(Leave)


@pytest.mark.parametrize(
    ("thread", "target"), [("outbox-a", "outbox.Outbox.flush_one"), ("reading-a", "reading.Reading.read_one")]
)
def test_f1_an_error_in_a_thread_ends_the_node_with_a_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: str, target: str
) -> None:
    service = Service(tmp_path)

    def stumble(*arguments: Any, **named: Any) -> None:
        raise ArithmeticError("a slip")

    service.on_step = lambda taken: monkeypatch.setattr(f"node_service.handover.{target}", stumble)
    with structlog.testing.capture_logs() as logs, pytest.raises(ArithmeticError, match="a slip"):
        service.run()
    [line] = [each for each in logs if each["log_level"] == "error"]
    assert line == {
        "event": "a thread has failed, ending",
        "thread": thread,
        "problem": "ArithmeticError: a slip",
        "log_level": "error",
    }
    assert not service.saved and not service.master.heard(Leave)


@pytest.mark.parametrize("when", ["with the stop", "after the last message"])
def test_f1_a_thread_that_fails_while_the_node_ends_leaves_no_clean_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The reading thread is not needed to send what is left, so that nothing else would tell."""
    service, failed = Service(tmp_path), threading.Event()

    def stumble(*arguments: Any, **named: Any) -> None:
        failed.set()
        raise ArithmeticError("a slip")

    def fail() -> None:
        monkeypatch.setattr("node_service.handover.reading.Reading.read_one", stumble)
        assert failed.wait(10.0)
        for worker in threading.enumerate():
            if worker.name == "reading-a":
                worker.join(10.0)  # until its error has been handed over

    def step(taken: int) -> None:
        if taken >= 3 and not service.stop.is_set():
            if when == "with the stop":
                fail()
            service.stop.set()

    service.on_step = step
    goodbye = Node.goodbye

    def ending(node: Node) -> None:
        goodbye(node)
        fail()

    if when == "after the last message":
        monkeypatch.setattr(Node, "goodbye", ending)
    with pytest.raises(ArithmeticError, match="a slip"):
        service.run()
    if when == "with the stop":
        assert not service.saved and not service.master.heard(Leave)


class RefusingBroker(MemoryBroker):
    """Its status says after a while that the account is not let in any more."""

    refused = ""

    def status(self) -> BrokerStatus:
        return BrokerStatus(True, None, 0, 0, 0, refused=self.refused)


def test_f1_a_refusal_that_waiting_does_not_mend_ends_the_node(tmp_path: Path) -> None:
    service = Service(tmp_path)
    broker = RefusingBroker(service.server, user="a", dead_letters=TOPOLOGY.dead_letters)
    service.broker = service.service.broker = broker
    service.on_step = lambda taken: setattr(broker, "refused", "ACCESS_REFUSED - no more")
    with pytest.raises(AccessRefused, match="ACCESS_REFUSED - no more"):
        service.run()
    assert not service.saved and not service.master.heard(Leave)


def test_f1_what_may_not_be_published_is_said_by_the_outbox_and_stays_owed(
    server: MemoryServer, clock: VirtualClock
) -> None:
    _, node = training_node(server, clock)
    server.permit("a", Permissions(write="^$"))
    with pytest.raises(AccessRefused, match=r"ACCESS_REFUSED - write access to 'stepped\.update' refused for user 'a'"):
        node.run(STEPS * 0.5 + 0.5)
    assert not node.node.outbox.empty and list(node.node.state.owed) == [0]


def test_a_throttled_node_takes_no_step_early_whatever_wakes_it(server: MemoryServer, clock: VirtualClock) -> None:
    master = HandMaster(server, clock)
    node = SteppedNode(server, clock, max_steps_per_second=2.0).start()
    master.let_in(UpdateRule(when=ReturnWhen(steps=1000)))
    node.run(5.0)
    steps, until = node.training.steps, clock.monotonic() + 10.0
    while clock.monotonic() < until:
        master.pulse()  # something is heard of ten times a step
        node.turn()
        clock.wait(0.05)
    assert 19 <= node.training.steps - steps <= 21
