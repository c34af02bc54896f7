"""What a node keeps on disk so that a kill at any moment loses at most the steps since its last checkpoint, and so that
no step is ever handed in twice: real files and real training objects, a tiny model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor, nn

from common.brokers.memory import MemoryBroker, MemoryServer
from common.clock import SYSTEM, VirtualClock
from common.encoders.base import Batch, EncoderModel
from common.errors import LockHeld, UserError
from common.numbers.encodings import decode_vector, encode_vector
from common.numbers.layout import Layout
from common.wire.to_master import Fetch, Finished, UpdateManifest
from common.wire.to_node import Finish, Instruction, Notice, ParameterChunk, Receipt, Rule, Withdrawn
from common.wire.topology import Topology
from common.wire.transfer import CompleteVersion
from common.wire.update_rule import FinishRule, UpdateRule
from common.wire.versions import VersionReader, publish_version
from common.workers import Beside
from node_service.agent import Agent, Answered, CheckSamples, Drop, Look, Read, Say, Train
from node_service.handover import handover
from node_service.handover.handover import Handover
from node_service.handover.local_state import LocalState, open_local_state
from node_service.handover.reading import Reading, VersionRead
from node_service.handover.receipt_book import Ledger, ReceiptBook
from node_service.handover.store import DirectoryStore
from node_service.training import checkpoint
from node_service.training.private_parts import load_private
from node_service.training.session import Session
from node_service.training.training import update_manifest
from tests.unit.stepped import HandMaster, SteppedNode

DIGEST = "0" * 64
SIZE = 48
LAYOUT = Layout([("w", (SIZE,))])
INSTRUCTION = Instruction(
    encoder="fake-1", encoder_type="fake", architecture={}, layout=LAYOUT.plain(), layout_digest=LAYOUT.digest
)
RULE = Rule(
    encoder="fake-1", node="n", update_rule=UpdateRule(encoding="float32"), version=0, published_at=9.0, progress=0.0
)


class FakeModel(EncoderModel):
    """A vector to share and one to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(SIZE))
        self.own = nn.Parameter(torch.zeros(3))

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return {"w": self.w}

    def encode(self, samples: Any) -> Any:
        return samples

    def batch(self, encoded: Any, size: int, generator: torch.Generator) -> Batch:
        return {"x": torch.rand(3, generator=generator)}

    def loss(self, batch: Batch) -> Tensor:
        return ((self.own + self.w[:3] - batch["x"]) ** 2).sum()

    def features(self, samples: Any) -> Tensor:
        raise NotImplementedError

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)


class FakeType:
    def fit_private(self, samples: Any, architecture: Any, settings: Any, assets: Any) -> dict[str, Any]:
        return {}

    def build(self, architecture: Any, private: Any, seed: int) -> EncoderModel:
        return FakeModel()


@pytest.fixture(autouse=True, scope="module")
def _fake_type() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("node_service.training.session.get_encoder_type", lambda name: FakeType())
        yield


#: Where the state directories of this module's states are.
DIRECTORIES: dict[int, Path] = {}


def opened(directory: Path) -> LocalState:
    state = open_local_state(directory, "n")
    DIRECTORIES[id(state)] = directory
    return state


def training_of(
    state: LocalState, instruction: Instruction = INSTRUCTION, beside: Beside = checkpoint.AT_ONCE
) -> Session:
    training = Session(
        instruction,
        ["sample"],
        private_of(state, instruction.encoder),
        private={},
        seed=0,
        device="cpu",
        ledger=state.ledger(instruction.encoder),
        assets={},
        beside=beside,
    )
    training.retune(RULE.update_rule, 0.0)
    return training


def private_of(state: LocalState, encoder: str = "fake-1") -> Path:
    return DIRECTORIES[id(state)] / "encoders" / encoder


def handed_in(training: Session, state: LocalState, sequence: int) -> tuple[UpdateManifest, list[bytes]]:
    since, bodies = training.hand_in(sequence)
    incarnation = state.identity.incarnation
    return update_manifest(training, since, bodies, "n", incarnation, sequence, wants_version=True), bodies


