"""The commands that talk to a running master over the broker: `status` and `request`. Only an export needs torch."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common import cards
from common.broker_url import split
from common.errors import BrokerUnavailable, Poison, Unroutable, UserError
from common.exports import check_export_directory, replacing
from common.wire.accounts import LONGEST_OPERATOR, Door, command_name, party_of
from common.wire.base import Message
from common.wire.bounds import REPORT
from common.wire.broker import Broker, Delivery, Publication
from common.wire.codec import encode, received
from common.wire.to_master import AskStatus, Continue, Get, Stop
from common.wire.to_node import Answer, StatusReport
from common.wire.topology import Topology
from deploy.commands.display import FederationDisplay, conditions, console, federation_tables, kept, saying
from deploy.commands.run import connect, topology_of
from deploy.config import Config, load_config
from deploy.signals import stop_on_signals
from master_service.status import Report

#: Seconds between two questions while something is waited for.
_ASK_EVERY = 1.0


class Observer:
    """A client of the master that is no node: it sends requests and has an inbox of its own for the answers.

    `operator`: whose account it uses, where that is one of this federation."""

    def __init__(self, broker: Broker, topology: Topology, operator: str = "observer") -> None:
        self.name = command_name(operator, secrets.token_hex(4))
        self.door = Door(topology)
        self._broker = broker
        self._topology = topology
        self._answers: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        broker.declare(topology.observer(self.name))
        self._subscription = broker.consume(topology.node_inbox(self.name), self._answers.put, prefetch=16)

    def say(self, message: Message) -> None:
        """Send a request. Raises UserError if no master has ever served this namespace."""
        kind = str(getattr(message, "kind", "")).removeprefix("request.")
        publication = Publication(
            self._topology.request, f"{self.name}.{kind}", encode(message), message_id=secrets.token_hex(16)
        )
        try:
            self._broker.publish(publication)
        except Unroutable:
            raise UserError(
                f"no master serves the namespace {self._topology.namespace!r} on this broker; "
                "start one with `shared-encoder master`, or give --namespace"
            ) from None

    def listen(self, timeout: float) -> Message | None:
        """The next message in the inbox; None if none came within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                delivery = self._answers.get(timeout=left)
            except queue.Empty:
                return None
            self._broker.ack(delivery)
            if not self.door.takes(delivery):
                continue
            try:
                return received(delivery, REPORT)
            except Poison:
                continue
        return None

    def status(self, timeout: float) -> Report:
        """The master's report. Raises BrokerUnavailable if none comes, UserError if it cannot be read, or if what was
        asked before is refused."""
        self.say(AskStatus(sender=self.name))
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            message = self.listen(left)
            if isinstance(message, StatusReport):
                return read_report(message.report)
            if isinstance(message, Answer) and not message.accepted and message.encoder is None:
                raise UserError(message.detail)  # what was asked before is not for this account to ask
        raise BrokerUnavailable(f"the master did not answer within {timeout:g} s; is it running?")

    def close(self) -> None:
        self._subscription.close()
        self._broker.delete_queue(self._topology.node_inbox(self.name))


def read_report(plain: dict[str, Any]) -> Report:
    """The report as a master sent it, older and newer ones included. Raises UserError if a value is of another type."""
    try:
        return Report.model_validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"the master's report cannot be read: {where}: {first['msg']}; "
            "the master runs another release: use the shared-encoder command of that release"
        ) from None


@contextmanager
def observing(flags: dict[str, Any], file: Path | None) -> Iterator[tuple[Observer, Broker, Topology]]:
    """Connect an observer to the broker of the configuration."""
    config = load_config(file, flags)
    topology = topology_of(config)
    broker = connect(config, topology, "observer")
    try:
        observer = Observer(broker, topology, operator(config, topology))
        try:
            yield observer, broker, topology
        finally:
            observer.close()
    finally:
        broker.close()


def operator(config: Config, topology: Topology) -> str:
    """Who asks: the party of this federation whose account the configuration names, or an observer. Raises UserError
    for a name that leaves no room for that of a command."""
    account = config.broker.account or split(config.broker.resolved_url()).username
    party = party_of(topology, account) or "observer"
    if len(party) > LONGEST_OPERATOR:
        raise UserError(f"{party!r} cannot ask the master: an operator's name has up to {LONGEST_OPERATOR} characters")
    return party


def show_status(flags: dict[str, Any], file: Path | None, timeout: float, *, watch: bool, as_json: bool) -> None:
    """Print the report once, or with `watch` every second until Ctrl-C."""
    with observing(flags, file) as (observer, _, _):
        report = observer.status(timeout)
        if not watch:
            _print_report(report, as_json)
            return
        stop = threading.Event()
        with stop_on_signals(stop), FederationDisplay(quiet=as_json) as display:
            while not stop.is_set():
                if as_json:
                    print(report.model_dump_json(), flush=True)
                else:
                    display.show(report)
                stop.wait(_ASK_EVERY)
                report = observer.status(timeout)


