"""Hostile members in a comparison: what they send, who is measured, and the table of attacks and rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from common.errors import UserError
from deploy.compare.attacks import attack_tables
from deploy.compare.bench import Bench
from deploy.compare.cells import Cells
from deploy.compare.command import chosen_arms, comparison_of, federated_arm
from deploy.compare.hostile import FREE_RIDER, NOISE, SCALING, foreign, lie
from deploy.compare.plan import FINISHED, VERSION, Cell, FederatedArm, Point
from deploy.compare_settings import ATTACKS, ArmConfig, AttacksConfig, CompareConfig
from deploy.config import Config
from master_service.decisions.rules.model import aggregation_rule
from tests.unit.deploy.test_compare import ROOT, comparison, corpora

STEPS = 15


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "tests/faults/plugin"))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


def test_what_is_sent_in_the_place_of_an_update() -> None:
    chance = torch.Generator().manual_seed(1)
    trained = torch.randn(500, generator=chance)
    sent = {attack: lie(attack, trained, chance) for attack in ATTACKS}
    norms = {attack: float(each.norm() / trained.norm()) for attack, each in sent.items()}
    assert norms == pytest.approx(
        {"noise": NOISE, "sign-flip": 1, "scaling": SCALING, "free-rider": FREE_RIDER, "flood": 1, "foreign": 1}
    )
    assert torch.equal(sent["sign-flip"], -trained) and torch.equal(sent["foreign"], trained)
    noise = sent["noise"]
    assert abs(float(noise @ trained / (noise.norm() * trained.norm()))) < 0.2


def test_a_foreign_text_has_the_same_words_in_other_letters() -> None:
    [text] = foreign(["An apple, a day. "], 3)
    assert text != "An apple, a day. " and len(text) == 17 and text[2] == " " and text[8] == ","
    assert text[0].isupper() and text[0].lower() == text[3] == text[10], "one letter for one letter"
    assert foreign(["An apple, a day. "], 3) == [text] != foreign(["An apple, a day. "], 4)


def arm(attack: str | None, **changes: Any) -> FederatedArm:
    rule = aggregation_rule("fedavg", {"weights": {"samples_power": 0.0}, **changes})
    return FederatedArm(rule, comparison().update, (0.0,), attack, 1 if attack else 0)  # type: ignore[arg-type]


def trained(directory: Path, decided: FederatedArm) -> tuple[float, dict[str, Any]]:
    """The mean validation loss of the honest nodes under the shared version, and the facts of the cell."""
    plan = comparison(steps=STEPS, seeds=1)
    plan = type(plan)(**{**vars(plan), "federated": {"shared": decided}, "arms": ("shared",)})
    bench = Bench(plan, corpora(), Cells(directory))
    cell = Cell("shared", None, 5, Point(0.05, 0.01, 0.0))
    bench.train(cell)
    found = bench.trained(cell)
    assert found is not None and set(found.validation[VERSION]) == set(found.models[FINISHED]) == {"a", "b", "c"}
    return sum(found.validation[VERSION].values()) / 3, found.facts


def test_noise_ruins_an_uncut_mean_and_not_one_whose_norms_are_cut(tmp_path: Path) -> None:
    uncut, facts = trained(tmp_path / "uncut", arm("noise", guards={"norm_clip": 1e30}))
    assert facts["hostile"]["hostile-0"]["updates"] >= 2
    cut, _ = trained(tmp_path / "cut", arm("noise"))
    assert uncut > 10 * cut


def test_who_floods_hands_in_after_every_step(tmp_path: Path) -> None:
    rule = aggregation_rule("fedbuff", {"buffer": {"size": 4}})
    flood = FederatedArm(rule, comparison().update, (0.0,), "flood", 1)
    _, facts = trained(tmp_path, flood)
    honest = (facts["updates"] - facts["hostile"]["hostile-0"]["updates"]) / 3
    assert facts["hostile"]["hostile-0"]["updates"] > 1.5 * honest


def test_a_table_is_an_arm_for_each_attack_under_each_rule() -> None:
    table = AttacksConfig(
        rules={"plain": ArmConfig(), "robust": ArmConfig(combine={"how": "median"})}, kinds=("noise",)
    )
    settings = CompareConfig(attacks=table)
    assert list(settings.federated) == ["plain-nobody", "plain-noise", "robust-nobody", "robust-noise"]
    assert chosen_arms(settings, "attacks") == ("alone", *settings.federated)
    assert list(settings.rehearsal().federated) == list(settings.federated)
    with pytest.raises(UserError, match=r"needs 5 distinct nodes, and .*robust-noise has 4"):
        federated_arm(Config(), settings, "robust-noise", settings.federated["robust-noise"], 3)
    found = federated_arm(Config(), settings, "robust-noise", settings.federated["robust-noise"], 4)
    assert (found.attack, found.hostile, found.rule.combine.how) == ("noise", 1, "median")
    with pytest.raises(UserError, match="exchanges letters"):
        foreign_too = CompareConfig(attacks=AttacksConfig(rules={"plain": ArmConfig()}))
        comparison_of(Config(), foreign_too, "tiny", (), {})


def test_the_table_says_the_mean_and_the_worst_domain() -> None:
    def column(**losses: float | None) -> dict[str, Any]:
        known = [each for each in losses.values() if each is not None]
        domains = {name: {"loss": {"mean": loss}} for name, loss in losses.items()}
        return {"domains": domains, "mean": {"loss": {"mean": sum(known) / len(known)}}}

    report = {
        "comparison": {"settings": {"attacks": {"rules": {"plain": {}}, "kinds": ["noise", "flood"], "hostile": 1}}},
        "columns": {
            "plain-nobody": column(a=1.0, b=2.0),
            "plain-nobody, version": column(a=2.0, b=4.0),
            "plain-noise": column(a=9.0, b=None),
            "plain-noise, version": column(a=5.0, b=7.0),
        },
    }
    version, finished = attack_tables(report, "nats")
    assert version[1:] == (["rule", "nobody", "noise"], [["plain", "3.000 (4.000)", "6.000 (7.000)"]])
    assert finished[2] == [["plain", "1.500 (2.000)", "not finite"]]
    report["comparison"]["settings"]["attacks"] = None
    assert attack_tables(report, "nats") == []