def save(training: Session, state: LocalState) -> None:
    training.save(state.identity.incarnation, state.identity.next_sequence)


def version(number: int, vector: Tensor) -> CompleteVersion:
    payload = b"".join(encode_vector(vector, "float32"))
    chunk = ParameterChunk(
        encoder="fake-1",
        epoch=1,
        version=number,
        index=0,
        chunks=1,
        encoding="float32",
        layout_digest=LAYOUT.digest,
        size=len(payload),
        digest=DIGEST,
        checksum="",
        data=b"",
    )
    return CompleteVersion(chunk, payload)


def receipt(sequence: int, incarnation: str = "i", reason: str = "", **changes: Any) -> Receipt:
    plain = {"encoder": "fake-1", "node": "n", "incarnation": incarnation, "sequence": sequence, "digest": DIGEST}
    return Receipt(**{**plain, "accepted": not reason, "reason": reason, "version": 1, **changes})


def manifest(sequence: int, incarnation: str, **changes: Any) -> UpdateManifest:
    plain: dict[str, Any] = {"node": "n", "incarnation": incarnation, "encoder": "fake-1", "sequence": sequence}
    plain |= {"base_version": 0, "steps": 1, "samples": 1, "seconds": 1.0, "loss": 1.0, "encoding": "float32"}
    plain |= {"layout_digest": LAYOUT.digest, "size": 4, "chunks": 1, "digest": DIGEST}
    return UpdateManifest(**{**plain, **changes})


# --- no step twice, none that was checkpointed lost -------------------------------------------------------------------


