"""The node's pure parts: update rule, path of the shared parameters, protocol agent, and what it keeps on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.numbers.encodings import decode_vector
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.wire.to_master import Fetch, Finished, InstructionAck, Join
from common.wire.to_node import Finish, Instruction, Introduce, Notice, Receipt, Resend, Rule, Withdrawn
from common.wire.update_rule import ReturnWhen, UpdateRule
from node_service.agent import Agent, Answered, CheckSamples, Drop, Read, Reincarnate, Republish, Say, Train
from node_service.handover.local_state import open_local_state
from node_service.training.trajectory import Trajectory
from node_service.training.update_rule import SinceReturn, must_return
from tests.unit.scenario import Scenario

# --- update rule -----------------------------------------------------------------------------------------------------


def test_the_first_bound_that_is_reached_returns() -> None:
    since = SinceReturn()
    assert not must_return(ReturnWhen(steps=1), since)
    for loss in (4.0, 4.0, 2.0):
        since.step(samples=32, loss=loss)
        since.seconds += 0.5
    assert since.mean_loss == pytest.approx(10 / 3)
    assert must_return(ReturnWhen(steps=3), since) and not must_return(ReturnWhen(steps=4), since)
    assert must_return(ReturnWhen(seconds=1.5), since) and not must_return(ReturnWhen(seconds=1.6), since)
    assert must_return(ReturnWhen(samples=96), since) and not must_return(ReturnWhen(samples=97), since)
    assert must_return(ReturnWhen(steps=100, samples=50), since)
    # the running mean went from 4.0 to 3.8: five per cent
    assert must_return(ReturnWhen(loss_change=0.049), since) and not must_return(ReturnWhen(loss_change=0.06), since)
    assert must_return(ReturnWhen(drift=0.1), since, drift=0.2) and not must_return(ReturnWhen(drift=0.1), since)
    again = since.returned()
    assert (again.steps, again.loss_mean) == (0, since.loss_mean)


# --- the path of the shared parameters -------------------------------------------------------------------------------

EVENTS = st.lists(st.sampled_from(["train", "hand in", "accept", "refuse", "version"]), max_size=40)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_every_step_is_handed_in_once_and_none_is_lost(events: list[str]) -> None:
    """With float32 and whole numbers everything is exact: local − what is counted is what is still to be counted."""
    layout, random = Layout([("w", (8,))]), torch.Generator().manual_seed(0)
    target = torch.zeros(8)
    trajectory, local = Trajectory(ParameterSet(layout, target.clone())), target.clone()
    trained_since, in_flight, counted_not_read = torch.zeros(8), {}, torch.zeros(8)
    sequence = 0
    for event in events:
        match event:
            case "train":
                step = torch.randint(-9, 9, (8,), generator=random).float()
                local, trained_since = local + step, trained_since + step
            case "hand in":
                bodies = trajectory.hand_in(sequence, local, "float32")
                in_flight[sequence] = -decode_vector(b"".join(bodies), 8, "float32")
                assert torch.equal(in_flight[sequence], trained_since)
                trained_since, sequence = torch.zeros(8), sequence + 1
            case "accept" if in_flight:
                first = min(in_flight)
                counted_not_read = counted_not_read + in_flight.pop(first)
                trajectory.count(first)
            case "refuse" if in_flight:
                # what was refused stays in the local path until the next version is read, and is gone then
                first = min(in_flight)
                del in_flight[first]
                trajectory.discard(first)
            case "version":
                target = target + torch.randint(-9, 9, (8,), generator=random).float() + counted_not_read
                local, counted_not_read = trajectory.adopt(target, local), torch.zeros(8)
                ahead = trained_since + sum(in_flight.values(), torch.zeros(8))
                assert torch.equal(local, target + ahead)


def test_restart_forgets_the_path() -> None:
    trajectory = Trajectory(ParameterSet(Layout([("w", (4,))]), torch.ones(4)))
    trajectory.hand_in(0, torch.full((4,), float("nan")), "int8")
    assert torch.equal(trajectory.restart(trajectory.origin), torch.ones(4))
    assert decode_vector(b"".join(trajectory.hand_in(1, torch.zeros(4), "int8")), 4, "int8").tolist() == [1.0] * 4


# --- agent -----------------------------------------------------------------------------------------------------------

DIGEST = "0" * 64


def instruction(encoder: str = "text-1", encoder_type: str = "text") -> Instruction:
    return Instruction(
        encoder=encoder, encoder_type=encoder_type, architecture={}, layout=[("w", [2])], layout_digest=DIGEST
    )


def rule(encoder: str = "text-1", version: int = 0) -> Rule:
    return Rule(encoder=encoder, node="n", update_rule=UpdateRule(), version=version, published_at=9.0)


def finish(encoder: str = "text-1", version: int = 5) -> Finish:
    return Finish(
        encoder=encoder, encoder_type="text", version=version, digest=DIGEST, stream_digest=DIGEST, published_at=9.0
    )


def receipt(sequence: int, incarnation: str = "i", reason: str = "") -> Receipt:
    return Receipt(
        encoder="text-1",
        node="n",
        incarnation=incarnation,
        sequence=sequence,
        digest=DIGEST,
        accepted=not reason,
        reason=reason,
        version=1,
    )


def test_the_agent_follows_the_protocol() -> None:
    agent = Agent("n", "i", ("text",))
    [say] = agent.join()
    assert isinstance(say, Say) and isinstance(say.message, Join)
    assert agent.receive(instruction("image-1", "image")) == []
    assert agent.receive(instruction()) == [CheckSamples(instruction())]
    assert agent.receive(instruction("text-2")) == []  # one at a time: it waits
    [ack] = agent.samples_checked(instruction(), 50)
    assert isinstance(ack, Say) and isinstance(ack.message, InstructionAck) and ack.message.accepted
    assert agent.receive(rule("text-9")) == []
    assert agent.receive(rule(version=3)) == [Train(instruction(), rule(version=3)), Read("text-1", 3, 9.0)]
    assert not agent.training
    assert agent.version_read("text-1", 3) == [] and agent.training
    notice = Notice(encoder="text-1", version=4, digest=DIGEST, stream_digest=DIGEST, published_at=9.0)
    assert agent.receive(notice) == [Read("text-1", 4, 9.0, digest=DIGEST)]
    assert agent.receive(notice) == []  # it is on its way
    assert isinstance(agent.read_failed("text-1", 4)[0].message, Fetch)  # type: ignore[union-attr]
    assert agent.receive(notice) == [Read("text-1", 4, 9.0, digest=DIGEST)]
    # a master that starts again states everything again: no second beginning, no older version
    assert agent.receive(instruction()) == [CheckSamples(instruction())]
    assert agent.receive(rule(version=4)) == [Train(instruction(), rule(version=4))]
    assert agent.receive(Introduce(node="n")) == agent.join()
    assert agent.receive(finish()) == [Read("text-1", 5, 9.0, digest=DIGEST)]
    assert agent.receive(finish()) == []  # once is enough, unless the reading fails
    assert agent.read_failed("text-1", 4) == []  # what is wanted now is newer
    # training that goes on before the last version was found is gone on with
    assert agent.receive(rule(version=5)) == [Train(instruction(), rule(version=5)), Republish()]
    assert agent.training
    assert agent.receive(finish()) == [Read("text-1", 5, 9.0, digest=DIGEST)] and not agent.training
    agent.read_failed("text-1", 5)
    assert agent.receive(finish()) == [Read("text-1", 5, 9.0, digest=DIGEST)]
    assert not agent.training
    # F8: the master hears that the last version is here, so that it can let go of the stream
    had = Finished(node="n", incarnation="i", encoder="text-1", version=5)
    assert agent.version_read("text-1", 5) == [Say(had), CheckSamples(instruction("text-2"))]


def test_an_instruction_that_is_nobodys_is_let_go_at_once_whether_it_waits_is_acked_or_is_trained() -> None:
    agent = Agent("n", "i", ("text",))
    for encoder in ("phantom", "another", "waits", "text-1"):
        agent.receive(instruction(encoder))
    assert agent.receive(Withdrawn(encoder="waits")) == [] and list(agent.waiting) == ["another", "text-1"]
    agent.samples_checked(instruction("phantom"), 50)
    assert agent.receive(Withdrawn(encoder="nobody")) == []
    assert agent.receive(Withdrawn(encoder="phantom")) == [CheckSamples(instruction("another"))]
    agent.samples_checked(instruction("another"), 50)
    agent.receive(rule("another"))  # whoever makes up an instruction makes up a rule too
    assert agent.receive(Withdrawn(encoder="another")) == [Drop("another"), CheckSamples(instruction())]
    agent.samples_checked(instruction(), 50)
    assert agent.receive(rule()) == [Train(instruction(), rule()), Read("text-1", 0, 9.0)]


def test_of_an_encoder_that_is_refused_when_its_instruction_comes_again_nothing_stays() -> None:
    """Its owner's hours are over, or somebody else made the second one up: the next encoder begins from nothing."""
    agent = Agent("n", "i", ("text",))
    agent.receive(instruction())
    agent.receive(instruction("text-2"))
    agent.samples_checked(instruction(), 50)
    agent.receive(rule(version=3))
    agent.version_read("text-1", 3)
    agent.receive(finish())
    agent.receive(instruction())
    _, *then = agent.samples_checked(instruction(), 0, "not at this hour")
    assert then == [Drop("text-1"), CheckSamples(instruction("text-2"))]
    assert (agent.rule, agent.finishing, agent.version, agent.wanted) == (None, None, -1, -1) and not agent.training
    agent.samples_checked(instruction("text-2"), 50)
    assert agent.receive(rule("text-2")) == [Train(instruction("text-2"), rule("text-2")), Read("text-2", 0, 9.0)]


