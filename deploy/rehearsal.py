"""`shared-encoder node --check`: all that a node does, and nothing leaves. Its samples are read, the broker lets it in,
and it trains some steps with a master in this process: so one sees how fast it is, and what would be sent."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from common.broker_url import split
from common.errors import BrokerUnavailable, UserError
from common.wire.base import NodeMessage
from common.wire.messages import AnyMessage
from deploy.broker.credentials import merged
from deploy.commands.display import console, saying, size
from deploy.commands.run import connect, load_corpora, node_of, topology_of
from deploy.config import Config, load_config
from deploy.logging import configure_logging
from deploy.simulation.configured import ConfiguredFederation
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus

#: Versions that the rehearsal makes. The first steps are slower than those that follow.
_VERSIONS = 2
#: What training sends for each update; the rest is sent now and then.
_OF_AN_UPDATE = ("update", "chunk")


@dataclass(frozen=True)
class Kind:
    """Messages of a kind, as they left in the rehearsal: how often, their bytes on the wire, their fields."""

    name: str
    times: int
    bytes: int
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Rehearsed:
    """`step_seconds`: the median of a step; `steps`: of an update; `update_bytes`: on the wire."""

    parameters: int
    step_seconds: float
    steps: int
    update_bytes: float
    kinds: tuple[Kind, ...]

    @property
    def bytes_an_hour(self) -> float:
        """While it trains without a pause."""
        return 3600.0 / (self.steps * self.step_seconds) * self.update_bytes


def check_node(given: str | None, file: Path | None, flags: dict[str, Any], *, credentials: Path | None) -> int:
    """Print what was found; the exit code: 0, or that of the broker's trouble. Raises UserError for what would keep the
    node from starting at all."""
    flags, owner = merged(flags, credentials)
    name = node_of(given, owner)
    config = load_config(file, {**{key: flags[key] for key in ("broker", "log")}, "nodes": {name: flags["node"]}})
    configure_logging(level="warning")
    node = config.nodes.get(name) or NodeConfig()
    corpora = load_corpora(name, node, file)
    for corpus in corpora.values():
        _say(f"corpus   {corpus.type}: {len(corpus.train):,} samples to train on")
    code, line = _broker(config, name)
    _say(f"broker   {line}")
    for corpus in corpora.values():
        with saying("training for a moment, with a master in this process", quiet=False):
            found = rehearse(config, name, node, corpus)
        for text in described(found, corpus.type):
            _say(text)
        console().print(table(found.kinds))
    unsent = [kind for kind in node_kinds() if kind not in {each.name for each in found.kinds}]
    _say(f"not in this rehearsal: {', '.join(unsent)}")
    _say("no sample leaves, and no private parameter; --sent-file FILE notes each message")
    return code


def _say(line: str) -> None:
    console().print(line, highlight=False, markup=False, soft_wrap=True)


def _broker(config: Config, name: str) -> tuple[int, str]:
    """Whether it lets the node in. Nothing is declared there and nothing sent."""
    urls = config.broker.access().urls
    begun = time.monotonic()
    try:
        connect(config, topology_of(config), f"check of node {name}").close()
    except (BrokerUnavailable, UserError) as error:
        return (3 if isinstance(error, BrokerUnavailable) else 2), str(error)
    address = split(urls[0])
    account = config.broker.account or address.username or "guest"
    said = "TLS" if address.scheme == "amqps" else "without TLS"
    return 0, f"{address.hostname}, {said}, lets {account} in ({time.monotonic() - begun:.2f} s)"


def rehearse(config: Config, name: str, node: NodeConfig, corpus: Corpus) -> Rehearsed:
    """Train some steps under a virtual clock, in a folder that goes. The encoder is that of the configuration's section
    `encoder`, or of the type's defaults: that of a master elsewhere may be another."""
    with tempfile.TemporaryDirectory(prefix="shared-encoder-check-") as folder:
        place = Path(folder)
        sent = place / "sent.jsonl"
        own = node.model_copy(
            update={"state_dir": place / "node", "export_dir": None, "sent_file": sent, "max_steps_per_second": None}
        )
        rehearsed = config.model_copy(
            update={
                "master": config.master.model_copy(update={"state_dir": place / "master", "shards": 1}),
                "encoder": config.encoder.model_copy(update={"get": corpus.type, "min_nodes": 1}),
                "stop": config.stop.model_copy(update={"versions": _VERSIONS, "plateau": None}),
                "update": config.update.model_copy(
                    update={"finish": config.update.finish.model_copy(update={"share": 0.0})}
                ),
                "nodes": {name: own},
            }
        )
        steps = config.update.when.steps or 10
        federation = ConfiguredFederation(rehearsed, {name: corpus}, {name: 1.0}, seconds=float(steps * _VERSIONS))
        federation.train({}, lambda report: None)
        session = federation.sessions[name]
        kinds = tuple(counted(json.loads(line) for line in sent.read_text().splitlines()))
        encoder = federation.master.result
        assert encoder is not None, "train raises otherwise"
        updates = max(1, next(each.times for each in kinds if each.name == "update"))
        return Rehearsed(
            parameters=sum(math.prod(shape) for _, shape in encoder.layout),
            step_seconds=statistics.median(session.real_seconds),
            steps=max(1, round(session.steps / updates)),
            update_bytes=sum(each.bytes for each in kinds if each.name in _OF_AN_UPDATE) / updates,
            kinds=kinds,
        )


def counted(lines: Iterable[Mapping[str, Any]]) -> list[Kind]:
    """By kind, in the order of their first. Pure."""
    found: dict[str, Kind] = {}
    for line in lines:
        before = found.get(line["kind"], Kind(line["kind"], 0, 0, ()))
        fields = tuple(dict.fromkeys((*before.fields, *line["fields"])))
        found[line["kind"]] = Kind(before.name, before.times + 1, before.bytes + line["bytes"], fields)
    return list(found.values())


def node_kinds() -> list[str]:
    """Every kind of message that a node can send."""
    models = get_args(get_args(AnyMessage)[0])
    return [str(model.model_fields["kind"].default) for model in models if issubclass(model, NodeMessage)]


def described(found: Rehearsed, encoder_type: str) -> list[str]:
    """How fast, and how much, in two lines."""
    return [
        f"speed    {found.step_seconds * 1000:,.0f} ms a step, of a {encoder_type} encoder whose {found.parameters:,} "
        "parameters travel",
        f"sends    {size(found.update_bytes)} every {found.steps} steps: {size(found.bytes_an_hour)} an hour, "
        "if it trains all the time",
    ]


def table(kinds: Iterable[Kind]) -> Table:
    """What left in the rehearsal."""
    shown = Table(title="what leaves this house", title_justify="left")
    for heading in ("message", "times", "bytes each", "fields"):
        shown.add_column(heading, justify="left" if heading in ("message", "fields") else "right", overflow="fold")
    for kind in kinds:
        each = f"{kind.bytes / kind.times:,.0f}"
        shown.add_row(Text(kind.name), str(kind.times), each, Text(", ".join(kind.fields)))
    return shown