class Life:
    """A node that is killed and started again. Step k moves coordinate k by one, so that an update shows its steps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.target, self.version = torch.zeros(SIZE), 0
        self.handed_in = torch.zeros(SIZE)
        self.safe: set[int] = set()  # steps that a checkpoint has seen
        self.in_flight: dict[int, set[int]] = {}  # owed, by number
        self.answered: set[int] = set()
        self.not_read: set[int] = set()  # counted in the next version
        self.taken = 0
        # what the running process has on its path, and what its last checkpoint had
        self.since: set[int] = set()
        self.path: dict[int, set[int]] = {}
        self.saved: tuple[int, set[int], dict[int, set[int]]] | None = None
        self.last_sequence = -1
        self.start()

    def start(self) -> None:
        self.state = opened(self.directory)
        self.training = training_of(self.state)
        if self.training.version < 0:
            self.read_version()

    def kill(self) -> None:
        self.state.close()
        self.since, self.path = set(), {}
        if self.saved is not None and self.saved[0] == self.last_sequence:
            self.since, self.path = set(self.saved[1]), dict(self.saved[2])
        self.start()
        assert self.training.since.steps == len(self.since)
        assert self.safe <= self.since | {k for k in range(SIZE) if self.handed_in[k] == 1}, "a safe step is lost"

    def train(self) -> None:
        if self.taken == SIZE:
            return
        local = self.training.trainer.shared().vector
        local[self.taken] += 1
        self.training.trainer.set_shared(local)
        self.training.since.step(1, 1.0)
        self.since.add(self.taken)
        self.taken += 1

    def hand_in(self, kill_before_owe: bool = False) -> None:
        if not self.since:
            return
        sequence = self.state.next_sequence()
        made, bodies = handed_in(self.training, self.state, sequence)
        if kill_before_owe:
            self.kill()
            return
        self.state.owe(made, b"".join(bodies))
        moved = -decode_vector(b"".join(bodies), SIZE, "float32")
        assert set(moved.nonzero().flatten().tolist()) == self.since and made.steps == len(self.since)
        self.handed_in += moved
        assert self.handed_in.max() <= 1, "a step was handed in twice"
        self.in_flight[sequence] = self.path[sequence] = self.since
        self.since, self.last_sequence = set(), sequence

    def answer(self, sequence: int, accepted: bool, kill_before_forgetting: bool = False) -> None:
        steps = self.in_flight.pop(sequence)
        self.answered.add(sequence)
        if accepted:
            self.not_read |= steps
        made = receipt(sequence, self.state.identity.incarnation, "" if accepted else "stale")
        assert self.state.remember(made) and not self.state.remember(made)
        if kill_before_forgetting:
            self.kill()
            return
        self.state.answered(sequence)
        self.training.answered(made)

    def read_version(self) -> None:
        self.version += 1
        self.target = self.target + torch.arange(SIZE) % 7
        self.target[list(self.not_read)] += 1
        self.not_read = set()
        self.training.adopt(version(self.version, self.target))
        newest = max(self.answered, default=-1)
        ahead = torch.zeros(SIZE)
        for steps in (self.since, *(steps for number, steps in self.path.items() if number > newest)):
            ahead[list(steps)] += 1
        assert torch.equal(self.training.trainer.shared().vector, self.target + ahead)

    def save(self) -> None:
        save(self.training, self.state)
        self.saved = (self.last_sequence, set(self.since), dict(self.path))
        self.safe |= self.since


EVENTS = ["train", "hand in", "before owe", "accept", "refuse last", "torn receipt", "version", "checkpoint", "kill"]


@settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(["train", "checkpoint", *EVENTS]), min_size=4, max_size=40))
@example(["train", "hand in", "checkpoint", "accept", "kill", "version"])
@example(["train", "hand in", "train", "hand in", "refuse last", "checkpoint", "kill", "accept", "version"])
@example(["train", "checkpoint", "train", "before owe", "train", "hand in", "kill"])
def test_no_step_is_handed_in_twice_and_none_that_was_checkpointed_is_lost(events: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        life = Life(Path(directory))
        for event in events:
            match event:
                case "train":
                    life.train()
                case "hand in" | "before owe":
                    life.hand_in(kill_before_owe=event == "before owe")
                case "accept" | "torn receipt" if life.in_flight:
                    life.answer(min(life.in_flight), True, kill_before_forgetting=event == "torn receipt")
                case "refuse last" if life.in_flight:
                    life.answer(max(life.in_flight), False)
                case "version":
                    life.read_version()
                case "checkpoint":
                    life.save()
                case "kill":
                    life.kill()
        life.hand_in()
        assert all(life.handed_in[k] == 1 for k in life.safe)
        life.state.close()


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Steps, optimiser, data position and error feedback: killed and not killed lead to the same int8 update."""
    state = opened(tmp_path / "a")
    rule = UpdateRule()  # int8
    training = training_of(state)
    training.retune(rule, 0.0)
    training.adopt(version(3, torch.ones(SIZE)))
    for sequence in range(2):
        for _ in range(5):
            training.step()
        assert state.next_sequence() == sequence
        made, bodies = handed_in(training, state, sequence)
        state.owe(made, b"".join(bodies))
    training.step()
    training.trainer.progress = 0.25
    save(training, state)

    again = training_of(state)
    again.retune(rule, 0.0)
    assert (again.version, again.trainer.progress, again.since) == (3, 0.25, training.since)
    assert again.trainer.steps == training.trainer.steps == 11
    for each in (training, again):
        each.step()
        each.answered(receipt(1, state.identity.incarnation, "stale"))  # takes back what its encoding left
    mine, theirs = (handed_in(each, state, 2) for each in (training, again))
    assert mine[1] == theirs[1] and mine[0].steps == theirs[0].steps == 2
    state.close()


def test_an_update_that_was_found_not_finite_meanwhile_starts_the_path_again(tmp_path: Path) -> None:
    state = opened(tmp_path)
    training = training_of(state)
    training.adopt(version(0, torch.ones(SIZE)))
    training.step()
    number = state.next_sequence()
    made, bodies = handed_in(training, state, number)
    state.owe(made, b"".join(bodies))
    training.step()
    save(training, state)
    state.remember(receipt(number, state.identity.incarnation, "not-finite"))
    state.close()
    state = opened(tmp_path)
    again = training_of(state)
    assert again.since.steps == 0 and again.version == 0 and again.trainer.optimizer.state == {}
    assert torch.equal(again.trainer.shared().vector, torch.ones(SIZE))
    state.close()