def request_encoder(
    flags: dict[str, Any],
    file: Path | None,
    timeout: float,
    *,
    encoder_type: str | None = None,
    encoder: str | None = None,
    fresh: bool = False,
    out: Path | None = None,
) -> None:
    """Request an encoder by type (get) or by id (update), and print the answer.

    With `out`, wait until the encoder is finished and write it there.
    """
    if out is not None:
        check_export_directory(out)
    with observing(flags, file) as (observer, broker, topology):
        ask: Callable[[], Message]
        if encoder is not None:
            ask = lambda: Continue(sender=observer.name, encoder=encoder)  # noqa: E731
        else:
            ask = lambda: Get(sender=observer.name, encoder_type=str(encoder_type), fresh=fresh)  # noqa: E731
        observer.say(ask())
        answer = await_answer(observer, timeout)
        print(f"{answer.encoder}: {answer.status}, version {answer.version}")
        if out is None:
            return
        assert answer.encoder is not None and answer.encoder_type is not None
        with saying(f"waiting until {answer.encoder} is finished"):
            while answer.status != "finished":
                time.sleep(_ASK_EVERY)
                status = observer.status(timeout).encoders.get(answer.encoder)
                if status is not None and status.status == "failed":
                    raise UserError(f"{answer.encoder} was not made: {status.reason}")
                if status is not None and status.status == "finished":
                    observer.say(Get(sender=observer.name, encoder_type=str(answer.encoder_type)))
                    answer = await_answer(observer, timeout)
        base = load_config(file, flags).encoder.base
        _write_from_stream(broker, topology, answer, out, base, observer.door)
        print(f"written to {out}; open it with transformers.AutoModel.from_pretrained({str(out)!r})")


def request_stop(flags: dict[str, Any], file: Path | None, encoder: str | None) -> None:
    """Ask the master to end the training of one encoder, or of all, and print how they stand. That it was asked is
    durable; it may be busy for longer than one waits here, with the last version of a large encoder."""
    with observing(flags, file) as (observer, _, _):
        before = observer.status(10.0)
        if encoder is not None and encoder not in before.encoders:
            known = ", ".join(before.encoders) or "none"
            raise UserError(f"no encoder {encoder!r} is known to the master; there are: {known}")
        observer.say(Stop(sender=observer.name, encoder=encoder))
        try:
            after = observer.status(10.0)
        except BrokerUnavailable:
            print("the master has been told to stop, and is still busy with it: `status` shows when it has")
            return
        for name, state in after.encoders.items():
            if encoder in (None, name):
                print(f"{name}: {state.status}, version {state.version}")


def await_answer(observer: Observer, timeout: float) -> Answer:
    """The answer to what was asked. Raises UserError with the reason of a refusal, BrokerUnavailable if none comes."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        message = observer.listen(left)
        if isinstance(message, Answer):
            if not message.accepted:
                raise UserError(message.detail)
            return message
    raise BrokerUnavailable(f"the master did not answer within {timeout:g} s; is it running?")


def _write_from_stream(
    broker: Broker, topology: Topology, answer: Answer, out: Path, base: Path | None, door: Door
) -> None:
    """Read the finished version and the assets from their streams, where the answer to a get put them, and export it.
    `base`: where the base of an encoder lies here, if it has one that does not travel.

    Raises BrokerUnavailable if they do not come.
    """
    from common.encoders import get_encoder_type
    from common.encoders.base import BASE_DIRECTORY
    from common.numbers.encodings import decode_vector
    from common.numbers.layout import Layout
    from common.numbers.parameters import ParameterSet
    from common.wire.assets import read_assets
    from common.wire.versions import VersionReader

    assert answer.encoder and answer.encoder_type and answer.layout and answer.architecture
    layout = Layout(answer.layout)
    reader = VersionReader(
        broker,
        topology,
        answer.encoder,
        layout.digest,
        elements=layout.size,
        takes=door.takes,
        shards=answer.shards,
    )
    read = reader.read(answer.version, answer.published_at)
    assets = read_assets(broker, topology, answer.encoder, answer.assets, takes=door.takes)
    if base is not None:
        assets[BASE_DIRECTORY] = str(base).encode()
    parameters = ParameterSet(layout, decode_vector(read.payload, layout.size, read.encoding))
    whole = cards.is_whole(answer.architecture)
    card = (
        f"{cards.front_matter(answer.encoder_type, whole=whole)}{cards.TITLE}{answer.encoder}\n\n"
        f"Type `{answer.encoder_type}`, version {read.version}.\n\n"
        f"{cards.loading(answer.encoder_type, whole=whole)}{cards.architecture(answer.architecture)}"
    )
    with replacing(out, card) as beside:
        encoder_type = get_encoder_type(answer.encoder_type)
        encoder_type.export_shared(beside, answer.architecture, parameters.tensors(), card, assets)


def _print_report(report: Report, as_json: bool) -> None:
    if as_json:
        print(report.model_dump_json(indent=1))
        return
    for table in federation_tables(report, console().width):
        console().print(table)
    for line in conditions(report):
        console().print(line, highlight=False, markup=False)
    if not report.encoders:
        console().print("no encoder yet: ask for one with `shared-encoder request get text`", highlight=False)
    console().print(
        f"rule {report.rule}, {len(report.nodes)} node(s) known, {report.dead_letters} message(s) set aside",
        highlight=False,
    )
    console().print(kept(report), highlight=False, markup=False)
