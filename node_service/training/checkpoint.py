"""One moment of a node's training on disk, in one file: the new one whole, or the one before.

The moment is that of the call: until it returns, all numbers are handed to the operating system, in a file beside, or
copied from a GPU. To get them onto the disk, and the file into its place, takes as long again, and may be done beside
training.

`checkpoint.safetensors` holds the private tensors, the optimiser and data position, and while an encoder is being
trained the path of its shared parameters, so that steps that were not handed in yet outlive the process. `pinned.json`
says for people what the private parts fit; it is a copy, and written last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.crash_points import reached
from common.durable import save_tensors, sync, write_durably
from common.errors import UserError
from common.workers import AtOnce, Beside
from node_service.training.looks import HeldOut
from node_service.training.update_rule import SinceReturn

F = TypeVar("F", bound=BaseModel)

_FILE = "checkpoint.safetensors"
AT_ONCE = AtOnce()
#: Where the facts stand in the file's own metadata, so that they cannot disagree with its tensors.
_FACTS = "facts"


class PathFacts(BaseModel):
    """The path of the shared parameters, but for its tensors. It is this incarnation's, and holds what was not handed
    in before the update numbered `next_sequence`. `held_out`: the newest measurement."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    incarnation: str
    next_sequence: int
    last_settled: int
    progress: float
    since: SinceReturn
    held_out: HeldOut | None = None


class Facts(BaseModel):
    """What the tensors are: private parts that fit `version` of `encoder`, after so many steps."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    encoder: str
    version: int
    steps: int
    type: str
    architecture: dict[str, Any]
    path: PathFacts | None = None


@dataclass(frozen=True)
class Checkpoint:
    """`path` is empty where `facts.path` is None."""

    facts: Facts
    private: dict[str, Tensor]
    trainer: dict[str, Tensor]
    path: dict[str, Tensor] = field(default_factory=dict)


def write_checkpoint(directory: Path, checkpoint: Checkpoint, beside: Beside = AT_ONCE) -> None:
    """Replace the checkpoint as `write_tensors` does."""
    directory.mkdir(parents=True, exist_ok=True)
    groups = {"private": checkpoint.private, "trainer": checkpoint.trainer, "path": checkpoint.path}
    pinned = json.dumps(checkpoint.facts.model_dump(exclude={"path"}), indent=1).encode()
    write_tensors(
        directory / _FILE,
        groups,
        checkpoint.facts,
        beside,
        then=lambda: write_durably(directory / "pinned.json", pinned),
    )


def read_checkpoint(directory: Path) -> Checkpoint | None:
    """The checkpoint that was written here; None if there is none. Raises UserError if it is damaged."""
    read = read_tensors(directory / _FILE, Facts, ("private", "trainer", "path"))
    if read is None:
        return None
    facts, groups = read
    return Checkpoint(facts, groups["private"], groups["trainer"], groups["path"])


def write_tensors(
    place: Path,
    groups: Mapping[str, Mapping[str, Tensor]],
    facts: BaseModel,
    beside: Beside = AT_ONCE,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Replace a file of tensors, in groups, and what they are: written to a file of another name, synced, renamed.

    The tensors may change once this returns. `beside` syncs and renames, and calls `then` after that; what is on a GPU
    has to be copied anyway, and is written by it too. Raises OSError, and what has ended the work that `beside` was
    given before.
    """
    beside.wait()  # what it does is about a file of the same name
    copied = any(tensor.device.type != "cpu" for named in groups.values() for tensor in named.values())
    tensors = {
        f"{group}/{name}": tensor.detach().to("cpu", copy=copied).contiguous()
        for group, named in groups.items()
        for name, tensor in named.items()
    }
    part = place.with_suffix(".part")
    reached("node before checkpoint")
    said = {_FACTS: facts.model_dump_json()}
    if not copied:
        save_tensors(part, tensors, said, synced=False)

    def put_in_place() -> None:
        if copied:
            save_tensors(part, tensors, said, synced=False)
        sync(part)
        reached("node during checkpoint")
        part.replace(place)
        sync(place.parent)
        reached("node after checkpoint")
        then()

    beside.run(put_in_place)


def read_tensors(place: Path, kind: type[F], names: Sequence[str]) -> tuple[F, dict[str, dict[str, Tensor]]] | None:
    """What `write_tensors` wrote, with every group of `names`; None if there is no such file. Raises UserError if it is
    damaged."""
    if not place.exists():
        return None
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    try:
        with safe_open(place, "pt") as file:
            facts = kind.model_validate_json(file.metadata()[_FACTS])
            for key in file.keys():  # noqa: SIM118  # not a mapping
                group, _, name = key.partition("/")
                groups[group][name] = file.get_tensor(key)
    except (OSError, SafetensorError, ValidationError, KeyError, TypeError) as error:
        problem = str(error).partition("\n")[0]
        raise UserError(f"{place}: damaged ({problem}); restore it from a backup or remove {place.parent}") from None
    return facts, groups
