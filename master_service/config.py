"""What the operator can set for the master."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ByteSize, Field, field_validator, model_validator

from common.config import Http, Section
from common.numbers.slicing import EncodingName
from common.wire.accounts import LONGEST_OPERATOR, MASTER
from common.wire.fields import MAX_SHARDS
from common.wire.topology import MIB
from common.wire.update_rule import UpdateRule
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import (
    DEFAULT_VERSIONS,
    MAX_PARAMETERS,
    CardWord,
    Settings,
    StopRule,
    WordsRule,
)


def _not_the_master(name: str) -> str:
    if name == MASTER:
        raise ValueError(f"an operator cannot be called {MASTER!r}: that is the master's own account")
    return name


def _of_weights(encoding: EncodingName) -> EncodingName:
    if encoding == "int4":
        raise ValueError("int4 is for updates, where what it loses is sent later; take bfloat16 for versions")
    return encoding


Operator = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=LONGEST_OPERATOR), AfterValidator(_not_the_master)
]


#: What the log keeps of updates' payloads: all, those after the oldest kept snapshot, or as many as fit into so many
#: bytes.
Retention = Literal["all", "since-snapshot"] | int
#: Of the disk where the log lies, in percent.
DISK_SHARE = re.compile(r"(100|[1-9]?\d(\.\d+)?)%")
DiskShare = Annotated[str, Field(pattern=rf"^{DISK_SHARE.pattern}$")]
#: Of updates: enough for days of most federations, and never the whole disk.
DEFAULT_RETENTION = "10%"


class MasterConfig(Section):
    """The master's own affairs. Paths are made if they are not there.

    `retention`: of updates' payloads keep as many as fit into a share of the disk ("10%", the default) or a size
    ("20GiB"), the newest; those since the oldest kept snapshot (`since-snapshot`); or all of them (`all`, the default
    with several shards). Versions can be rebuilt as far back as payloads reach. Below `min_free` bytes of free disk
    nothing is accepted until there is room again.

    `encoding`: of versions; that of updates is `update.encoding`.

    Where `broker.accounts` is "required", `operators` are those who may ask for encoders, for more training of one and
    for an end, and change how it runs; nodes may ask for encoders and more training if `nodes_may_request`. Where
    accounts are open, everybody may do all of that.

    `intake_bytes`: updates that are fetched from the broker at the same time have so much memory together, but two
    nodes' are, whatever their size; not set: two updates of the largest encoder, and at least 16 MiB.
    `messages_per_second`: of one sender, with five times as many at once; requests and signs of life beyond that are
    dropped, and what must not be lost waits. `max_encoders`: so many are made or trained at the same time; who asks for
    one more is refused.

    `shards`: so many `shared-encoder aggregator` processes hold a part of every encoder each, and do what is done with
    its numbers; the master decides. For encoders that are too large for one machine's memory, disk or line.

    `http`: where health, readiness and metrics are to be had ("127.0.0.1:9464", ":9464", "[::1]:9464", or "off"). Not
    set: at 127.0.0.1:9464 if nobody else is there.
    """

    state_dir: Path = Path("master-state")
    export_dir: Path | None = None
    presence_timeout_seconds: Annotated[float, Field(gt=0)] = 90.0
    chunk_timeout_seconds: Annotated[float, Field(gt=0)] = 15.0
    encoding: Annotated[EncodingName, AfterValidator(_of_weights)] = "bfloat16"
    retention: Literal["all", "since-snapshot"] | DiskShare | ByteSize | None = None
    min_free: ByteSize = ByteSize(64 * MIB)
    snapshot_every_seconds: Annotated[float, Field(gt=0)] = 60.0
    exit_when_finished: bool = False
    threads: Annotated[int, Field(ge=1)] = 1
    operators: tuple[Operator, ...] = ()
    nodes_may_request: bool = False
    intake_bytes: ByteSize | None = None
    messages_per_second: Annotated[float, Field(gt=0)] = 20.0
    max_encoders: Annotated[int, Field(ge=1)] = 16
    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS)] = 1
    http: Http | None = None

    @field_validator("retention", mode="before")
    @classmethod
    def _share(cls, given: object) -> object:
        if isinstance(given, str) and given.endswith("%") and not DISK_SHARE.fullmatch(given):
            raise ValueError(f"{given}: a share of the disk is 0% to 100%")
        return given

    @model_validator(mode="after")
    def _dropped_where_it_lies(self) -> Self:
        if self.shards > 1 and self.retention not in (None, "all", "since-snapshot"):
            raise ValueError(
                "a size is of one disk, and with several shards payloads lie on theirs; "
                'take retention = "since-snapshot"'
            )
        return self

    def keeps(self, disk_bytes: int | None) -> Retention:
        """`retention` as the log applies it, on a disk of this size; without one, a share of it is everything."""
        wanted = self.retention
        if wanted is None:
            wanted = DEFAULT_RETENTION if self.shards == 1 else "all"
        if not isinstance(wanted, str) or wanted in ("all", "since-snapshot"):
            return wanted  # type: ignore[return-value]  # of the words, these two are left
        return "all" if disk_bytes is None else int(disk_bytes * float(wanted.removesuffix("%")) / 100)


class EncoderConfig(Section):
    """The encoder that this master makes when it starts (`get`), and how encoders are generated.

    `generation`: fresh (from the type's architecture and `seed`) or continue (from `source`: an export or a Hugging
    Face directory). `tokenizer`: where a shared vocabulary comes from, a directory, a file, or the word `bytes`;
    `reference`: text that the operator has, to train one on. `base`: the directory of the model that an encoder with
    shared = "lora" is an update of. All three are for the encoder type to read. `words`: how long words are gathered
    from nodes, where the vocabulary is an agreed one. `min_nodes`: training starts once that many nodes have accepted.
    `max_parameters`: an encoder with more is not made, whoever asks for it; they are counted before anything is built.
    `license` ("apache-2.0") and `language` ("en") go into the front matter of the encoder's card, and nowhere else.
    """

    get: str | None = None
    architecture: dict[str, Any] = Field(default_factory=dict)
    generation: Literal["fresh", "continue"] = "fresh"
    source: Path | None = None
    tokenizer: str | None = None
    reference: Path | None = None
    base: Path | None = None
    words: WordsRule = WordsRule()
    seed: int = 0
    min_nodes: Annotated[int, Field(ge=1)] = 1
    max_parameters: Annotated[int, Field(ge=1)] = MAX_PARAMETERS
    license: CardWord | None = None
    language: CardWord | None = None


class RuleConfig(Section):
    """The aggregation rule: a preset, and what differs from it."""

    preset: str = "return-count"
    weights: dict[str, Any] = Field(default_factory=dict)
    buffer: dict[str, Any] = Field(default_factory=dict)
    outer: dict[str, Any] = Field(default_factory=dict)
    guards: dict[str, Any] = Field(default_factory=dict)
    combine: dict[str, Any] = Field(default_factory=dict)


def settings(
    encoder: EncoderConfig, rule: RuleConfig, update: UpdateRule, stop: StopRule, master: MasterConfig
) -> Settings:
    """What of the configuration decides, as it goes into the log. Raises UserError for an unknown preset or number."""
    changes = rule.model_dump(exclude={"preset"}, exclude_defaults=True)
    return Settings(
        rule=aggregation_rule(rule.preset, changes),
        update_rule=update,
        stop=stop if stop != StopRule() else StopRule(versions=DEFAULT_VERSIONS),
        min_nodes=encoder.min_nodes,
        generation=encoder.generation,
        source=str(encoder.source) if encoder.source else None,
        tokenizer=encoder.tokenizer,
        reference=str(encoder.reference) if encoder.reference else None,
        base=str(encoder.base) if encoder.base else None,
        words=encoder.words,
        architecture=encoder.architecture,
        seed=encoder.seed,
        max_parameters=encoder.max_parameters,
        license=encoder.license,
        language=encoder.language,
        shards=master.shards,
    )


def given(
    encoder: EncoderConfig, rule: RuleConfig, update: UpdateRule, stop: StopRule, master: MasterConfig
) -> dict[str, Any]:
    """What of `settings` was said explicitly, shaped as a Settings: the fields that the sections were made with."""
    found = {"rule": _explicit(rule), "update_rule": _explicit(update), "stop": _explicit(stop)}
    own = {
        name: value
        for section in (encoder, master)
        for name, value in _explicit(section).items()
        if name in Settings.model_fields
    }
    for path in own.keys() & {"source", "reference", "base"}:
        own[path] = str(own[path]) if own[path] else None
    return {name: value for name, value in found.items() if value} | own


def _explicit(section: BaseModel) -> dict[str, Any]:
    """In the order of the fields, at every level."""
    values = {name: getattr(section, name) for name in type(section).model_fields if name in section.model_fields_set}
    return {name: _explicit(value) if isinstance(value, BaseModel) else value for name, value in values.items()}