def test_the_path_is_of_one_incarnation_and_ends_with_the_training(tmp_path: Path) -> None:
    state = opened(tmp_path)
    training = training_of(state)
    training.adopt(version(4, torch.ones(SIZE)))
    training.step()
    save(training, state)
    assert training_of(state).version == 4
    before = state.identity.incarnation
    state.reincarnate()
    other = training_of(state)
    assert state.identity.incarnation != before
    assert other.version == -1 and other.since.steps == 0 and other.trainer.steps == 1  # optimiser and data go on
    assert torch.equal(other.model.private_parameters()["own"], training.model.private_parameters()["own"])
    other.adopt(version(4, torch.ones(SIZE)))
    other.step()
    other.finish(version(5, torch.ones(SIZE)), None)
    assert other.since.steps == 0
    assert training_of(state).version == -1
    # trained further, it starts from the version that is read
    other.adopt(version(5, torch.full((SIZE,), 2.0)))
    assert torch.equal(other.trainer.shared().vector, torch.full((SIZE,), 2.0))
    state.close()


def test_a_backup_of_two_moments_restores_no_path(tmp_path: Path) -> None:
    """A checkpoint that knows of an update which the rest of the directory does not."""
    state = opened(tmp_path)
    training = training_of(state)
    training.adopt(version(0, torch.zeros(SIZE)))
    training.step()
    made, bodies = handed_in(training, state, state.next_sequence())
    state.owe(made, b"".join(bodies))
    save(training, state)
    assert training_of(state).version == 0
    state.answered(0)
    assert training_of(state).version == -1
    state.close()


# --- checkpoint -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """kill -9, as far as files go."""


def dying(label: str) -> Callable[[str], None]:
    def reached(step: str) -> None:
        if step == label:
            raise Killed

    return reached


@pytest.mark.parametrize("label", ["before", "during", "after"])
def test_a_checkpoint_is_the_new_one_or_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    state = opened(tmp_path)
    training = training_of(state)
    training.adopt(version(0, torch.zeros(SIZE)))
    training.step()
    save(training, state)
    training.step()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "reached", dying(f"node {label} checkpoint"))
        with pytest.raises(Killed):
            save(training, state)
    again = training_of(state)
    steps = 2 if label == "after" else 1
    assert again.trainer.steps == again.since.steps == steps
    save(training, state)
    assert training_of(state).trainer.steps == 2
    pinned = json.loads((private_of(state) / "pinned.json").read_text())
    assert pinned == {"encoder": "fake-1", "version": 0, "steps": 2, "type": "fake", "architecture": {}}
    state.close()


class Held:
    """A Beside whose work is done when its test says so."""

    def __init__(self) -> None:
        self.works: list[Callable[[], None]] = []

    @property
    def busy(self) -> bool:
        return bool(self.works)

    def run(self, work: Callable[[], None]) -> None:
        self.wait()
        self.works.append(work)

    def wait(self) -> None:
        while self.works:
            self.works.pop()()


