"""What the coordinator decides by: settings as they stand in the log, and how a start with others is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.errors import UserError
from common.wire.fields import MAX_SHARDS
from common.wire.update_rule import UpdateRule
from master_service.decisions.rules.model import AggregationRule, GuardRule, aggregation_rule, check_nodes

#: What is made of the numbers that members say of their updates (steps, samples, seconds, losses) and of the norms of
#: these. compared: see `guarding` and `stopping`. checked: so too, but for the norms and steps that are kept. taken: as
#: facts. A log says how the masters decided that wrote it; one that goes on with it compares from there on.
Claims = Literal["taken", "checked", "compared"]


class LossPlateau(BaseModel):
    """Stop when the loss of the last `patience` versions is no better than `min_change` (nats) below the best.

    That is the held-out loss which nodes measure; where nobody does, the training loss that they claim; the median over
    nodes of either."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patience: Annotated[int, Field(ge=1)] = 20
    min_change: Annotated[float, Field(ge=0)] = 0.005


#: What the operator says for the front matter of a card: a licence's or a language's code.
CardWord = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]

#: The largest encoder that is made where nothing else is said: 4 GB of float32, and as much for each of its copies.
MAX_PARAMETERS = 1_000_000_000

#: How many versions are made where no limit is given.
DEFAULT_VERSIONS = 400


class StopRule(BaseModel):
    """Ends the training as soon as any given limit is reached; counted from the start of this run of the encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Annotated[int, Field(ge=1)] | None = None
    updates: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None
    plateau: LossPlateau | None = None


class WordsRule(BaseModel):
    """How words for a vocabulary are gathered: until every node that is here has answered, with words or without, and
    at least `nodes` (or `min_nodes`, if that is more) have. After `seconds` those that came will do, if there are
    `nodes` of them and one has words; else the time begins anew, as it does when a master starts again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: Annotated[int, Field(ge=1)] = 2
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0


class Settings(BaseModel):
    """The settings that the coordinator decides by; in the log, so that replay decides alike.

    `shards`: so many aggregators have a part of every encoder each; for as long as the log goes on.
    `tokenizer`, `reference` and `base`: what the operator named for the encoder type to make its assets of, None if
    nothing. `max_parameters`: of an encoder that is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: AggregationRule = AggregationRule()
    update_rule: UpdateRule = UpdateRule()
    stop: StopRule = StopRule(versions=DEFAULT_VERSIONS)
    min_nodes: Annotated[int, Field(ge=1)] = 1
    publish_every_seconds: Annotated[float, Field(gt=0)] = 60.0
    generation: Literal["fresh", "continue"] = "fresh"
    source: str | None = None
    tokenizer: str | None = None
    reference: str | None = None
    base: str | None = None
    words: WordsRule = WordsRule()
    architecture: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    max_parameters: Annotated[int, Field(ge=1)] = MAX_PARAMETERS
    license: CardWord | None = None
    language: CardWord | None = None
    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS)] = 1


#: Where a setting stands in the configuration, if not under its own name.
_CONFIGURED_AS = {"update_rule": "update", "shards": "master.shards"} | {
    name: f"encoder.{name}"
    for name in (
        *("min_nodes", "generation", "source", "tokenizer", "reference", "base", "words", "architecture"),
        *("seed", "max_parameters", "license", "language"),
    )
}


@dataclass(frozen=True)
class Difference:
    """One setting, by its path in the configuration (`stop.versions`); None where it has no value."""

    path: str
    logged: Any
    wanted: Any

    def __str__(self) -> str:
        logged, wanted = ("not set" if value is None else value for value in (self.logged, self.wanted))
        return f"{self.path}: {logged} in the log, {wanted} wanted"


#: What `guards.norm_clip` was by default while it was a multiple of the median over all updates.
_TAKEN_NORM_CLIP = 10.0


def unsaid() -> Settings:
    """What a log decides by before a row says so: what masters left unsaid that took claims as facts."""
    rule = AggregationRule(guards=GuardRule(norm_clip=_TAKEN_NORM_CLIP))
    return Settings(rule=rule)


def carried_over(settings: Settings, claims: Claims) -> Settings:
    """Logged settings as they are meant from here on. Where claims were taken as facts, `guards.norm_clip` was a
    multiple of something else: its default becomes today's, and another number stays."""
    guards = settings.rule.guards
    if claims != "taken" or guards.norm_clip != _TAKEN_NORM_CLIP:
        return settings
    guards = guards.model_copy(update={"norm_clip": GuardRule().norm_clip})
    return settings.model_copy(update={"rule": settings.rule.model_copy(update={"guards": guards})})


