"""The finishing phase for real: a tiny model, its files, and every moment at which it may be killed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from common.numbers.encodings import encode_vector
from common.numbers.parameters import ParameterSet
from common.wire.to_node import Instruction, ParameterChunk
from common.wire.transfer import CompleteVersion
from common.wire.update_rule import FinishRule, InnerOptimizer, UpdateRule
from node_service.handover.receipt_book import Ledger
from node_service.training.finishing import load_finished
from node_service.training.looks import Looks
from node_service.training.private_parts import load_spec
from node_service.training.session import Session
from tests.faults.tiny import ASSETS, TinyEncoderType, samples

TYPE = TinyEncoderType()
START = ParameterSet.from_tensors(TYPE.initial(TYPE.architecture({}), 1))
INSTRUCTION = Instruction(
    encoder="tiny-1",
    encoder_type="tiny",
    architecture=TYPE.architecture({}),
    layout=START.layout.plain(),
    layout_digest=START.layout.digest,
)
TRAIN, VALIDATION = samples(3, 60), samples(3, 200)[60:]
STEPS = 30
#: A rate at which this model learns, and one that throws it about.
SLOW, WILD = InnerOptimizer(lr=1e-3, batch_size=8), InnerOptimizer(lr=3.0, batch_size=8, schedule="constant")


@pytest.fixture(autouse=True, scope="module")
def _tiny_type() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("node_service.training.session.get_encoder_type", lambda name: TYPE)
        yield


def opened(directory: Path, validation: Any = VALIDATION, of: Instruction = INSTRUCTION) -> Session:
    ledger = Ledger("first", {}, {})
    return Session(
        of,
        TRAIN,
        directory,
        private={},
        assets=ASSETS,
        seed=0,
        device="cpu",
        ledger=ledger,
        validation=validation,
    )


def version(number: int, vector: Tensor = START.vector) -> CompleteVersion:
    payload = b"".join(encode_vector(vector, "float32"))
    head = ParameterChunk(
        encoder="tiny-1",
        epoch=1,
        version=number,
        index=0,
        chunks=1,
        encoding="float32",
        layout_digest=START.layout.digest,
        size=len(payload),
        digest="0" * 64,
        checksum="",
        data=b"",
    )
    return CompleteVersion(head, payload)


def at_the_end(
    directory: Path, finish: FinishRule, inner: InnerOptimizer = SLOW, validation: Any = VALIDATION
) -> Session:
    """A session that trained ten steps and has just taken its last version, version 4."""
    training = opened(directory, validation)
    training.retune(UpdateRule(finish=finish, inner=inner), 0.0)
    training.adopt(version(0))
    for _ in range(10):
        training.step()
    assert training.finish(version(4), None) is None and training.finishing is not None
    return training


def run_out(training: Session) -> Path:
    while not training.finishing.over:  # type: ignore[union-attr]
        training.step()
    return training.conclude(None)


def exported(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- which moment is the best ----------------------------------------------------------------------------------------

LOSSES = st.lists(st.one_of(st.sampled_from([1.0, 2.0, 3.0, float("nan"), float("inf")]), st.floats(0, 9)), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.floats(0, 9), st.just(float("nan"))), LOSSES, st.integers(1, 5), st.integers(1, 7))
def test_a_phase_ends_early_only_after_patience_looks_without_gain(
    before: float, losses: list[float], patience: int, every: int
) -> None:
    looks = Looks(total=60, every=every, patience=patience)
    looks.first(before)
    seen = []
    for loss in losses:
        if looks.over:
            break
        looks.steps = min(60, looks.steps + every)
        better = looks.look(loss)
        seen.append(loss)
        assert better == (looks.best == loss and looks.without_gain == 0)
    finite = [loss for loss in [before, *seen] if loss < float("inf")]
    assert looks.best == min(finite, default=None), "never worse than before, and the least of all that was seen"
    if looks.over and looks.steps < 60:
        assert len(seen) >= patience
        earlier = [loss for loss in [before, *seen[:-patience]] if loss < float("inf")]
        assert not any(loss < min(earlier, default=float("inf")) for loss in seen[-patience:])


@pytest.mark.parametrize(
    ("rule", "so_far", "expected"),
    [
        (FinishRule(), 600, (402, 40)),
        (FinishRule(), 30, (20, 10)),
        (FinishRule(steps=70, look_every=7), 1, (70, 7)),
        (FinishRule(), 0, None),
        (FinishRule(steps=0), 600, None),
        (FinishRule(what="none"), 600, None),
    ],
)
def test_how_long_a_phase_is(rule: FinishRule, so_far: int, expected: tuple[int, int] | None) -> None:
    looks = Looks.planned(rule, so_far)
    assert (looks and (looks.total, looks.every)) == expected
    assert looks is None or (looks.total / (looks.total + so_far) == pytest.approx(0.4, abs=0.01)) or rule.steps


def test_the_rate_is_full_for_three_fifths_and_falls_to_the_final_fraction() -> None:
    looks, cosine = Looks(total=100, every=10, patience=3), InnerOptimizer(lr=2.0, final_fraction=0.1)
    rates = []
    for looks.steps in range(101):
        rates.append(looks.rate(cosine))
        assert looks.rate(cosine.model_copy(update={"schedule": "constant"})) == rates[-1], "whatever came before"
    assert rates[:61] == [2.0] * 61 and rates[100] == pytest.approx(0.2) and rates[80] == pytest.approx(1.1)
    assert all(later < sooner for sooner, later in itertools.pairwise(rates[60:]))


# --- the phase -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["all", "private"])
def test_what_is_exported_is_the_best_moment(tmp_path: Path, what: Any) -> None:
    training = at_the_end(tmp_path, FinishRule(steps=STEPS, look_every=5, what=what))
    pinned = training.trainer.shared().vector
    looks = training.finishing
    assert looks is not None and training.held_out is not None and looks.before == training.held_out.loss
    model = exported(run_out(training))
    assert looks.steps == STEPS and looks.best is not None and looks.best < looks.before
    again = opened(tmp_path)
    again.model.load_state_dict(model)
    again.retune(training.rule, 0.0)
    assert again.trainer.held_out_loss(again.model.encode(VALIDATION)) == looks.best
    assert torch.equal(again.trainer.shared().vector, pinned) == (what == "private")
    assert not (tmp_path / "finishing.safetensors").exists()

    other = TYPE.build(INSTRUCTION.architecture, load_spec(tmp_path) or {}, 1)
    assert not load_finished(tmp_path, other, 5), "of another version"
    assert load_finished(tmp_path, other, 4) and same(other.state_dict(), model)


def test_a_phase_that_only_harms_exports_the_shared_version_and_ends_early(tmp_path: Path) -> None:
    training = at_the_end(tmp_path, FinishRule(steps=STEPS, look_every=2, patience=3), WILD)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    looks = training.finishing
    assert looks is not None
    model = run_out(training)
    assert looks.steps == 6 and looks.best == looks.before and same(exported(model), before)


def test_without_a_validation_part_all_of_it_runs_and_its_end_is_exported(tmp_path: Path) -> None:
    training = at_the_end(tmp_path, FinishRule(steps=STEPS, look_every=2, patience=1), WILD, ())
    looks = training.finishing
    assert looks is not None and training.held_out is None
    while not looks.over:
        training.step()
    end = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    assert looks.steps == STEPS and looks.best is None and same(exported(training.conclude(None)), end)


@pytest.mark.parametrize("what", ["all", "private"])
def test_whoever_trains_on_goes_on_from_the_checkpoint_as_if_there_had_been_no_phase(tmp_path: Path, what: Any) -> None:
    plain = opened(tmp_path / "plain")
    plain.retune(UpdateRule(finish=FinishRule(what="none"), inner=SLOW), 0.0)
    plain.adopt(version(0))
    for _ in range(10):
        plain.step()
    assert plain.finish(version(4), None) is not None
    tuned = at_the_end(tmp_path / "tuned", FinishRule(steps=STEPS, look_every=5, what=what))
    checkpoint = (tmp_path / "tuned/checkpoint.safetensors").read_bytes()
    for _ in range(7):
        tuned.step()
        tuned.save("first", 0)
    assert (tmp_path / "tuned/checkpoint.safetensors").read_bytes() == checkpoint
    tuned.conclude(None)
    for training in (plain, tuned):
        training.adopt(version(5, 0.5 * START.vector))
        for _ in range(3):
            training.step()
    assert plain.steps == tuned.steps == 13
    assert same(plain.model.state_dict(), tuned.model.state_dict())


@pytest.mark.parametrize(("what", "inner"), [("all", SLOW), ("private", SLOW), ("all", WILD)])
def test_killed_after_any_step_it_comes_to_the_same_bits(tmp_path: Path, what: Any, inner: InnerOptimizer) -> None:
    rule = FinishRule(steps=9, look_every=2, patience=2, what=what)
    whole = at_the_end(tmp_path / "whole", rule, inner)
    looks = whole.finishing
    model = exported(run_out(whole))
    assert looks is not None
    for step in range(looks.steps + 1):
        place = tmp_path / str(step)
        killed = at_the_end(place, rule, inner)
        for _ in range(step):
            killed.step()
        killed.save("first", 0)
        if step < looks.steps:
            killed.step()  # and this one is lost
        back = opened(place)
        assert back.finish_on() and back.version == 4 and back.finishing is not None
        resumed = back.finishing
        assert same(exported(run_out(back)), model) and resumed == looks, step


def test_killed_before_anything_of_the_phase_is_remembered_it_begins_again(tmp_path: Path) -> None:
    """Between the checkpoint and the phase's file: the last version is read once more."""
    whole = exported(run_out(at_the_end(tmp_path / "whole", FinishRule(steps=12, look_every=3))))
    at_the_end(tmp_path / "killed", FinishRule(steps=12, look_every=3))
    (tmp_path / "killed/finishing.safetensors").unlink()
    back = opened(tmp_path / "killed")
    assert not back.finish_on()
    back.retune(UpdateRule(finish=FinishRule(steps=12, look_every=3), inner=SLOW), 0.0)
    assert back.finish(version(4), None) is None
    assert same(exported(run_out(back)), whole)