def test_a_checkpoint_that_is_put_in_place_later_is_of_the_moment_at_which_it_was_made(tmp_path: Path) -> None:
    state, beside = opened(tmp_path), Held()
    training = training_of(state, beside=beside)
    training.adopt(version(0, torch.zeros(SIZE)))
    for _ in range(2):
        training.step()
        save(training, state)
    local = training.trainer.shared().vector
    moments = {name: each.clone() for name, each in training.trainer.state().items()}
    training.step()
    made, bodies = handed_in(training, state, 0)
    assert training_of(state).steps == 1, "the second is not in place yet, and the first is, whole"
    beside.wait()
    again = training_of(state)
    assert again.steps == again.since.steps == 2 and torch.equal(again.trainer.shared().vector, local)
    assert all(torch.equal(each, moments[name]) for name, each in again.trainer.state().items())
    # what was handed in after that moment is in no path that is gone on with
    number = state.next_sequence()
    state.owe(made, *bodies)
    assert number == 0 and training_of(state).version == -1

    save(training, state)
    training.retune(UpdateRule(finish=FinishRule(steps=3)), 0.0)
    training.finish(version(1, torch.ones(SIZE)), None)
    assert not beside.busy
    found = load_private(private_of(state), FakeModel())
    assert found is not None and found.facts.path is None and found.facts.version == 1, "pinned before it is tuned"
    save(training, state)
    training.conclude(None)
    beside.wait()
    assert not list(private_of(state).glob("finishing*")), "what is over does not come back"
    state.close()


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"{}", lambda raw: b""])
def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    state = opened(tmp_path)
    assert load_private(private_of(state), FakeModel()) is None
    training = training_of(state)
    save(training, state)
    file = private_of(state) / "checkpoint.safetensors"
    model = FakeModel()
    found = load_private(file.parent, model)
    assert found is not None and found.facts.path is None and found.facts.encoder == "fake-1"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: damaged .*restore it from a backup or remove"):
        training_of(state)
    state.close()


# --- state directory --------------------------------------------------------------------------------------------------


def test_a_state_directory_is_for_one_process(tmp_path: Path) -> None:
    state = opened(tmp_path)
    with pytest.raises(LockHeld, match="in use by process"):
        opened(tmp_path)
    state.close()
    (tmp_path / "identity.json").write_text("{")
    for _ in range(2):  # the failed start lets go of it
        with pytest.raises(UserError, match="damaged"):
            opened(tmp_path)


def test_receipts_are_remembered_once_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    book = ReceiptBook(DirectoryStore(tmp_path))
    assert [book.remember(receipt(number)) for number in (0, 1, 0)] == [True, True, False]
    assert book.remember(receipt(0, incarnation="other"))
    whole = path.read_bytes()
    for length in range(1, 60, 7):
        path.write_bytes(whole + receipt(2).model_dump_json().encode()[:length])
        again = ReceiptBook(DirectoryStore(tmp_path))
        assert path.read_bytes() == whole
        assert again.of("i") == [receipt(0), receipt(1)] and again.of("other") == [receipt(0, "other")]
    assert again.remember(receipt(2)) and not again.remember(receipt(1))
    assert ReceiptBook(DirectoryStore(tmp_path)).of("i") == [receipt(0), receipt(1), receipt(2)]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"nonsense\n" + lines[2])
    with pytest.raises(UserError, match=r"receipts\.jsonl: line 2 is damaged; .*remove .* to join as a new"):
        ReceiptBook(DirectoryStore(tmp_path))


def test_what_a_killed_process_left_of_its_updates(tmp_path: Path) -> None:
    state = opened(tmp_path)
    mine = state.identity.incarnation
    for _ in range(3):
        number = state.next_sequence()
        state.owe(manifest(number, mine), b"%d" % number)
    owed = tmp_path / "owed"
    again = manifest(0, mine, attempt=1)
    state.sent_as(again)  # another attempt has the same payload
    assert state.chunk(again, 0) == b"0" and state.owed[0].attempt == 1
    state.remember(receipt(1, mine))  # killed before it was forgotten
    state.close()
    (owed / "000000000003.payload").write_bytes(b"never sent")  # killed before the manifest
    (owed / "000000000004.json.part").write_bytes(b"{")
    (owed / "000000000005.json").write_text(manifest(5, "another").model_dump_json())
    (owed / "000000000005.payload").write_bytes(b"of another incarnation")

    state = opened(tmp_path)
    assert list(state.owed) == [0, 2]
    assert sorted(path.name for path in owed.iterdir()) == [
        f"{number:012d}.{kind}" for number in (0, 2) for kind in ("json", "payload")
    ]
    ledger = state.ledger("fake-1")
    assert set(ledger.answered) == {1} and set(ledger.owed) == {0, 2} and ledger.next_sequence == 3
    assert state.ledger("other") == Ledger(mine)
    # an identity from an older moment than the updates gives no number again
    state.close()
    (tmp_path / "identity.json").write_text(json.dumps({"node": "n", "incarnation": mine, "next_sequence": 1}))
    state = opened(tmp_path)
    assert state.next_sequence() == 3
    state.close()