def test_an_encoder_that_does_not_begin_does_not_keep_a_node_from_another() -> None:
    agent = Agent("n", "i", ("text",))
    agent.receive(instruction("text-1"))
    agent.samples_checked(instruction("text-1"), 50)
    join, fetch = agent.ask()  # as long as there is nothing else, it is asked for again, and for its end
    assert isinstance(join, Say) and isinstance(join.message, Join)
    assert isinstance(fetch, Say) and isinstance(fetch.message, Fetch) and fetch.message.have_version == -1
    agent.receive(instruction("text-2"))
    refusal, join, check = agent.ask()
    # its master must not count on this node any more
    assert isinstance(refusal, Say) and isinstance(refusal.message, InstructionAck)
    assert (refusal.message.encoder, refusal.message.accepted) == ("text-1", False)
    assert isinstance(join, Say) and isinstance(join.message, Join) and check == CheckSamples(instruction("text-2"))
    agent.samples_checked(instruction("text-2"), 50)
    assert agent.receive(rule("text-1")) == []
    assert agent.ask()[-1] == CheckSamples(instruction("text-1"))  # turn and turn about, until one of them begins


def test_receipts_resends_and_conflicts() -> None:
    agent = Agent("n", "i", ("text",))
    assert agent.receive(receipt(3)) == [Answered(receipt(3))]
    assert agent.receive(receipt(4, incarnation="old")) == []
    again = Resend(encoder="text-1", node="n", incarnation="i", sequence=4, attempt=2)
    assert agent.receive(again) == [Republish(4, 2)]
    assert agent.receive(receipt(5, reason="conflict")) == [Answered(receipt(5, reason="conflict")), Reincarnate()]