def test_a_phase_of_another_model_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    at_the_end(tmp_path, FinishRule(steps=12))
    place = tmp_path / "finishing.safetensors"
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(UserError, match=r"finishing\.safetensors: damaged"):
        opened(tmp_path).finish_on()
    at_the_end(tmp_path / "other", FinishRule(steps=12))
    (tmp_path / "other/checkpoint.safetensors").unlink()
    wide = {**INSTRUCTION.architecture, "width": 3}
    layout = ParameterSet.from_tensors(TYPE.initial(wide, 1)).layout
    other = {"architecture": wide, "layout": layout.plain(), "layout_digest": layout.digest}
    with pytest.raises(UserError, match="is of another model"):
        opened(tmp_path / "other", of=INSTRUCTION.model_copy(update=other)).finish_on()


# --- what is measured of versions ------------------------------------------------------------------------------------


def test_a_version_is_measured_as_it_came_and_costs_training_nothing(tmp_path: Path) -> None:
    measured, plain = opened(tmp_path / "measured"), opened(tmp_path / "plain")
    for training, every in ((measured, 10), (plain, 0)):
        training.retune(UpdateRule(evaluate_every=every, inner=SLOW), 0.0)
        training.adopt(version(0))
        for _ in range(60):
            training.step()
    assert plain.held_out is None and measured.held_out is not None and measured.held_out.version == 0
    for number in (9, 10, 15):
        target = (1 + 0.1 * number) * START.vector
        for training in (measured, plain):
            training.adopt(version(number, target))
        assert measured.held_out.version == (0 if number == 9 else 10)
        if number == 10:
            with torch.no_grad():
                alone = opened(tmp_path / "other")
                alone.retune(measured.rule, 0.0)
                for name, parameter in alone.model.private_parameters().items():
                    parameter.copy_(measured.model.get_parameter(name))
            alone.trainer.set_shared(target)
            assert measured.held_out.loss == alone.trainer.held_out_loss(alone.model.encode(VALIDATION))
    for training in (measured, plain):
        training.step()
    assert same(measured.model.state_dict(), plain.model.state_dict())
    save_and_reopen = opened(tmp_path / "measured")
    assert save_and_reopen.held_out is None
    measured.save("first", 0)
    assert opened(tmp_path / "measured").held_out == measured.held_out
