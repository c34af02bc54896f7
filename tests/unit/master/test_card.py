"""The card of a finished encoder: how it was made, and no name of an organisation that did not agree to be named."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from common.cards import title
from common.wire.to_master import InstructionAck, Join, Stop
from master_service.arithmetic.export import card
from master_service.decisions.settings import Settings
from master_service.decisions.state import Measured, Member
from node_service.agent import Agent, CheckSamples, Say
from tests.unit.node.test_node import instruction
from tests.unit.scenario import Scenario


def accepted(scenario: Scenario, node: str, encoder: str, *, named: bool) -> None:
    scenario.apply(Join(node=node, incarnation="first", types=["text"]))
    ack = InstructionAck(node=node, incarnation="first", encoder=encoder, accepted=True, samples=10, named=named)
    scenario.apply(ack)


def test_a_name_is_shown_where_its_owner_agreed_and_a_number_elsewhere() -> None:
    scenario = Scenario(license="apache-2.0", language="en")
    name = scenario.generate()
    for node, named in (("clinic-a", False), ("clinic-b", True), ("clinic-c", False)):
        accepted(scenario, node, name, named=named)
    encoder, settings = scenario.coordinator.state.encoders[name], scenario.coordinator.state.settings
    text = card(encoder, settings)
    assert title(text) == name
    assert [line.split(" | ")[0] for line in text.splitlines() if " | 10 | " in line] == [
        "| node 1",
        "| clinic-b",
        "| node 3",
    ]
    assert "clinic-a" not in text and "clinic-c" not in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["language"], front["pipeline_tag"]) == ("apache-2.0", "en", "feature-extraction")
    for part in ("## How to load it", "## Architecture", "`return-count`", "## Limits", encoder.digest):
        assert part in text
    assert f"shared-encoder replay --encoder {name}" in text and "## Evaluation" not in text
    # whoever agreed may think better of it, and the newest answer holds
    accepted(scenario, "clinic-b", name, named=False)
    assert "clinic-b" not in card(encoder, settings) and "| node 2 | 10 |" in card(encoder, settings)


def test_an_encoder_with_vocabulary_and_head_is_a_whole_model_and_losses_name_nobody() -> None:
    scenario = Scenario()
    name = scenario.generate()
    for node in ("clinic-a", "clinic-b"):
        accepted(scenario, node, name, named=False)
    encoder = scenario.coordinator.state.encoders[name]
    member = encoder.members["clinic-b"].model_copy(update={"held_out": Measured(7, 2.5)})
    told = {"held_out": 2.75, "held_out_version": 9, "best_held_out": 2.5, "best_version": 7}
    members = {**encoder.members, "clinic-b": member}
    architecture = {"vocabulary": "shared", "shared": "all", "tokens": {"pad": "[PAD]"}}
    whole = encoder.model_copy(update={**told, "members": members, "architecture": architecture})
    text = card(whole, Settings())
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "fill-mask" and "AutoModelForMaskedLM" in text
    assert "| 2.500 (7) |" in text and "2.750 about version 9, at its best 2.500 about version 7" in text
    assert "clinic" not in text and "which rows of the embeddings moved" in text
    trunk = card(whole.model_copy(update={"architecture": {"vocabulary": "shared", "shared": "trunk"}}), Settings())
    assert "AutoModelForMaskedLM" not in trunk and "which rows" not in trunk


def test_who_stopped_it_is_not_told_to_everybody() -> None:
    scenario = Scenario()
    name = scenario.generate()
    accepted(scenario, "clinic-a", name, named=False)
    scenario.apply(Stop(sender="clinic-a", encoder=name))
    encoder = scenario.coordinator.state.encoders[name]
    assert encoder.reason == "stopped by clinic-a"
    assert "clinic" not in card(encoder, Settings()) and "stopped on request" in card(encoder, Settings())


@pytest.mark.parametrize("agrees", [True, False])
def test_a_node_says_in_its_ack_whether_it_may_be_named(agrees: bool) -> None:
    agent = Agent("n", "i", ("text",), named=agrees)
    assert agent.receive(instruction()) == [CheckSamples(instruction())]
    [said] = agent.samples_checked(instruction(), 5)
    assert isinstance(said, Say) and isinstance(said.message, InstructionAck) and said.message.named is agrees


def test_acks_members_and_settings_of_older_logs_are_read_and_name_nobody() -> None:
    old = '{"node": "a", "incarnation": "first", "encoder": "text-1", "accepted": true, "samples": 3}'
    assert InstructionAck.model_validate_json(old).named is False
    assert Member.model_validate_json('{"node": "a", "incarnation": "first", "samples": 3}').named is False
    settings = Settings.model_validate_json('{"min_nodes": 2}')
    scenario = Scenario()
    encoder = scenario.coordinator.state.encoders[scenario.generate()]
    assert "license" not in yaml.safe_load(card(encoder, settings).split("---\n")[1])
    for broken in ("", "a\nb", "x" * 101):
        with pytest.raises(ValidationError):
            Settings(license=broken)
