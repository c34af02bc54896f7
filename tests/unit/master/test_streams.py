"""F8: the parameter stream of a finished encoder is let go of, and is there again for whoever comes later."""

from __future__ import annotations

import pytest

from common.wire.to_master import Continue, Fetch, Finished, Get, Leave, Stop
from common.wire.to_node import Finish
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Conclude, DeleteStream, Effect, Publish
from master_service.decisions.messages_out import PUBLISH_AGAIN_SECONDS
from master_service.decisions.records import Presence, Started, Tick
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import StopRule
from master_service.decisions.state import State
from master_service.decisions.streams import STREAM_SECONDS
from tests.unit.scenario import Scenario, sent


def ended(nodes: str = "ab") -> tuple[Scenario, str]:
    """An encoder that has ended with version 1; the stream is as old as it must be at least."""
    run = Scenario(rule=aggregation_rule("fedavg"), stop=StopRule(versions=1))
    name = run.generate()
    for node in nodes:
        run.join(node, name)
    for node in nodes:
        effects = run.update(node, name, 0)
    assert [type(effect) for effect in effects if isinstance(effect, Publish | Conclude)] == [Publish, Conclude]
    run.at += PUBLISH_AGAIN_SECONDS
    return run, name


def has(run: Scenario, name: str, node: str, version: int = 1) -> list[Effect]:
    return run.apply(Finished(node=node, incarnation="first", encoder=name, version=version))


def fetch(run: Scenario, name: str, node: str, have: int = 0) -> list[Effect]:
    return run.apply(Fetch(node=node, incarnation="first", encoder=name, have_version=have))


def test_f8_the_stream_goes_when_every_node_has_the_last_version() -> None:
    run, name = ended()
    assert has(run, name, "a") == has(run, name, "a") == has(run, name, "stranger") == []
    assert has(run, name, "b", version=0) == [], "that is not the last version"
    assert has(run, name, "b") == [DeleteStream(name)]
    assert run.coordinator.deadline() is None and run.apply(Tick()) == []
    again = Coordinator()
    assert [effect for entry in run.log for effect in again.handle(entry)] == run.effects
    assert State.model_validate_json(again.state.model_dump_json()) == run.coordinator.state


def test_f8_a_stream_is_not_deleted_and_written_again_more_often_than_a_lost_version_is() -> None:
    run, name = ended()
    run.at -= 1.0  # just before it is old enough
    assert has(run, name, "a") == has(run, name, "b") == []
    assert run.coordinator.deadline() == run.at + 1.0
    run.at += 1.0
    assert run.apply(Tick()) == [DeleteStream(name)]


@pytest.mark.parametrize("goes", [Leave(node="b", incarnation="first"), Presence(node="b", present=False)])
def test_f8_who_is_not_there_is_not_waited_for(goes: Leave | Presence) -> None:
    run, name = ended()
    assert has(run, name, "a") == []
    assert run.apply(goes) == [DeleteStream(name)]


def test_f8_an_hour_after_the_end_it_goes_whoever_is_silent() -> None:
    run, name = ended()
    finish_at = run.at - PUBLISH_AGAIN_SECONDS
    has(run, name, "a")
    assert run.coordinator.deadline() == finish_at + STREAM_SECONDS
    run.at = finish_at + STREAM_SECONDS - 1
    assert run.apply(Tick()) == []
    run.at += 1
    assert run.apply(Tick()) == [DeleteStream(name)]
    assert run.apply(Started(epoch=2, fingerprint={})) == [] and run.apply(Tick()) == []


def test_f8_an_observer_does_not_say_that_it_has_read_and_has_an_hour() -> None:
    run, name = ended()
    run.apply(Get(sender="reader", encoder_type="text"))
    assert has(run, name, "a") == has(run, name, "b") == []
    assert run.coordinator.deadline() == run.at + STREAM_SECONDS


@pytest.mark.parametrize("how", ["get", "fetch", "late update", "continue"])
def test_f8_whoever_comes_after_that_finds_it_published_again(how: str) -> None:
    run, name = ended()
    has(run, name, "a")
    assert has(run, name, "b") == [DeleteStream(name)]
    run.at += 5.0
    match how:
        case "get":
            effects = run.apply(Get(sender="reader", encoder_type="text"))
        case "fetch":
            effects = fetch(run, name, "a")
        case "late update":
            effects = run.update("a", name, 1)
        case "continue":
            effects = run.apply(Continue(sender="reader", encoder=name))
    assert [effect.version for effect in effects if isinstance(effect, Publish)] == [1]
    if how in ("fetch", "late update"):
        kinds = [type(each) for each in effects if isinstance(each, Publish)] + sent(effects, Finish, "a")
        assert len(kinds) == 2 and effects.index(run.effects[-1]) == len(effects) - 1, "published, then told"
        assert fetch(run, name, "b")[:-1] == [], "it is there now, and not written for each who asks"
        run.at += PUBLISH_AGAIN_SECONDS
        assert has(run, name, "a") == [] and has(run, name, "b") == [DeleteStream(name)]
    if how == "get":
        assert run.coordinator.deadline() == run.at + STREAM_SECONDS
    if how == "continue":
        run.join("a", name)
        has(run, name, "a")  # comes late, of the run before
        run.update("a", name, 1)
        run.at += PUBLISH_AGAIN_SECONDS
        assert has(run, name, "a") == [], "of the run before"
        assert has(run, name, "a", version=2) == [DeleteStream(name)]


def test_f8_a_training_that_is_continued_keeps_its_stream() -> None:
    run, name = ended()
    has(run, name, "a")
    run.apply(Continue(sender="reader", encoder=name))
    run.at += 2 * STREAM_SECONDS
    assert has(run, name, "b") == [] and not any(isinstance(each, DeleteStream) for each in run.apply(Tick()))


def test_f8_a_node_that_joins_after_the_end_reads_before_the_stream_goes() -> None:
    run, name = ended()
    assert sent(fetch(run, name, "late"), Finish, "late")  # no member: nobody knows whether it will say so
    assert has(run, name, "a") == has(run, name, "b") == has(run, name, "late") == []
    assert run.coordinator.deadline() == run.at - PUBLISH_AGAIN_SECONDS + STREAM_SECONDS


def test_f8_an_encoder_that_nobody_trained_is_kept_for_who_asks() -> None:
    run = Scenario(min_nodes=2)
    name = run.generate()
    run.join("a", name)
    run.apply(Stop(sender="operator"))
    assert run.coordinator.deadline() == run.at + STREAM_SECONDS
