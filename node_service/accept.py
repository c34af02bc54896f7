"""The owner's consent: which encoders a node takes part in, and at which hours it trains. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from common.clock import minute_of_day
from common.config import Section
from common.wire.to_node import Instruction

_DAY = 24 * 60
_HOURS = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")


def _period(hours: str) -> tuple[int, int]:
    """Begin and end of "22:00-06:00" in minutes since midnight; the end may come before the begin, on the next day.
    Raises ValueError."""
    found = _HOURS.fullmatch(hours)
    if found is None:
        raise ValueError(f'write hours as "22:00-06:00", not {hours!r}')
    hour, minute, end_hour, end_minute = map(int, found.groups())
    begin, end = hour * 60 + minute, end_hour * 60 + end_minute
    if minute > 59 or end_minute > 59 or begin >= _DAY or end > _DAY or begin == end % _DAY:
        raise ValueError(f'{hours!r} are no hours of a day that begin and end; write them as "22:00-06:00"')
    return begin, end


def _hours(hours: str) -> str:
    _period(hours)
    return hours


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_ONE_OR_MANY = BeforeValidator(_one_or_many)
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], _ONE_OR_MANY]
Travels = Literal["all", "trunk", "lora"]
Hours = Annotated[str, AfterValidator(_hours)]


class Accept(Section):
    """What the owner of a node agrees to; without any of it, to everything. One value or a list of them each.

    `encoders`: patterns of encoder ids, as file names have them ("text-*"). `types`: encoder types. `shared`: which of
    "all", "trunk" and "lora" may travel of an encoder; a type that does not say shares a trunk. `max_parameters`: the
    most numbers that may travel of one. `hours`: when the node trains ("22:00-06:00", local time); outside of them it
    hands in what it has, leaves, and comes back.
    """

    encoders: Names | None = None
    types: Names | None = None
    shared: Annotated[tuple[Travels, ...], _ONE_OR_MANY] | None = None
    max_parameters: Annotated[int, Field(ge=1)] | None = None
    hours: Annotated[tuple[Hours, ...], Field(min_length=1), _ONE_OR_MANY] | None = None

    def refuses(self, encoder: str, encoder_type: str) -> str:
        """Why nothing is to be done for an encoder of this id and type, in words; empty if something may be."""
        if self.encoders is not None and not any(fnmatchcase(encoder, pattern) for pattern in self.encoders):
            return f"the owner of this node accepts only encoders called {_listed(self.encoders)}"
        if self.types is not None and encoder_type not in self.types:
            return f"the owner of this node accepts only encoders of type {_listed(self.types)}"
        return ""

    def refusal(self, instruction: Instruction) -> str:
        """Why this node does not take part in what an instruction asks for, in words; empty if it does."""
        if why := self.refuses(instruction.encoder, instruction.encoder_type):
            return why
        travels = instruction.architecture.get("shared", "trunk")
        if self.shared is not None and travels not in self.shared:
            said = travels if travels in get_args(Travels) else "something else"
            return f"the owner of this node lets {_listed(self.shared)} of an encoder travel; of this one {said} would"
        size = sum(math.prod(shape) for _, shape in instruction.layout)
        if self.max_parameters is not None and size > self.max_parameters:
            return (
                f"the owner of this node accepts encoders of up to {self.max_parameters:,} parameters; "
                f"this one has {size:,}"
            )
        return ""

    def rests_until(self, at: float) -> str:
        """As `closed_until`, for a moment in seconds since 1970."""
        return self.closed_until(minute_of_day(at)) if self.hours else ""

    def closed_until(self, minute: int) -> str:
        """When it may train next ("22:00"), if it may not at this minute of the day (local); empty if it may now."""
        periods = [_period(hours) for hours in self.hours or ()]
        if not periods or any(_within(minute, begin, end) for begin, end in periods):
            return ""
        following = min(periods, key=lambda period: (period[0] - minute) % _DAY)[0]
        return f"{following // 60:02}:{following % 60:02}"


def _within(minute: int, begin: int, end: int) -> bool:
    return begin <= minute < end if begin < end else minute >= begin or minute < end


def _listed(words: Iterable[str]) -> str:
    return " or ".join(words) or "nothing"
