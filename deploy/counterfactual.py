"""A message log decided anew, under another rule or without some nodes: what is asked, and whether it can be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from common.config import explained
from common.errors import UserError
from master_service.decisions.records import Configured
from master_service.decisions.rules.model import AggregationRule, aggregation_rule, check_nodes
from master_service.decisions.settings import Settings
from master_service.log.message_log import MessageLog

if TYPE_CHECKING:
    from common.numbers.parameters import ParameterSet
    from master_service.history.replay import Refold

#: What is to be said of whatever comes of it; `how` as `in_words` gives it.
COUNTERFACTUAL = (
    "The nodes trained on what was really published: this is what the same updates make when they are decided upon "
    "{how}, and not what a run that was decided so would have made."
)


def parse_changes(changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`outer.lr=2` and the like by section. A value is JSON, or else a word. Raises UserError."""
    found: dict[str, dict[str, Any]] = {}
    for change in changes:
        key, is_there, value = change.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (is_there and dot and name):
            raise UserError(f"--set {change}: write it as section.key=value, for instance outer.lr=2")
        found.setdefault(section, {})[name] = parsed_value(value)
    return found


def parsed_value(text: str) -> Any:
    """JSON, or else a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def changed_rule(
    preset: str | None, changes: Mapping[str, Mapping[str, Any]], source: str = "--set"
) -> Callable[[Settings], Settings]:
    """Maps logged settings to those with a preset, or with numbers of the logged rule changed. Raises UserError, which
    begins with `source`."""

    def rule(logged: AggregationRule) -> AggregationRule:
        try:
            if preset is not None:
                return aggregation_rule(preset, changes)
            plain = logged.model_dump()
            for section, values in changes.items():
                known = plain.get(section)
                plain[section] = {**known, **values} if isinstance(known, dict) else values
            return AggregationRule.model_validate(plain)
        except ValidationError as error:
            raise explained(error, AggregationRule, source) from None

    rule(AggregationRule())  # what is wrong is said before anything is read
    return lambda settings: settings.model_copy(update={"rule": rule(settings.rule)})


def in_words(rule: str | None, changes: Sequence[str], without: Sequence[str]) -> str:
    """How it is decided, for a sentence."""
    parts = [f"by the rule {rule}"] if rule else []
    parts += [f"with {', '.join(changes)}"] if changes else []
    parts += [f"without {', '.join(without)}"] if without else []
    return " ".join(parts)


def refold_of(log: MessageLog, change: Callable[[Settings], Settings] | None, without: Sequence[str]) -> Refold:
    """A Refold that has not begun. Raises UserError for a node that is not in the log, and for a rule that too few are
    left for."""
    from master_service.history.replay import Refold

    nodes = {row.sender for row in log.rows() if row.kind == "request.join"}
    if unknown := sorted(set(without) - nodes):
        raise UserError(f"no node {unknown[0]!r} is in the log; there are: {', '.join(sorted(nodes)) or 'none'}")
    left = len(nodes - set(without))
    if without and not left:
        raise UserError("without all of its nodes nothing is left of the log; leave fewer out")
    for body in log.bodies("configured"):
        if change is not None and isinstance(body, Configured):
            check_nodes(change(body.settings).rule, left, "there are in the log")

    def decided(settings: Settings) -> Settings:
        """Who was left out is not waited for either."""
        changed = change(settings) if change is not None else settings
        return changed.model_copy(update={"min_nodes": min(changed.min_nodes, left)})

    return Refold(log, decided if without else change, frozenset(without))


def distance(new: ParameterSet, published: ParameterSet) -> float:
    """‖new − published‖ / ‖published‖, in double precision."""
    import torch

    theirs = published.vector.double()
    return float(torch.dist(new.vector.double(), theirs) / theirs.norm())
