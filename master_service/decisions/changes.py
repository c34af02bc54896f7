"""Settings that are changed while the master runs: which may be, what comes of it, and what a later start makes of it.

A change is kept by its path in the configuration (`rule.outer.lr`), above the settings that the master was started
with. So a start with the same file finds nothing that it contradicts, and undoes nothing. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from common.config import explained
from common.errors import UserError
from common.wire.update_rule import UpdateRule
from master_service.decisions.rules.model import AggregationRule, aggregation_rule
from master_service.decisions.settings import Difference, Settings, StopRule, differences, overlaid, possible

#: The sections of the configuration that may be changed, with their names in Settings and what they are made of.
SECTIONS: dict[str, tuple[str, type[BaseModel]]] = {
    "rule": ("rule", AggregationRule),
    "update": ("update_rule", UpdateRule),
    "stop": ("stop", StopRule),
}
#: What is decided for all nodes together.
_NOT_OF_ONE_NODE = ("update.evaluate_every",)


@dataclass(frozen=True)
class Logged:
    """The settings that a log ends with: those that its master was `configured` with, and above them what operators
    have changed."""

    configured: Settings
    live: Mapping[str, Any] = field(default_factory=dict)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with others at these paths, each alone; a preset is a whole rule. None is no value. Raises UserError
    for what is no setting, may not change while it runs, or does not go together."""
    if not changes:
        return settings
    plain = settings.model_dump()
    for section, table in _tables(changes).items():
        name, model = SECTIONS[section]
        below = plain[name]
        if "preset" in table:
            below = aggregation_rule(str(table["preset"])).model_dump()
        try:
            plain[name] = model.model_validate(overlaid(below, table))
        except ValidationError as error:
            raise explained(error, model, section) from None
    return possible(settings.model_copy(update={name: plain[name] for name, _ in _named(changes)}))


def changed_for_one(rule: UpdateRule, changes: Mapping[str, Any]) -> UpdateRule:
    """The update rule of a node for which others are set than for all. Raises UserError as `changed` does, and for what
    cannot be another for one node."""
    if not changes:
        return rule
    for path in changes:
        if not path.startswith("update.") or any(_related(path, each) for each in _NOT_OF_ONE_NODE):
            raise UserError(f"{path} is of the whole training: of one node alone update.… can be set, leave --node out")
    try:
        return UpdateRule.model_validate(overlaid(rule.model_dump(), _tables(changes)["update"]))
    except ValidationError as error:
        raise explained(error, UpdateRule, "update") from None


def above(before: Mapping[str, Any], changes: Mapping[str, Any], back: Sequence[str] = ()) -> dict[str, Any]:
    """What is changed once `changes` are made and those in `back` taken back, newest last. Raises UserError for one
    that is to be taken back and was not changed."""
    for path in back:
        if not any(_within(each, path) for each in before):
            known = ", ".join(before) or "nothing"
            raise UserError(f"{path} was not changed while it runs; what was: {known}")
    new = [*changes, *back, *(["rule"] if "rule.preset" in changes else [])]
    kept = {path: value for path, value in before.items() if not any(_within(path, each) for each in new)}
    return kept | dict(changes)


def still_live(logged: Logged, wanted: Settings) -> dict[str, Any]:
    """What operators have changed and a start with these settings leaves as it is: all but what it changes itself."""
    touched = [difference.path for difference in differences(logged.configured, wanted)]
    return {path: value for path, value in logged.live.items() if not any(_related(path, each) for each in touched)}


def in_words(before: Settings, after: Settings, changes: Mapping[str, Any]) -> str:
    """Old and new value of what was changed, one a line; also of what was set to the value that it had."""
    found = differences(before, after)
    same = [path for path in changes if not any(_related(path, each.path) for each in found)]
    lines = [_line(difference) for difference in found] + [f"{path}: as it was" for path in same]
    return "\n".join(lines)


def _line(difference: Difference) -> str:
    old, new = ("not set" if value is None else value for value in (difference.logged, difference.wanted))
    return f"{difference.path}: {old} → {new}"


def _named(changes: Mapping[str, Any]) -> list[tuple[str, type[BaseModel]]]:
    return [SECTIONS[section] for section in {path.partition(".")[0] for path in changes}]


def _tables(changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Paths and values as tables of tables, by section."""
    tables: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, *keys = path.split(".")
        if section not in SECTIONS or not all(keys) or not keys:
            raise UserError(
                f"{path} cannot be changed while it runs: settings of rule, update and stop can, by names such as "
                "rule.outer.lr; anything else is for the master's start"
            )
        table = tables.setdefault(section, {})
        for key in keys[:-1]:
            if not isinstance(table.get(key), dict):
                table[key] = {}
            table = table[key]
        table[keys[-1]] = value
    return tables


def _within(path: str, other: str) -> bool:
    """Whether a path is another one, or below it."""
    return path == other or path.startswith(f"{other}.")


def _related(path: str, other: str) -> bool:
    return _within(path, other) or _within(other, path)