def settings_of_start(
    logged: Settings | None,
    defaults: Settings,
    given: Mapping[str, Any] | None,
    *,
    change: bool = False,
    now: Settings | None = None,
) -> Settings:
    """The settings that a master starts with.

    `logged`: those that its log ends with; None for a log that no master has written to, where `defaults` hold (what
    was given, and defaults for the rest). `given` are the explicitly given ones alone, shaped as a `Settings`; None
    means that all of `defaults` is meant, as of somebody who composes a service in code. What is not given stays as it
    is in the log. `now`: those that hold, if operators have changed some while it ran: who gives what they have set
    means no difference. Raises UserError with every difference, unless `change` says that the differences are meant;
    for another number of shards; and for a robust rule that `min_nodes` are too few for, or shards cannot compute.
    """
    if logged is None:
        return possible(defaults)
    wanted = possible(defaults if given is None else merged(logged, given))
    if wanted.shards != logged.shards:
        raise UserError(
            f"master.shards: this log is of {logged.shards} and stays so: its aggregators hold what nodes sent; to go "
            'on with another number, begin a new log from the exported encoder (encoder.generation = "continue")'
        )
    if given is None:
        return wanted
    held = {each.path: each.wanted for each in differences(logged, now or logged)}
    found = [
        Difference(each.path, held.get(each.path, each.logged), each.wanted)
        for each in differences(logged, wanted)
        if each.path not in held or held[each.path] != each.wanted
    ]
    if found and not change:
        lines = "".join(f"\n  {difference}" for difference in found)
        raise UserError(
            "the message log was written with other settings; start without them to go on as before, or with --change "
            f"to go on with the new ones:{lines}"
        )
    return wanted


def merged(logged: Settings, given: Mapping[str, Any]) -> Settings:
    """The logged settings, overlaid with what is given.

    A number that is given changes that number alone, with three exceptions, which read as they do at a first start: a
    preset is a whole rule, to which the other numbers given are changes; the limits given are all limits there are; and
    so are the bounds of `update.when`.
    Raises UserError for an unknown preset, ValidationError for a value out of its range.
    """
    if not given:
        return logged
    plain = logged.model_dump()
    for name, value in given.items():
        if name == "stop":
            plain["stop"] = value
        elif name == "rule" and "preset" in value:
            changes = {section: numbers for section, numbers in value.items() if section != "preset"}
            plain["rule"] = aggregation_rule(value["preset"], changes).model_dump()
        else:
            plain[name] = overlaid(plain[name], value)
            if name == "update_rule" and value.get("when"):
                plain[name]["when"] = value["when"]
    return Settings.model_validate(plain)


def differences(logged: Settings, wanted: Settings) -> list[Difference]:
    """What is not the same, setting by setting, in the order of the configuration's sections."""
    before, after = _flat(logged.model_dump(mode="json")), _flat(wanted.model_dump(mode="json"))
    return [
        Difference(path, before.get(path), after.get(path))
        for path in dict.fromkeys((*before, *after))
        if before.get(path) != after.get(path)
    ]


def possible(settings: Settings) -> Settings:
    """The settings. Raises UserError for a robust rule that they are too few nodes for, or shards cannot compute."""
    check_nodes(settings.rule, settings.min_nodes, "encoder.min_nodes is")
    if settings.shards > 1 and settings.rule.combine.needs_all_parameters:
        raise UserError(
            f"rule.combine.how: {settings.rule.combine.how} compares whole updates, and with master.shards = "
            f"{settings.shards} nobody has one; take median or trimmed-mean, or leave master.shards out"
        )
    return settings


def overlaid(below: Any, above: Any) -> Any:
    """A table of tables with the values of another above it; what is no table is replaced whole."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{name: overlaid(below.get(name), value) for name, value in above.items()}}


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in plain.items():
        path = f"{prefix}.{name}" if prefix else _CONFIGURED_AS.get(name, name)
        found |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found
