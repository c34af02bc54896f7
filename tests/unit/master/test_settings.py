"""F14: a start with other settings than the log's is refused with each difference, unless the change is meant."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from common.errors import UserError
from common.wire.update_rule import InnerOptimizer, ReturnWhen, UpdateRule
from master_service.decisions.rules.model import PRESETS, aggregation_rule
from master_service.decisions.settings import LossPlateau, Settings, StopRule, differences, merged, settings_of_start

LOGGED = Settings(
    rule=aggregation_rule("fedbuff", {"outer": {"lr": 2.0}}),
    update_rule=UpdateRule(when=ReturnWhen(steps=10), inner=InnerOptimizer(lr=1e-3)),
    stop=StopRule(updates=1200),
    min_nodes=5,
    architecture={"hidden_size": 16, "num_hidden_layers": 1},
    publish_every_seconds=7.0,
    tokenizer="bytes",
)


def lines(given: dict[str, Any], logged: Settings = LOGGED) -> list[str]:
    return [str(difference) for difference in differences(logged, merged(logged, given))]


def test_f14_what_is_not_given_stands_as_logged() -> None:
    assert settings_of_start(LOGGED, Settings(), {}) == LOGGED, "also what the defaults of this release would be"
    assert settings_of_start(LOGGED, Settings(min_nodes=5), {"min_nodes": 5}) == LOGGED


def test_f14_the_first_start_is_with_what_was_given_and_the_defaults() -> None:
    defaults = Settings(min_nodes=3)
    assert settings_of_start(None, defaults, {"min_nodes": 3}) == defaults


def test_f14_who_composes_a_service_in_code_means_all_of_it() -> None:
    assert settings_of_start(LOGGED, Settings(), None) == Settings()


def test_f14_values_equal_to_the_logged_ones_are_fine() -> None:
    given = {
        "rule": {"preset": "fedbuff", "outer": {"lr": "2.0"}},  # text, as from the environment
        "stop": {"updates": 1200},
        "update_rule": {"when": {"steps": 10}, "inner": {"lr": 0.001}},
        "architecture": {"hidden_size": 16},
    }
    assert settings_of_start(LOGGED, Settings(), given) == LOGGED


def test_f14_every_difference_is_a_line_with_its_path_and_both_values() -> None:
    given = {"min_nodes": 2, "rule": {"outer": {"lr": 0.5}}, "update_rule": {"inner": {"batch_size": 8}}}
    with pytest.raises(UserError) as refused:
        settings_of_start(LOGGED, Settings(), given)
    head, *told = str(refused.value).splitlines()
    assert "--change" in head
    assert told == [
        "  rule.outer.lr: 2.0 in the log, 0.5 wanted",
        "  update.inner.batch_size: 16 in the log, 8 wanted",
        "  encoder.min_nodes: 5 in the log, 2 wanted",
    ]


def test_f14_with_change_the_given_ones_hold_and_no_others() -> None:
    made = settings_of_start(LOGGED, Settings(), {"min_nodes": 2, "rule": {"outer": {"lr": 0.5}}}, change=True)
    rule = aggregation_rule("fedbuff", {"outer": {"lr": 0.5}})
    assert made == LOGGED.model_copy(update={"min_nodes": 2, "rule": rule})


def test_f14_a_preset_is_a_whole_rule_and_a_number_is_a_number() -> None:
    assert merged(LOGGED, {"rule": {"preset": "diloco"}}).rule == aggregation_rule("diloco")
    changes = {"buffer": {"grace_seconds": 5}}
    assert merged(LOGGED, {"rule": {"preset": "diloco", **changes}}).rule == aggregation_rule("diloco", changes)
    assert lines({"rule": {"preset": "fedbuff"}}) == ["rule.outer.lr: 2.0 in the log, 1.0 wanted"]
    assert lines({"rule": {"buffer": {"size": 4}}}) == ["rule.buffer.size: 3 in the log, 4 wanted"]


def test_f14_the_limits_given_are_all_limits_there_are() -> None:
    assert lines({"stop": {"versions": 300}}) == [
        "stop.versions: not set in the log, 300 wanted",
        "stop.updates: 1200 in the log, not set wanted",
    ]
    plateau = merged(LOGGED, {"stop": {"plateau": {"patience": 3}}}).stop
    assert plateau == StopRule(plateau=LossPlateau(patience=3))
    assert lines({"stop": {"updates": 1200, "plateau": {"patience": 3}}}) == [
        "stop.plateau.patience: not set in the log, 3 wanted",
        "stop.plateau.min_change: not set in the log, 0.005 wanted",
    ]


def test_f14_the_bounds_given_are_all_bounds_there_are() -> None:
    assert lines({"update_rule": {"when": {"seconds": 30.0}}}) == [
        "update.when.steps: 10 in the log, not set wanted",
        "update.when.seconds: not set in the log, 30.0 wanted",
    ]
    assert merged(LOGGED, {"update_rule": {"when": {}, "wait": True}}).update_rule.when == LOGGED.update_rule.when


def test_f14_what_is_said_of_new_encoders_is_a_setting_too() -> None:
    given = {"generation": "continue", "source": "there", "seed": 7, "architecture": {"hidden_size": 32}}
    assert lines(given) == [
        "encoder.generation: fresh in the log, continue wanted",
        "encoder.source: not set in the log, there wanted",
        "encoder.architecture.hidden_size: 16 in the log, 32 wanted",
        "encoder.seed: 0 in the log, 7 wanted",
    ]
    assert merged(LOGGED, given).architecture == {"hidden_size": 32, "num_hidden_layers": 1}


def test_f14_a_preset_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match="no aggregation rule 'fedprox'; there are: return-count"):
        settings_of_start(LOGGED, Settings(), {"rule": {"preset": "fedprox"}}, change=True)


_SETTINGS = st.builds(
    Settings,
    rule=st.builds(
        lambda preset, lr: aggregation_rule(preset, {"outer": {"lr": lr}}), st.sampled_from(list(PRESETS)), st.just(0.3)
    ),
    update_rule=st.builds(UpdateRule, max_unanswered=st.integers(1, 3)),
    stop=st.builds(StopRule, versions=st.none() | st.integers(1, 5), seconds=st.none() | st.just(2.0)),
    min_nodes=st.integers(1, 3),
    architecture=st.dictionaries(st.sampled_from("ab"), st.integers(0, 2)),
)


@drawn(_SETTINGS, _SETTINGS)
def test_f14_settings_given_as_a_whole_come_out_and_without_a_difference_nothing_changes(
    logged: Settings, wanted: Settings
) -> None:
    given = wanted.model_dump(exclude={"architecture"})
    made = settings_of_start(logged, Settings(), given, change=True)
    assert made == wanted.model_copy(update={"architecture": logged.architecture})
    assert (made == logged) == (differences(logged, made) == [])
    assert settings_of_start(made, Settings(), given) == made, "the next start with the same settings needs no --change"


@pytest.mark.parametrize("given", [None, {"shards": 3}])
def test_a_log_goes_on_with_as_many_aggregators(given: dict[str, Any] | None) -> None:
    """Also where all is meant, and whatever may be changed."""
    logged = Settings(shards=2)
    assert settings_of_start(logged, Settings(), {}).shards == 2
    with pytest.raises(UserError, match="this log is of 2 and stays so"):
        settings_of_start(logged, Settings(shards=3), given, change=True)


@pytest.mark.parametrize("how", ["median", "trimmed-mean", "geometric-median", "centered-clip"])
def test_aggregators_compute_rules_that_go_coordinate_by_coordinate(how: str) -> None:
    rule = aggregation_rule("fedavg", {"combine": {"how": how}, "weights": {"samples_power": 0}})
    wanted = Settings(rule=rule, shards=2, min_nodes=5)
    if how in ("median", "trimmed-mean"):
        assert settings_of_start(None, wanted, None) == wanted
    else:
        with pytest.raises(UserError, match=f"{how} compares whole updates"):
            settings_of_start(None, wanted, None)