def test_a_refusal_turns_to_the_next_encoder() -> None:
    agent = Agent("n", "i", ("text",))
    agent.receive(instruction())
    agent.receive(instruction("text-2"))
    ack, following = agent.samples_checked(instruction(), 0, "no samples")
    assert isinstance(ack, Say) and not ack.message.accepted  # type: ignore[union-attr]
    assert following == CheckSamples(instruction("text-2"))
    # one that ended before this node was let in is dropped
    assert agent.receive(finish("text-2")) == []
    assert agent.current is None


# --- state directory -------------------------------------------------------------------------------------------------


def test_what_is_owed_survives_and_numbers_are_never_given_twice(tmp_path: Path) -> None:
    state = open_local_state(tmp_path, "n")
    numbers = [state.next_sequence(), state.next_sequence()]
    run = Scenario()
    manifests = [run.manifest("n", "text-1", number, incarnation=state.identity.incarnation) for number in numbers]
    for manifest in manifests:
        state.owe(manifest, b"x" * manifest.size)
    state.close()
    again = open_local_state(tmp_path, "n")
    assert again.identity == state.identity and again.next_sequence() == 2
    assert list(again.owed.values()) == manifests
    again.answered(0)
    assert list(again.owed) == [1]
    assert again.chunk(manifests[0], 0) is None and again.chunk(manifests[1], 0) == b"x" * manifests[1].size
    before = again.identity.incarnation
    again.reincarnate()
    assert again.identity.incarnation != before and not again.owed
    again.close()
    with pytest.raises(UserError, match="belongs to node 'n', not 'other'"):
        open_local_state(tmp_path, "other")
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_local_state(tmp_path, "n")
