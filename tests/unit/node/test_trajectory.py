"""The path of the shared parameters in place gives the bits that it gave when every operation made a new vector; and
the shared parameters of a model are one vector without anybody noticing."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.encoders import get_encoder_type
from common.encoders.base import Batch, EncoderModel
from common.numbers import encodings
from common.numbers.encodings import EncodedVector, decode_slice, encode_slice, encode_vector
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import BLOCK, EncodingName
from common.wire.update_rule import InnerOptimizer
from node_service.training import shared_vector
from node_service.training.shared_vector import SharedVector
from node_service.training.trainer import Trainer
from node_service.training.trajectory import Trajectory

SIZE = 2 * BLOCK + 5
LAYOUT = Layout([("w", (SIZE,))])


class PlainTrajectory:
    """The arithmetic of the releases before, operation by operation."""

    def __init__(self, start: Tensor) -> None:
        self.origin, self.residual = start.clone(), torch.zeros(SIZE)
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.last_answered = -1

    def hand_in(self, sequence: int, local: Tensor, encoding: EncodingName) -> bytes:
        newest = max(self.pending, default=-1)
        anchor = self.pending[newest][0] if newest > self.last_answered else self.origin
        vector = anchor - local
        body = encode_slice(vector + self.residual, encoding)
        added = vector - decode_slice(body, SIZE, encoding)
        self.residual = self.residual + added
        self.pending[sequence] = local.clone(), added
        return body

    def answer(self, sequence: int, accepted: bool) -> None:
        anchor, added = self.pending.pop(sequence)
        if not accepted:
            self.residual = self.residual - added
        if sequence > self.last_answered:
            self.last_answered, self.origin = sequence, anchor

    def adopt(self, target: Tensor, local: Tensor) -> Tensor:
        moved = target + (local - self.origin)
        shift = target - self.origin
        self.pending = {number: (anchor + shift, added) for number, (anchor, added) in self.pending.items()}
        self.origin = target.clone()
        return moved

    def restart(self) -> Tensor:
        self.pending, self.residual = {}, torch.zeros(SIZE)
        return self.origin.clone()


EVENTS = ["train", "hand in", "accept first", "refuse first", "accept last", "refuse last", "version", "plain version"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["train", "hand in", *EVENTS, "save", "restart", "another encoding"]), max_size=30),
    st.sampled_from(get_args(EncodingName)),
    st.sampled_from(["bfloat16", "float32"]),
)
def test_the_path_has_the_bits_of_plain_arithmetic(events: list[str], up: EncodingName, down: EncodingName) -> None:
    random = torch.Generator().manual_seed(len(events))
    start = EncodedVector([encode_slice(torch.randn(SIZE, generator=random), down)], SIZE, down)
    local = start.decode(torch.empty(SIZE))
    plain, path = PlainTrajectory(local), Trajectory(start)
    sequence, other = 0, local.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "PIECE", BLOCK)
        for event in events:
            open_now = sorted(plain.pending)
            match event:
                case "train":
                    step = torch.randn(SIZE, generator=random) * 1e-2
                    local, other = local - step, other - step
                case "another encoding":
                    up = "float32" if up == "int8" else "int8"
                case "hand in":
                    [body] = path.hand_in(sequence, local, up)
                    assert body == plain.hand_in(sequence, other, up)
                    sequence += 1
                case "accept first" | "refuse first" | "accept last" | "refuse last" if open_now:
                    number = open_now[0 if event.endswith("first") else -1]
                    plain.answer(number, event.startswith("accept"))
                    path.count(number) if event.startswith("accept") else path.discard(number)
                case "version" | "plain version":
                    target = EncodedVector([encode_slice(torch.randn(SIZE, generator=random), down)], SIZE, down)
                    vector = target.decode(torch.empty(SIZE))
                    other = plain.adopt(vector, other)
                    assert path.adopt(target if event == "version" else vector, local) is local
                case "save":
                    saved = {name: tensor.clone() for name, tensor in path.state().items()}
                    path = Trajectory.restored(LAYOUT, saved, path.last_answered)
                case "restart":
                    other, local = plain.restart(), path.restart(path.origin)
            assert torch.equal(local.view(torch.int32), other.view(torch.int32))
        assert sorted(path.pending) == sorted(plain.pending)
        assert torch.equal(path.origin, plain.origin)
        assert path.hand_in(sequence, local, "int8") == [plain.hand_in(sequence, other, "int8")]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("encoding", get_args(EncodingName))
def test_the_path_is_where_the_model_is(device: str, encoding: EncodingName) -> None:
    """On a GPU the arithmetic is done there; a checkpoint, from the disk too, does not take the path anywhere else."""
    random = torch.Generator().manual_seed(1)

    def version() -> EncodedVector:
        return EncodedVector([encode_slice(torch.randn(SIZE, generator=random), "bfloat16")], SIZE, "bfloat16")

    start = version()
    other = start.decode(torch.empty(SIZE))
    local, path, plain = other.to(device, copy=True), Trajectory(start, device), PlainTrajectory(other)
    for sequence in range(4):
        step = torch.randn(SIZE, generator=random) * 1e-2
        local, other = local - step.to(device), other - step
        assert path.drift(local) > 0.0
        [mine], theirs = path.hand_in(sequence, local, encoding), plain.hand_in(sequence, other, encoding)
        sent, wanted = (decode_slice(body, SIZE, encoding) for body in (mine, theirs))
        torch.testing.assert_close(sent, wanted, rtol=1e-2, atol=1e-3)
        state = path.state()
        assert {each.device.type for name, each in state.items() if "/" not in name or name[0] == "a"} == {device}
        if sequence == 2:
            saved = {name: each.cpu().clone() for name, each in state.items()}
            path = Trajectory.restored(LAYOUT, saved, path.last_answered, device)
        path.count(sequence)
        plain.answer(sequence, True)
        target = version()
        other = plain.adopt(target.decode(torch.empty(SIZE)), other)
        assert path.adopt(target, local) is local
        torch.testing.assert_close(local.cpu(), other, rtol=1e-3, atol=1e-3)


def test_a_float32_path_keeps_nothing_for_later_and_an_old_checkpoint_of_one_is_read() -> None:
    path = Trajectory(ParameterSet(LAYOUT, torch.zeros(SIZE)))
    path.hand_in(0, torch.full((SIZE,), 3.0), "float32")
    state = path.state()
    assert set(state) == {"origin", "anchor/0"}
    old = {**state, "residual": torch.zeros(SIZE), "residual/0": torch.zeros(SIZE)}
    again = Trajectory.restored(LAYOUT, old, -1)
    again.discard(0)
    assert torch.equal(again.origin, torch.full((SIZE,), 3.0)) and set(again.state()) == {"origin"}


def test_drift_is_relative_to_the_anchor() -> None:
    path = Trajectory(ParameterSet(LAYOUT, torch.full((SIZE,), 2.0)))
    assert path.drift(torch.full((SIZE,), 2.5)) == pytest.approx(0.25)
    path.hand_in(0, torch.full((SIZE,), 4.0), "int8")
    assert path.drift(torch.full((SIZE,), 4.0)) == 0.0 and path.drift(torch.full((SIZE,), 5.0)) == pytest.approx(0.25)
    assert Trajectory(ParameterSet(LAYOUT, torch.zeros(SIZE))).drift(torch.ones(SIZE)) == float("inf")


# --- the shared parameters as one vector ------------------------------------------------------------------------------

TEXTS = [f"{word} follows {other}, and then comes {word}" for word in "abcdefgh" for other in "klmnop"]


def text_trainer(seed: int = 0) -> Trainer:
    text = get_encoder_type("text")
    # odd sizes: hardly a tensor begins where memory is aligned
    sizes = {"hidden_size": 18, "intermediate_size": 37, "num_attention_heads": 3}
    architecture, assets = text.assets(text.architecture(sizes), {"tokenizer": "bytes"})
    model = text.build(architecture, text.fit_private(TEXTS, architecture, {}, assets), seed)
    return Trainer(model, model.encode(TEXTS), InnerOptimizer(lr=1e-2, warmup_steps=0), seed=seed, device="cpu")


def test_training_has_the_same_bits_whether_parameters_are_views_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    views = text_trainer()
    with monkeypatch.context() as patch:
        # private: there is no model that is all it is but may not be views
        patch.setattr(shared_vector, "_may_be_views", lambda model, parameters: False)
        copies = text_trainer()
        assert views.vector() is views.vector() and views.vector().data_ptr() == _first(views).data_ptr()
        assert copies.vector().data_ptr() != _first(copies).data_ptr()
        for _ in range(5):
            assert views.step() == copies.step()
            for trainer in (views, copies):
                moved = trainer.vector()
                trainer.set_shared(moved.mul_(1.01))
        assert torch.equal(views.shared().vector, copies.shared().vector)
        for mine, theirs in zip(views.model.parameters(), copies.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_whoever_loads_or_moves_a_models_parameters_is_followed() -> None:
    trainer, other = text_trainer(), text_trainer(1)
    trainer.model.load_state_dict(other.model.state_dict())
    assert torch.equal(trainer.vector(), other.vector())
    trainer.model.double().float()  # each parameter gets memory of its own
    _first(trainer).data.fill_(3.0)
    assert trainer.vector()[0] == 3.0 and trainer.vector().data_ptr() == _first(trainer).data_ptr()
    with pytest.raises(ValueError, match="float32 vector of"):
        trainer.set_shared(torch.zeros(3))


def _first(trainer: Trainer) -> nn.Parameter:
    return next(iter(trainer.model.shared_parameters().values()))


class Odd(EncoderModel):
    """Shares what its test says."""

    def __init__(self, shared: dict[str, nn.Parameter], **others: Any) -> None:
        super().__init__()
        self._named = shared
        for name, parameter in {**shared, **others}.items():
            if isinstance(parameter, nn.Parameter):
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, parameter)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return self._named

    def encode(self, samples: Any) -> Any:
        raise NotImplementedError

    def batch(self, encoded: Any, size: int, generator: torch.Generator) -> Batch:
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def features(self, samples: Any) -> Tensor:
        raise NotImplementedError

    def export(self, directory: Any) -> None:
        raise NotImplementedError


def odd(what: str) -> Odd:
    one, two = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.full((4,), 2.0))
    match what:
        case "twice by two names":
            return Odd({"a": one, "b": one})
        case "in half precision":
            return Odd({"a": one, "b": nn.Parameter(two.detach().to(torch.bfloat16))})
        case "in the memory of a buffer":
            return Odd({"a": one, "b": two}, kept=one.detach()[0])
        case "in the memory of another":
            return Odd({"a": one}, other=nn.Parameter(one.detach()[1]))
        case "not contiguous":
            return Odd({"a": nn.Parameter(one.detach().t()), "b": two})
    return Odd({"a": one, "b": two, "empty": nn.Parameter(torch.empty(0))})


ODD = ["twice by two names", "in half precision", "in the memory of a buffer", "in the memory of another"]


@pytest.mark.parametrize("what", [*ODD, "not contiguous", "usual"])
def test_what_cannot_be_a_view_is_copied_and_stays_tied(what: str) -> None:
    model = odd(what)
    parts = {name: part.data_ptr() for name, part in model.shared_parameters().items()}
    vector = SharedVector(model)
    moved = {name: part.data_ptr() for name, part in model.shared_parameters().items()} != parts
    assert moved == (what == "usual")
    wanted = torch.cat([part.detach().float().flatten() for part in model.shared_parameters().values()])
    assert torch.equal(vector.read(), wanted)
    vector.write(vector.read() * 2)
    assert torch.equal(vector.read(), wanted * 2)
    for name, part in [*model.named_parameters(), *model.named_buffers()]:
        assert part.numel() == 0 or part.flatten()[0] in (2.0, 4.0), f"{name} was left behind"


def test_a_version_of_several_slices_is_adopted_and_handed_in() -> None:
    size = (1 << 20) + encodings.PIECE + 7
    layout, random = Layout([("w", (size,))]), torch.Generator().manual_seed(0)
    start, target = (torch.randn(size, generator=random) for _ in range(2))
    path, local = Trajectory(ParameterSet(layout, start)), start + 1.0
    bodies = path.hand_in(0, local, "int8")
    assert bodies == encode_vector(start - local, "int8")
    moved = target + (local - start)
    path.adopt(EncodedVector(encode_vector(target, "float32"), size, "float32"), local)
    assert torch.equal(local, moved)