def test_a_conflict_that_was_heard_leads_to_a_new_incarnation_even_after_a_kill(tmp_path: Path) -> None:
    state = opened(tmp_path)
    mine = state.identity.incarnation
    state.owe(manifest(state.next_sequence(), mine), b"x")
    state.remember_current(INSTRUCTION, RULE)
    state.remember(receipt(0, mine, "conflict"))
    state.close()
    for _ in range(2):
        state = opened(tmp_path)
        new = state.identity.incarnation
        assert new != mine and not state.owed and state.current() is None and state.identity.next_sequence == 0
        state.close()
    assert opened(tmp_path).identity.incarnation == new


def test_what_is_trained_is_remembered_for_one_incarnation(tmp_path: Path) -> None:
    state = opened(tmp_path)
    assert state.current() is None
    state.remember_current(INSTRUCTION, RULE)
    state.close()
    state = opened(tmp_path)
    current = state.current()
    assert current is not None and current.instruction == INSTRUCTION and current.rule == RULE
    kept = (tmp_path / "current.json").read_bytes()
    state.forget_current()
    assert state.current() is None
    state.reincarnate()
    (tmp_path / "current.json").write_bytes(kept)
    assert state.current() is None
    (tmp_path / "current.json").write_bytes(b"{")
    assert state.current() is None
    state.close()


