"""What can be set about a comparison: the section `compare` of the configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from common.config import Section
from node_service.config import Precision
from node_service.corpus.corpus import CorpusConfig

#: The arms that are there without a table of their own.
RANDOM, ALONE, POOLED, POOLED_ALL = "random", "alone", "pooled", "pooled-all"
BASELINES = (RANDOM, ALONE, POOLED, POOLED_ALL)
#: The federated arm where none is named: the rule of the sections rule and update.
DEFAULT_ARM = "shared"

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
#: A domain's name: that of a node, or of a corpus that no node holds.
Domain = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


#: What a hostile member does, beside the honest ones. noise: a thousand times its norm of noise. sign-flip, scaling: it
#: trains as others do and sends the opposite, or a hundred times as much. free-rider: noise of a thousandth of its
#: norm. flood: the opposite after every single step, and not when the rule says so. foreign: it trains honestly, on a
#: text that nobody else reads (its letters are exchanged).
Attack = Literal["noise", "sign-flip", "scaling", "free-rider", "flood", "foreign"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
#: The name of an arm in which nobody is hostile.
NOBODY = "nobody"


class ArmConfig(Section):
    """A federated arm: what differs from the sections rule and update. `rule` is a preset; without it, the changes are
    to the section rule as it stands. With an `attack` there are `hostile` members more than nodes, who commit it; the
    losses are those of the nodes alone."""

    rule: str | None = None
    weights: dict[str, Any] = Field(default_factory=dict)
    buffer: dict[str, Any] = Field(default_factory=dict)
    outer: dict[str, Any] = Field(default_factory=dict)
    guards: dict[str, Any] = Field(default_factory=dict)
    combine: dict[str, Any] = Field(default_factory=dict)
    attack: Attack | None = None
    hostile: Count = 1
    update: dict[str, Any] = Field(default_factory=dict)
    finish_shares: Annotated[tuple[Share, ...], Field(min_length=1)] | None = None

    @field_validator("update")
    @classmethod
    def _grid_decides(cls, value: dict[str, Any]) -> dict[str, Any]:
        inner = value.get("inner", {})
        if isinstance(inner, dict) and {"lr", "weight_decay"} & inner.keys():
            raise ValueError("rate and decay come from learning_rates and weight_decays, the same for every arm")
        return value


class FewLabelConfig(Section):
    """Fine-tuning on `per_class` labels a class: `steps` of `batch_size` rows, at the one of the `rates` that is best
    on a quarter of the labels of a seed's first draw, which is kept back for that. At most `test_rows` rows are tested.
    There are `draws` of the labels or a few more, dealt to the seeds in equal parts.

    It is what costs most. `columns` "unseen": only those that no node holds, and `pooled_labels`; "all": every one with
    labels. `rows` "chosen": the start, the best single organisation, what is pooled, and the final versions; "all":
    every encoder.
    """

    per_class: Annotated[tuple[Count, ...], Field(min_length=1)] = (4, 16, 64)
    draws: Count = 10
    test_rows: Count = 300
    steps: Count = 30
    batch_size: Count = 16
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = (1e-3, 5e-3)
    columns: Literal["unseen", "all"] = "unseen"
    rows: Literal["chosen", "all"] = "chosen"


class TransferConfig(Section):
    """What the encoders of a comparison are worth elsewhere, in the columns of a table: the nodes' domains, and the
    corpora of `unseen`, which no node holds.

    Each encoder gets `steps` in each column, at the one of the `rates` that the column's validation part finds best,
    in each of the `modes`: frozen (the shared parameters stay, and the private ones are trained), and free. `windows`
    of the test part are measured, and half as many of the validation part, the same ones for every encoder. `private`
    are settings of the private parts in every column, over those of its node. Where there are labels, at most `classes`
    of them are told apart (of all columns, or by column), drawn by the seed; probes see `probe_rows` rows, and TF-IDF
    `tfidf_rows` (None: all). `pooled_labels` names one more column: the rows of all nodes together, and whose they are
    is to be told.
    """

    unseen: dict[Domain, CorpusConfig] = Field(default_factory=dict)
    steps: Count = 100
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = (3e-3, 1e-2)
    windows: Annotated[int, Field(ge=2)] = 1280
    modes: tuple[Literal["frozen", "free"], ...] = ("frozen", "free")
    private: dict[str, Any] = Field(default_factory=dict)
    classes: Annotated[int, Field(ge=2)] | dict[Domain, Annotated[int, Field(ge=2)]] = 10
    probe_rows: Count = 1000
    tfidf_rows: Count | None = None
    pooled_labels: Domain | None = None
    few_labels: FewLabelConfig | None = FewLabelConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> TransferConfig:
        if self.pooled_labels in self.unseen:
            raise ValueError(f"pooled_labels {self.pooled_labels!r} is the name of a corpus in unseen; take another")
        return self

    def most_classes(self, column: str) -> int | None:
        """How many labels of a column are told apart at most; None: all."""
        return self.classes.get(column) if isinstance(self.classes, dict) else self.classes

    def rehearsal(self) -> TransferConfig:
        """The same in a hurry: a twentieth of the steps, one rate, and one draw of the fewest labels for a seed."""
        few = self.few_labels and self.few_labels.model_copy(
            update={
                "per_class": (min(self.few_labels.per_class),),
                "draws": 1,
                "test_rows": min(50, self.few_labels.test_rows),
                "steps": min(4, self.few_labels.steps),
                "rates": self.few_labels.rates[:1],
            }
        )
        return self.model_copy(
            update={
                "steps": max(2, self.steps // 20),
                "rates": self.rates[:1],
                "windows": min(self.windows, 64),
                "probe_rows": min(self.probe_rows, 100),
                "tfidf_rows": min(self.tfidf_rows or 200, 200),
                "few_labels": few,
            }
        )


#: An arm's name.
ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]


class AttacksConfig(Section):
    """A table of attacks and rules: for each of the `rules`, which are arms, and each of the `kinds` an arm RULE-KIND
    with that attack, and RULE-nobody without one. `hostile` members commit it together."""

    rules: Annotated[dict[ArmName, ArmConfig], Field(min_length=1)]
    kinds: Annotated[tuple[Attack, ...], Field(min_length=1)] = ATTACKS
    hostile: Count = 1

    def arms(self) -> dict[str, ArmConfig]:
        """The arms by name, rule after rule."""
        found = {}
        for name, rule in self.rules.items():
            found[f"{name}-{NOBODY}"] = rule
            for kind in self.kinds:
                found[f"{name}-{kind}"] = rule.model_copy(update={"attack": kind, "hostile": self.hostile})
        return found


class CompareConfig(Section):
    """What is compared, and how thoroughly.

    `steps`: training steps a node, finishing included, in every arm; where `speeds` differ, the mean, because then
    every arm has the same virtual time. `learning_rates` × `weight_decays` is the grid of every arm, `finish_shares`
    (of a node's steps, in which it tunes its own copy) a third dimension of the federated ones. The grid is run on the
    first `tune_seeds` seeds, and what has the best validation loss there on all `seeds`. Every `look_every` steps the
    loss of `look_windows` windows of the validation part is measured, and the best moment is kept. `validation` is the
    share of the training samples set aside for that. `test_documents` bounds the test part of each domain, None: all of
    it. `speeds`, by node, and `speed`, of all others, are steps a second of the virtual clock, `link` bytes a second of
    a node's line. `pooled_steps`: steps of the arm pooled-all; None: those of all nodes together. `device` and
    `precision` are as a node's, for all arms alike; processes share a GPU. `cut`: each node's training samples are
    dealt out to so many nodes, which have its test and validation part in common.
    `transfer`: measure, too, what the encoders are worth in other domains and with few labels. `attacks`: federated
    arms that are not named one by one, and a table of them.
    """

    steps: Annotated[int, Field(ge=2)] = 2000
    seeds: Annotated[int, Field(ge=1, le=100)] = 5
    tune_seeds: Annotated[int, Field(ge=1)] = 1
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = (2e-3, 4e-3, 8e-3)
    weight_decays: Annotated[tuple[Decay, ...], Field(min_length=1)] = (0.01, 0.1)
    finish_shares: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.4)
    look_every: Annotated[int, Field(ge=1)] = 100
    look_windows: Annotated[int, Field(ge=1)] = 256
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.05
    test_documents: Annotated[int, Field(ge=2)] | None = None
    pooled_steps: Annotated[int, Field(ge=2)] | None = None
    speeds: dict[str, Rate] = Field(default_factory=dict)
    speed: Rate = 20.0
    cut: Annotated[int, Field(ge=1, le=1000)] = 1
    link: Rate = 10e6
    device: str = "cpu"
    precision: Precision = "float32"
    arms: dict[ArmName, ArmConfig] = Field(default_factory=dict)
    attacks: AttacksConfig | None = None
    transfer: TransferConfig | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> CompareConfig:
        if taken := sorted(set(self.arms) & set(BASELINES)):
            raise ValueError(f"compare.arms.{taken[0]}: that name is a baseline's; take another")
        if self.tune_seeds > self.seeds:
            raise ValueError(f"compare.tune_seeds {self.tune_seeds} is more than compare.seeds {self.seeds}; lower it")
        if self.cut > 1 and self.transfer is not None:
            raise ValueError("compare.cut deals one test part out to several nodes, which transfer cannot tell apart")
        return self

    @property
    def federated(self) -> dict[str, ArmConfig]:
        """The federated arms by name, in their order; one of the plain rule where none is named."""
        arms = {**self.arms, **(self.attacks.arms() if self.attacks else {})}
        return arms or {DEFAULT_ARM: ArmConfig()}

    def rehearsal(self) -> CompareConfig:
        """The same in a hurry: a twentieth of the steps, two seeds, and a grid of one point, its middle one."""
        steps = max(2, self.steps // 20)
        return self.model_copy(
            update={
                "steps": steps,
                "seeds": min(2, self.seeds),
                "tune_seeds": 1,
                "learning_rates": (self.learning_rates[len(self.learning_rates) // 2],),
                "weight_decays": (self.weight_decays[0],),
                "finish_shares": (self.finish_shares[-1],),
                "look_every": max(1, min(self.look_every, steps // 4)),
                "test_documents": min(self.test_documents or 200, 200),
                "pooled_steps": self.pooled_steps and max(2, self.pooled_steps // 20),
                "arms": _unfinished(self.arms),
                "attacks": self.attacks and self.attacks.model_copy(update={"rules": _unfinished(self.attacks.rules)}),
                "transfer": self.transfer and self.transfer.rehearsal(),
            }
        )


def _unfinished(arms: Mapping[str, ArmConfig]) -> dict[str, ArmConfig]:
    """The arms with the finishing shares of all."""
    return {name: arm.model_copy(update={"finish_shares": None}) for name, arm in arms.items()}
