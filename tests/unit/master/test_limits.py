"""What a request for an encoder may cost: counted before anything is built, bounded in number, and mostly no row."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.encoders import get_encoder_type
from common.encoders.image import ImageEncoderType
from common.errors import UserError
from common.wire.base import Message
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.to_master import Continue, Get, Stop
from common.wire.to_node import Answer
from master_service.arithmetic import generation
from master_service.arithmetic.generation import generate
from master_service.decisions.effects import Generate
from master_service.decisions.limits import KEPT_FAILED, MAX_ARCHITECTURE_BYTES
from master_service.decisions.records import Configured, GenerationFailed
from master_service.decisions.state import State
from tests.unit.scenario import Scenario
from tests.unit.stepped import TOPOLOGY, SteppedMaster, connection, sent_to

IDS = itertools.count()
DEFAULT = 67_072  # parameters of the encoder of type image


class Watched(ImageEncoderType):
    """Says where it was built."""

    def __init__(self) -> None:
        self.devices: list[str] = []

    def initial(self, architecture: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
        self.devices.append(torch.empty(0).device.type)
        return super().initial(architecture, seed)


def order(most: int, **architecture: Any) -> Generate:
    return Generate("image-1", "image", architecture, "fresh", None, 0, max_parameters=most)


def test_an_encoder_that_is_too_large_is_counted_and_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    monkeypatch.setattr(generation, "get_encoder_type", lambda name: watched)
    for too_many in (order(DEFAULT - 1), order(10**9, hidden_size=1 << 17), order(10**5, num_hidden_layers=99)):
        with pytest.raises(UserError, match=r"too large: .*encoder\.max_parameters allows"):
            generate(too_many)
        assert set(watched.devices) == {"meta"}
    assert generate(order(DEFAULT)).parameters.layout.size == DEFAULT
    assert watched.devices[-1] == "cpu"


def test_also_one_of_very_many_tiny_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # private: with 10,000 of them this would take seconds
    monkeypatch.setattr("master_service.arithmetic.counting._MAX_TENSORS", 100)
    tiny = {"hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 1, "num_hidden_layers": 1 << 16}
    with pytest.raises(UserError, match="more than 100 tensors"):
        generate(order(10**9, **tiny))


def test_a_type_that_cannot_be_counted_is_bounded_while_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(Watched):
        def initial(self, architecture: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
            assert torch.zeros(1).tolist() == [0.0], "on the meta device there are no numbers"
            return super().initial(architecture, seed)

    monkeypatch.setattr(generation, "get_encoder_type", lambda name: Stubborn())
    assert generate(order(DEFAULT)).parameters.layout.size == DEFAULT
    with pytest.raises(UserError, match=f"it has {DEFAULT} parameters"):
        generate(order(DEFAULT - 1))
    with pytest.raises(UserError, match="it has far more than 100000 parameters"):
        generate(order(10**5, num_hidden_layers=99))


def test_counting_leaves_the_random_numbers_as_they_were() -> None:
    image = get_encoder_type("image")
    plain = image.initial(image.architecture({}), 3)
    made = generate(Generate("image-1", "image", {}, "fresh", None, 3))
    assert torch.equal(torch.cat([each.flatten() for each in plain.values()]), made.parameters.vector)


# --- no row ----------------------------------------------------------------------------------------------------------


def asked(master: SteppedMaster, server: MemoryServer, *requests: Message) -> list[Answer]:
    """What the operator is told."""
    inbox, broker = sent_to(server, "operator"), connection(server, "operator")
    for request in requests:
        key = f"operator.{request.kind.removeprefix('request.')}"  # type: ignore[attr-defined]
        broker.publish(Publication(TOPOLOGY.request, key, encode(request), message_id=f"r{next(IDS)}"))
    master.run(1.0)
    return [each for each in inbox() if isinstance(each, Answer)]


def get(kind: str = "text", **architecture: Any) -> Get:
    return Get(sender="operator", encoder_type=kind, architecture=architecture)


def test_what_cannot_be_made_is_answered_without_a_row() -> None:
    clock = VirtualClock(1000.0)
    server = MemoryServer(clock.now)
    master = SteppedMaster(server, clock, max_encoders=2).start()
    rows = master.journal.log.last_offset
    unknown, long = get("texxt"), get(note="x" * MAX_ARCHITECTURE_BYTES)
    answers = asked(master, server, unknown, long)
    assert [(each.accepted, each.status) for each in answers] == [(False, "refused")] * 2
    assert "no encoder type texxt here; there are: image, text" in answers[0].detail
    assert f"at most {MAX_ARCHITECTURE_BYTES} are read" in answers[1].detail
    assert master.journal.log.last_offset == rows


def test_no_more_encoders_than_allowed_are_made_at_a_time() -> None:
    clock = VirtualClock(1000.0)
    server = MemoryServer(clock.now)
    master = SteppedMaster(server, clock, max_encoders=2).start()
    [first] = master.master.state.encoders
    [second, third, same] = asked(master, server, get(number=2), get(number=3), get())
    assert second.accepted and same.accepted and same.encoder == first, "to join one begins nothing"
    assert not third.accepted and third.detail.startswith("2 encoders are being made or trained")
    asked(master, server, Stop(sender="operator", encoder=first))
    [now] = asked(master, server, get(number=3))
    assert now.accepted and len(master.master.state.encoders) == 3
    rows = master.journal.log.last_offset
    [again] = asked(master, server, Continue(sender="operator", encoder=first))
    assert not again.accepted and master.journal.log.last_offset == rows


@pytest.mark.parametrize("kept", [None, KEPT_FAILED])
def test_of_failed_encoders_the_newest_are_remembered_unless_the_log_is_of_before(kept: int | None) -> None:
    run = Scenario()
    run.apply(Configured(settings=run.coordinator.state.settings, claims="compared", kept_failed=kept))
    for number in range(KEPT_FAILED + 5):
        run.apply(Get(sender="operator", encoder_type="text", architecture={"number": number}))
        name = next(reversed(run.coordinator.state.encoders))
        run.apply(GenerationFailed(encoder=name, reason="too large"))
    encoders = run.coordinator.state.encoders
    assert len(encoders) == (KEPT_FAILED if kept else KEPT_FAILED + 5)
    assert [each.architecture["number"] for each in encoders.values()][-1] == KEPT_FAILED + 4
    row = Configured(settings=run.coordinator.state.settings).model_dump(mode="json")
    del row["kept_failed"]
    assert Configured.model_validate(row).kept_failed is None, "a row of before says nothing of it"
    plain = run.coordinator.state.model_dump(mode="json")
    assert State.model_validate(plain).kept_failed == kept