def test_the_labelled_steps_of_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each label the disk holds what a restart needs."""
    seen: list[tuple[str, int, int]] = []
    state = opened(tmp_path)
    mine = state.identity.incarnation
    monkeypatch.setattr(
        handover, "reached", lambda label: seen.append((label, len(state.owed), len(state.ledger("fake-1").answered)))
    )

    class Out:
        problem = ""

        def __init__(self) -> None:
            self.sent: list[tuple[int, int]] = []

        def update(self, made: UpdateManifest) -> None:
            self.sent.append((made.sequence, made.attempt))

    out = Out()
    over = Handover(state, out, SYSTEM)  # type: ignore[arg-type]
    over.hand_over(manifest(state.next_sequence(), mine), [b"1234"])
    over.send_unanswered(after=60.0)
    assert out.sent == [(0, 0)]
    out.problem = "full"
    over.send_unanswered(after=0.0)  # it waits to leave already
    out.problem = ""
    over.send_unanswered(after=0.0)
    assert out.sent == [(0, 0), (0, 1)]
    Handover(state, out, SYSTEM).send_owed()  # type: ignore[arg-type]
    assert out.sent[-1] == (0, 2)
    assert over.answered(receipt(0, mine)) and not over.answered(receipt(0, mine))
    over.send_unanswered(after=0.0)
    assert len(out.sent) == 3
    assert seen[:4] == [
        ("node before owe", 0, 0),
        ("node after owe", 1, 0),
        ("node before receipt", 1, 0),
        ("node after receipt", 1, 1),
    ]
    assert not state.owed
    state.close()


def test_a_waiting_rule_waits_after_a_restart_too() -> None:
    assert Ledger().wait_until_version == -1
    assert Ledger("i", {0: receipt(0, version=8)}, {1: manifest(1, "i", base_version=7)}).wait_until_version == 7
    assert Ledger("i", {0: receipt(0, version=8)}).wait_until_version == 7
    assert Ledger("i", {0: receipt(0, version=8), 1: receipt(1, reason="stale")}).wait_until_version == -1


# --- agent ------------------------------------------------------------------------------------------------------------


def notice(number: int) -> Notice:
    return Notice(encoder="fake-1", version=number, digest=DIGEST, stream_digest=DIGEST, published_at=9.0)


def test_a_resumed_agent_trains_at_once_and_takes_the_masters_answer_as_no_news() -> None:
    agent = Agent("n", "i", ("fake",))
    assert agent.resume(INSTRUCTION, RULE, version=6) == [Train(INSTRUCTION, RULE)]
    assert agent.training
    assert agent.receive(INSTRUCTION) == [CheckSamples(INSTRUCTION)]
    [ack] = agent.samples_checked(INSTRUCTION, 5)
    assert isinstance(ack, Say)
    newer = RULE.model_copy(update={"version": 8})
    assert agent.receive(newer) == [Train(INSTRUCTION, newer), Read("fake-1", 8, 9.0)]
    other = INSTRUCTION.model_copy(update={"encoder": "fake-2"})
    assert agent.receive(other) == []
    # it had finished meanwhile: the other one's turn comes
    end = Finish(
        encoder="fake-1", encoder_type="fake", version=9, digest=DIGEST, stream_digest=DIGEST, published_at=9.0
    )
    assert agent.receive(end) == [Read("fake-1", 9, 9.0, digest=DIGEST)]
    # whichever read brings the last version, it is the last, and once
    assert not agent.finishes("fake-1", 8, exact=False) and agent.finishes("fake-1", 9, exact=False)
    [had, *turn] = agent.version_read("fake-1", 9)
    assert isinstance(had, Say) and isinstance(had.message, Finished) and turn == [CheckSamples(other)]
    assert not agent.finishes("fake-1", 9, exact=False) and not agent.adopts("fake-1", 9, exact=False)
    # without a restored path it needs a version first
    agent = Agent("n", "i", ("fake",))
    assert agent.resume(INSTRUCTION, RULE, version=-1) == [Train(INSTRUCTION, RULE), Read("fake-1", 0, 9.0)]
    assert not agent.training
    assert agent.version_read("fake-1", 4) == [] and agent.training and agent.version == 4


def test_an_encoder_that_the_master_does_not_know_is_let_go() -> None:
    agent = Agent("n", "i", ("fake",))
    agent.resume(INSTRUCTION, RULE, version=6)
    other = INSTRUCTION.model_copy(update={"encoder": "fake-2"})
    agent.receive(other)
    unknown = receipt(0, reason="unknown-encoder")
    assert agent.receive(unknown) == [Answered(unknown), Drop("fake-1"), CheckSamples(other)]
    assert not agent.training and agent.current == other


def test_a_master_that_knows_fewer_versions_is_followed_back() -> None:
    agent = Agent("n", "i", ("fake",))
    agent.resume(INSTRUCTION, RULE, version=9)
    future = receipt(0, reason="future", version=3)
    settle, ask = agent.receive(future)
    assert settle == Answered(future) and isinstance(ask, Say) and isinstance(ask.message, Fetch)
    assert ask.message.have_version == -1 and not agent.training
    # what the stream still holds of the lost history is not it
    assert not agent.adopts("fake-1", 9, exact=False) and agent.adopts("fake-1", 3, exact=True)
    assert agent.receive(notice(3)) == [Read("fake-1", 3, 9.0, exact=True, digest=DIGEST)]
    agent.version_read("fake-1", 3)
    assert agent.training and agent.version == 3
    again = receipt(1, reason="future", version=3)
    assert agent.receive(again) == [Answered(again)]  # handed in before: no news
    assert agent.receive(notice(4)) == [Read("fake-1", 4, 9.0, exact=True, digest=DIGEST)]
    agent.version_read("fake-1", 4)
    assert agent.receive(notice(10)) == [Read("fake-1", 10, 9.0, digest=DIGEST)]
    assert agent.adopts("fake-1", 10, exact=False) and not agent.adopts("fake-2", 10, exact=False)


def test_a_version_that_could_not_be_read_is_read_again_when_it_is_named_again() -> None:
    agent = Agent("n", "i", ("fake",))
    agent.resume(INSTRUCTION, RULE, version=2)
    assert agent.look() == [Look("fake-1", 3)]
    for _ in range(3):
        assert agent.receive(notice(5)) == [Read("fake-1", 5, 9.0, digest=DIGEST)]
        [ask] = agent.read_failed("fake-1", 5)
        assert isinstance(ask, Say) and isinstance(ask.message, Fetch) and ask.message.have_version == 2
        assert ask.message.sought == 5  # else the master would only name it again
    agent.receive(
        Finish(encoder="fake-1", encoder_type="fake", version=6, digest=DIGEST, stream_digest=DIGEST, published_at=9.0)
    )
    assert agent.look() == []


# --- versions on the stream -------------------------------------------------------------------------------------------

TOPOLOGY = Topology("test")


def publish(broker: MemoryBroker, number: int, epoch: int, value: float = 0.0) -> None:
    broker.declare(TOPOLOGY.master())
    publish_version(
        broker,
        TOPOLOGY,
        encoder="fake-1",
        epoch=epoch,
        version=number,
        encoding="float32",
        layout_digest=LAYOUT.digest,
        bodies=encode_vector(torch.full((SIZE,), value), "float32"),
        progress=0.0,
    )


def looked(reader: VersionReader, at_least: int) -> CompleteVersion | None:
    reader.look(at_least, patience=0.2)
    found = None
    while found is None and reader.searching:
        found = reader.step(wait=0.05)
    return found


def test_the_very_version_that_was_named_and_what_nobody_named() -> None:
    broker = MemoryBroker(MemoryServer(), user="n", dead_letters=TOPOLOGY.dead_letters)
    for number in (2, 3, 4):
        publish(broker, number, epoch=1)
    publish(broker, 3, epoch=1, value=1.0)  # by a master whose epochs were restored from a backup too
    reader = VersionReader(broker, TOPOLOGY, "fake-1", LAYOUT.digest)
    first = looked(reader, 3)
    assert first is not None and first.version == 4
    assert looked(reader, 3) is None  # seen
    publish(broker, 5, epoch=1)
    newer = looked(reader, 5)
    assert newer is not None and newer.version == 5
    named = reader.read(3, 0.0, exact=True, patience=0.2)
    assert named.version == 3 and decode_vector(named.payload, SIZE, "float32")[0] == 1.0
    assert reader.read(3, 0.0, patience=0.2).version == 5
    broker.close()


def test_looking_is_quiet_and_gives_way() -> None:
    clock = VirtualClock()
    broker = MemoryBroker(MemoryServer(clock.now), user="n", dead_letters=TOPOLOGY.dead_letters, threaded=False)
    reading = Reading(broker, TOPOLOGY, clock)

    def outcomes() -> list[VersionRead]:
        """What comes of it while nothing else happens."""
        found = []
        for _ in range(40):
            while broker.deliver():
                pass
            if (read := reading.read_one()) is not None:
                found.append(read)
            clock.wait(0.5)
        return found

    reading.look(INSTRUCTION, 1)  # there is no such stream
    assert outcomes() == []
    publish(broker, 1, epoch=1)
    reading.read(INSTRUCTION, 1, 0.0, exact=False)
    for _ in range(3):
        reading.look(INSTRUCTION, 2)
    assert [read.version.version for read in outcomes() if read.version] == [1]  # the looks end without a word
    publish(broker, 2, epoch=1)
    reading.look(INSTRUCTION, 2)
    assert [read.version.version for read in outcomes() if read.version] == [2]
    reading.read(INSTRUCTION, 3, 0.0, exact=False)
    [failed] = outcomes()
    assert failed.version is None and failed.wanted == 3 and "did not come" in failed.problem
    reading.close()
    broker.close()


def test_a_node_that_waits_says_why_the_encoder_it_could_have_trained_was_not_made() -> None:
    server, clock = MemoryServer(VirtualClock().now), VirtualClock(1000.0)
    master, node = HandMaster(server, clock), SteppedNode(server, clock).start()
    why = Withdrawn(encoder="text-1", encoder_type="text", reason="data/words: no such file")
    with capture_logs() as lines:
        for said in (why.model_copy(update={"encoder": "image-1", "encoder_type": "image"}), why):
            master.say(said)
            node.turn()
    assert [line["reason"] for line in lines if "could not make" in line["event"]] == [why.reason]
    assert node.node.figures.note == "waiting for another: text-1 could not be made: data/words: no such file"
