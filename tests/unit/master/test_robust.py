"""Robust rules: what liars can do, what is computed slice by slice, and when there is a version at all."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import UserError
from common.numbers import slicing
from common.numbers.encodings import encode_slice, encode_vector
from common.numbers.slicing import BLOCK, EncodingName, encoded_size, part_ranges
from common.wire.to_master import Stop
from master_service.arithmetic.aggregator import Aggregator
from master_service.arithmetic.robust import combined, gradients, shares_of
from master_service.decisions.effects import Contribution, Step
from master_service.decisions.records import Configured, Tick
from master_service.decisions.rules.model import AggregationRule, CombineRule, OuterOptimizer, aggregation_rule
from master_service.decisions.settings import Settings, StopRule, settings_of_start
from master_service.history.replay import Refold, verify
from master_service.history.snapshot import read_snapshot
from master_service.log.message_log import open_log
from master_service.log.payloads import MemoryPayloads
from tests.unit.master.test_fold import Federation, snapshot
from tests.unit.scenario import Scenario, receipts

ROBUST = ("median", "trimmed-mean", "geometric-median", "centered-clip")
ITERATING = ("geometric-median", "centered-clip")
DIMENSIONS = 3


def rule(how: str, liars: int = 1, **changes: object) -> CombineRule:
    return CombineRule(how=how, liars=liars, **changes)  # type: ignore[arg-type]


def of(vectors: Sequence[Sequence[float]] | Tensor, combine: CombineRule) -> Tensor:
    """The rule on whole vectors, with the scalar products taken at once."""
    rows = torch.as_tensor(vectors, dtype=torch.float32)
    if combine.how not in ITERATING:
        return combined(rows, combine)
    started = rows
    if combine.how == "centered-clip":
        started = torch.cat([rows, combined(rows, rule("median")).unsqueeze(0)])
    wide = started.double().numpy()
    return combined(rows, combine, shares_of(combine, wide @ wide.T))


def step(contributions: Sequence[Contribution], combine: CombineRule) -> Step:
    return Step("e", 1, tuple(contributions), OuterOptimizer(), combine)


# --- what liars can do ------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-4, 4, width=32)
VECTORS = st.lists(NUMBERS, min_size=DIMENSIONS, max_size=DIMENSIONS)
LIES = st.lists(st.floats(-1e6, 1e6, width=32) | NUMBERS, min_size=DIMENSIONS, max_size=DIMENSIONS)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 3), st.sampled_from(ROBUST))
def test_liars_do_not_move_it_from_where_the_honest_are(data: st.DataObject, liars: int, more: int, how: str) -> None:
    honest = data.draw(st.lists(VECTORS, min_size=liars + 3 + more, max_size=liars + 3 + more))
    lies = data.draw(st.lists(LIES, min_size=liars, max_size=liars))
    found = of([*honest, *lies], rule(how, liars)).double()
    good = torch.tensor(honest, dtype=torch.float64)
    if how not in ITERATING:
        assert bool(torch.all(found >= good.amin(0) - 1e-5)) and bool(torch.all(found <= good.amax(0) + 1e-5))
        return
    centre, nodes = good.mean(0), len(honest) + liars
    radius = float((good - centre).norm(dim=1).max())
    apart = float((found - centre).norm())
    if how == "geometric-median":
        bound = 2 * (nodes - liars) / (nodes - 2 * liars) * radius
    else:
        # the start is among the honest by coordinate; each of three iterations adds at most half of itself and τ
        bound = 1.5**3 * math.sqrt(DIMENSIONS) * 2 * radius + 7.2 * radius
    assert apart <= bound * 1.01 + 1e-3


@pytest.mark.parametrize("how", ROBUST)
def test_the_mean_it_would_be_without_a_rule_goes_wherever_one_liar_wants(how: str) -> None:
    honest = torch.tensor([[1.0, 2.0, 3.0], [1.1, 2.1, 2.9], [0.9, 1.9, 3.1], [1.0, 2.0, 3.0]])
    lied = torch.cat([honest, -1e6 * honest[:1]])
    assert float(lied.mean(0).norm()) > 1e5
    assert float((of(lied, rule(how)) - honest.mean(0)).norm()) < 0.5


@settings(max_examples=60, deadline=None)
@given(VECTORS, st.integers(5, 9), st.sampled_from(ROBUST))
def test_where_all_agree_it_is_what_they_say(vector: list[float], nodes: int, how: str) -> None:
    assert of([vector] * nodes, rule(how)).tolist() == pytest.approx(vector, rel=1e-5, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(VECTORS, min_size=5, max_size=8), st.randoms(use_true_random=False), st.sampled_from(ROBUST))
def test_who_comes_first_makes_no_difference(vectors: list[list[float]], chance: random.Random, how: str) -> None:
    mixed = list(vectors)
    chance.shuffle(mixed)
    one, other = of(vectors, rule(how)), of(mixed, rule(how))
    if how == "median":
        assert torch.equal(one, other)
    assert one.tolist() == pytest.approx(other.tolist(), rel=1e-3, abs=1e-3)


def test_by_hand() -> None:
    line = [[0.0], [1.0], [2.0], [3.0], [100.0]]
    assert of(line, rule("median")).tolist() == [2.0] and of([*line, [-5.0]], rule("median")).tolist() == [1.5]
    assert of(line, rule("trimmed-mean")).tolist() == [2.0]
    assert of([*line, [-5.0]], rule("trimmed-mean")).tolist() == [1.5]
    assert of(line, rule("geometric-median", iterations=500)).tolist() == pytest.approx([2.0], abs=0.02)
    # from 2 on, cut to 1: (−1 − 1 + 0 + 1 + 1) / 5 is nothing
    assert of(line, rule("centered-clip", iterations=1, radius=1.0)).tolist() == pytest.approx([2.0])
    assert of(line, rule("centered-clip", iterations=1, radius=1e9)).tolist() == pytest.approx([106 / 5])
    corner = [[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]]  # Fermat's point of a triangle
    assert of(corner, rule("geometric-median", iterations=500)).tolist() == pytest.approx([0.0, 0.0], abs=1e-4)


# --- slice by slice ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.sampled_from(get_args(EncodingName)), st.data())
def test_a_part_of_a_slice_is_what_it_would_be_encoded_as(
    size: int, encoding: EncodingName, data: st.DataObject
) -> None:
    body = encode_slice(torch.randn(size, generator=torch.Generator().manual_seed(size)), encoding)
    start = BLOCK * data.draw(st.integers(0, (size - 1) // BLOCK))
    stop = data.draw(st.integers(start, size))
    stop = stop if stop == size else stop // BLOCK * BLOCK
    if stop <= start:
        return
    ranges = part_ranges(size, encoding, start, stop)
    assert sum(length for _, length in ranges) == encoded_size(stop - start, encoding)
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))[start:stop]
    assert b"".join(body[offset : offset + length] for offset, length in ranges) == encode_slice(values, encoding)


@pytest.mark.parametrize("how", ROBUST)
def test_the_size_of_slices_and_parts_does_not_change_a_bit(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, payloads, chance = 5000, MemoryPayloads(), torch.Generator().manual_seed(3)
    made: list[bytes] = []
    encodings: list[EncodingName] = ["float32", "float32", "bfloat16", "float32", "bfloat16", "float32"]
    vectors = [torch.randn(size, generator=chance) for _ in encodings]
    for slice_size, at_once in itertools.product((512, 2048, 1 << 20), (BLOCK, 6 * 1024, 1 << 22)):
        monkeypatch.setattr(slicing, "SLICE", slice_size)
        bodies = [b"".join(encode_vector(each, name)) for each, name in zip(vectors, encodings, strict=True)]
        parts = [
            Contribution(payloads.write(body), name, 0.5 if part == 2 else 1.0, part)
            # the third node has two updates at hand
            for part, (body, name) in zip((0, 1, 2, 2, 3, 4), zip(bodies, encodings, strict=True), strict=True)
        ]
        found = [gradient for _, _, gradient in gradients(step(parts, rule(how)), payloads, size, at_once)]
        made.append(torch.cat(found).numpy().tobytes())
    assert len(set(made)) == 1
    whole = torch.stack([vectors[0], vectors[1], (vectors[2].bfloat16() + vectors[3]) / 2, *vectors[4:]])
    expected = of(whole, rule(how))
    assert np.frombuffer(made[0], np.float32) == pytest.approx(expected.numpy(), abs=0.02)


def test_a_nodes_own_updates_are_averaged_first() -> None:
    """Five updates of one liar are one of five nodes, and not five of nine."""
    payloads = MemoryPayloads()

    def written(value: float) -> str:
        return payloads.write(b"".join(encode_vector(torch.full((10,), value), "float32")))

    run = Scenario(rule=aggregation_rule("fedbuff", {"buffer": {"size": 9}, "combine": {"how": "median"}}))
    name = run.generate()
    for node in "abcde":
        run.join(node, name)
    said = [("e", 1e3)] * 5 + [(node, 1.0) for node in "abcd"]
    for sequence, (node, value) in enumerate(said):
        manifest = run.manifest(node, name, sequence, encoding="float32", digest=written(value))
        run.apply(manifest, *run.payload(manifest))
    [ordered] = [effect for effect in run.effects if isinstance(effect, Step)]
    assert [each.part for each in ordered.contributions] == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert [each.coefficient for each in ordered.contributions[4:]] == pytest.approx([0.2] * 5)
    [(_, _, found)] = gradients(ordered, payloads, 10)
    assert found.tolist() == pytest.approx([1.0] * 10)


# --- when there is a version ------------------------------------------------------------------------------------------


def robust_run(nodes: str, **changes: object) -> tuple[Scenario, str]:
    combine = {"how": "trimmed-mean", "liars": 1}
    decided = aggregation_rule("fedasync", {"combine": combine})
    run = Scenario(rule=decided, **{"stop": StopRule(versions=10**6), **changes})
    name = run.generate()
    for node in nodes:
        run.join(node, name)
    return run, name


def test_fewer_nodes_than_it_needs_make_no_version_however_long_they_wait() -> None:
    run, name = robust_run("abcdef")
    for sequence, node in enumerate("aabbccdd"):
        run.update(node, name, sequence)
    assert run.coordinator.deadline() is None, "no grace time: four nodes may be half liars"
    run.at += 1e6
    run.apply(Tick())
    encoder = run.coordinator.state.encoders[name]
    assert encoder.version == 0 and len(encoder.buffer) == 8
    assert len(receipts(run.update("e", name, 0))) == 9 and encoder.version == 1


def test_at_the_end_what_too_few_have_handed_in_does_not_count() -> None:
    run, name = robust_run("abcde")
    for sequence, node in enumerate("aab"):
        run.update(node, name, sequence)
    encoder = run.coordinator.state.encoders[name]
    told = receipts(run.apply(Stop(sender="operator")))
    assert [(each.node, each.accepted, each.reason) for each in told] == [(node, False, "finished") for node in "aab"]
    assert (encoder.status, encoder.version, encoder.updates) == ("finished", 0, 0)
    assert (encoder.members["a"].returns, encoder.members["a"].refused, encoder.members["a"].pending) == (0, 2, {})
    again = receipts(run.update("a", name, 0, base=0))
    assert again == told[:1], "asked again, the same answer"


def test_a_master_with_too_few_nodes_or_a_rule_that_contradicts_itself_does_not_start() -> None:
    wanted = Settings(rule=aggregation_rule("return-count", {"combine": {"how": "median", "liars": 2}}), min_nodes=6)
    with pytest.raises(UserError, match=r"'median' with liars = 2 needs 7 distinct nodes, and encoder.min_nodes is 6"):
        settings_of_start(None, wanted, {})
    with pytest.raises(UserError, match="needs 7 distinct nodes"):
        given = {"rule": {"combine": {"how": "median", "liars": 2}}}
        settings_of_start(Settings(min_nodes=6), Settings(), given, change=True)
    enough = wanted.model_copy(update={"min_nodes": 7})
    assert settings_of_start(None, enough, {}) is enough
    assert aggregation_rule("diloco").combine.needs == 1
    for changes in ({"outer": {"rho": 0.67}}, {"weights": {"samples_power": 1.0}}):
        with pytest.raises(ValueError, match=r"combine\.how = 'median'"):
            aggregation_rule("return-count", {**changes, "combine": {"how": "median"}})


# --- replay -----------------------------------------------------------------------------------------------------------


class RobustFederation(Federation):
    """Five nodes under a robust rule."""

    def __init__(self, directory: Path, decided: AggregationRule) -> None:
        super().__init__(directory, "diloco")
        self.record(Configured(settings=Settings(rule=decided), claims="compared"))
        for node in "de":
            self.join(node)


@pytest.mark.parametrize("how", ROBUST)
def test_the_log_rebuilds_every_version_bit_for_bit_also_after_a_snapshot(tmp_path: Path, how: str) -> None:
    run = RobustFederation(tmp_path, aggregation_rule("diloco", {"combine": {"how": how}}))
    for sequence in range(4):
        for node in "cadbe":
            run.update(node, sequence)
        if sequence == 1:
            run.update("a", 90)
            snapshot(run)
    assert run.state.version == 4
    reader = open_log(tmp_path, read_only=True)
    fold = read_snapshot(tmp_path / "snapshots", reader)
    assert fold.offset > 0 and all(check is None or check.identical for _, check in verify(reader, fold))
    assert fold.coordinator.state == run.fold.coordinator.state
    refold = Refold(reader)
    assert sum(1 for _ in refold.run()) == reader.last_offset + 1
    assert refold.fold.coordinator.state.encoders[run.encoder] == run.state
    assert isinstance(refold.fold.arithmetic, Aggregator)
    assert refold.fold.arithmetic.digest(run.encoder) == run.state.digest
    # and by another robust rule the same messages make another encoder
    other = next(each for each in ROBUST if each != how)
    changed = Refold(reader, lambda settings: settings.model_copy(
        update={"rule": aggregation_rule("diloco", {"combine": {"how": other}})}
    ))  # fmt: skip
    assert sum(1 for _ in changed.run()) > 0
    assert changed.fold.coordinator.state.encoders[run.encoder].version == 4
    assert changed.fold.arithmetic.digest(run.encoder) != run.state.digest
