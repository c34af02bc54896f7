"""The update rule: when a node returns an update and how, as configurations have it and as it travels in a Rule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.numbers.slicing import EncodingName
from common.wire.fields import FINITE, Positive


class ReturnWhen(BaseModel):
    """The node returns an update as soon as any given bound is reached since its last one. Those that a configuration
    gives are all there are.

    `loss_change`: the running mean loss moved by this fraction. `drift`: ‖base − local‖ / ‖base‖ reached this ratio.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1)] | None = None
    seconds: Positive | None = None
    samples: Annotated[int, Field(ge=1)] | None = None
    loss_change: Positive | None = None
    drift: Positive | None = None


class InnerOptimizer(BaseModel):
    """AdamW on the node. The learning rate warms up over the node's own steps and follows a cosine over the progress
    that the master announces (0 at the start, 1 when the stop rule holds), down to `final_fraction` of `lr`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: Positive = 5e-3
    weight_decay: Annotated[float, Field(ge=0), FINITE] = 0.01
    betas: tuple[Annotated[float, FINITE], Annotated[float, FINITE]] = (0.9, 0.999)
    gradient_clip: Positive = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    batch_size: Annotated[int, Field(ge=1)] = 16


class FinishRule(BaseModel):
    """The finishing phase: after the last version each node tunes its own copy by itself, and exports its best moment.

    It takes `share` of the steps that the node took until then (0.67 makes 40 % of all), or `steps` if given. `what`:
    "all" tunes shared and private parameters, "private" the latter alone, "none" leaves the phase out. Every
    `look_every` steps (default: a tenth of the phase, at least 10), and at its end, the node looks at its validation
    loss. Its best moment is exported, the one before the phase included; with `patience` it ends early after so many
    looks without gain.

    The inner optimiser goes on, its moments included, at the full rate for the first 60 % of the phase; then the rate
    falls along a cosine to `final_fraction` of it. What that gains comes at its end, and the loss may rise before: with
    a patience of three looks, nodes whose rate had fallen while they trained together gave up at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.67
    steps: Annotated[int, Field(ge=0)] | None = None
    what: Literal["all", "private", "none"] = "all"
    patience: Annotated[int, Field(ge=1)] | None = None
    look_every: Annotated[int, Field(ge=1)] | None = None


class UpdateRule(BaseModel):
    """When a node returns an update, and how.

    `encoding`: how the numbers of an update travel; what int8, bfloat16 and int4 (half of int8's bytes) lose
    goes into the next update. A node of a release that does not know the word cannot read the rule that has it.
    `away_steps`: how many steps a node trains on beyond its last hand-in while the master gives no sign of life; None:
    without end. `evaluate_every`: a node measures the loss of its validation samples with its first version, and with
    one of every so many from there on; 0: never. A measurement takes about as long as five training steps, and there
    are fifty of those between two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    when: ReturnWhen = ReturnWhen(steps=25)
    encoding: EncodingName = "int8"
    wait: bool = False
    max_unanswered: Annotated[int, Field(ge=1, le=64)] = 2
    away_steps: Annotated[int, Field(ge=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 10
    inner: InnerOptimizer = InnerOptimizer()
    finish: FinishRule = FinishRule()


def known_fields(model: type[BaseModel], plain: dict[str, Any], where: str = "") -> tuple[dict[str, Any], list[str]]:
    """What a model and those in it know of a table of values, and the names of what they do not know."""
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in plain.items():
        field = model.model_fields.get(name)
        if field is None:
            unknown.append(f"{where}{str(name)[:64]}")
            continue
        inner = field.annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            value, more = known_fields(inner, value, f"{where}{name}.")
            unknown += more
        known[name] = tuple(value) if isinstance(value, list) else value
    return known, unknown
