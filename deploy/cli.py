"""The `shared-encoder` command. Only typer is imported here; what a command needs, it imports when it runs."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from common.errors import (
    EXIT_BROKER,
    EXIT_FAILED,
    EXIT_USER_ERROR,
    BrokerUnavailable,
    LockHeld,
    SharedEncoderError,
    UserError,
)
from common.http_address import DEFAULT_HTTP
from deploy.commands.broker_certs import broker_certs
from deploy.commands.broker_commands import broker_app
from deploy.commands.corpus_commands import corpus_app
from deploy.commands.log_commands import DEFAULT_STATE, State, log_app
from deploy.commands.operate_commands import register as register_operating
from deploy.commands.options import BrokerUrl, ConfigFile, Credentials, Namespace, SampleField, SampleType

app = typer.Typer(
    name="shared-encoder",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
request_app = typer.Typer(
    help="Ask a running master for an encoder, for more training, or to stop.", no_args_is_help=True
)
app.add_typer(request_app, name="request")
app.add_typer(log_app, name="log")
app.add_typer(corpus_app, name="corpus")
app.add_typer(broker_app, name="broker")
broker_app.command("certs")(broker_certs)
register_operating(app)

JsonLogs = Annotated[bool, typer.Option("--json", help="log JSON lines instead of showing progress")]
LogFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="write JSON lines and events there too; another is begun every 10 MB, 5 stay"),
]
WaitForBroker = Annotated[
    float | None,
    typer.Option(
        "--wait-for-broker", metavar="S", min=0, help="seconds to wait for it at the start", show_default="60"
    ),
]
Aggregators = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", help="state directory of one of the log's aggregators; name each, if it has several"),
]
Http = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="health and metrics here: HOST:PORT, or off", show_default="off"),
]
MasterHttp = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="health and metrics here: HOST:PORT, or off", show_default="127.0.0.1:9464"),
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads for arithmetic", show_default="1")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"shared-encoder {version('shared-encoder')}")
        raise typer.Exit


@app.callback()
def shared_encoder(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Organisations pre-train one shared encoder together over RabbitMQ; no sample leaves its owner."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the results go")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="about 30 seconds instead of about 4 minutes")] = False,
    broker: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="run master and nodes as processes over this RabbitMQ", show_default="embedded"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the encoder's and the nodes' random choices")] = 0,
) -> None:
    """Four nodes with one topic of Python's own library each train one encoder together, then it is evaluated."""
    from deploy.demo.demo import run_demo

    run_demo(out, quick=quick, broker_url=broker, seed=seed)


@app.command("init")
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="where it goes")] = Path("run.toml"),
    nodes: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="nodes that it has sections for")] = 3,
    type_: SampleType = None,
) -> None:
    """Write a configuration to begin with: a master and N nodes, with comments, and what else there is switched off."""
    from deploy.commands.init import write_configuration

    write_configuration(file, nodes, type_ or "text")


@app.command()
def master(
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
    wait: WaitForBroker = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="message log, snapshots", show_default="master-state")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="finished encoder", show_default="STATE/encoders/ID")
    ] = None,
    get: Annotated[str | None, typer.Option(metavar="TYPE", help="make an encoder of this type at the start")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="of the shared vocabulary: a directory, a file, or the word bytes"),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="PATH", help="text to train the shared vocabulary on; stays here")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET", help="return-count, fedavg, fedasync, fedbuff or diloco", show_default="return-count"
        ),
    ] = None,
    min_nodes: Annotated[
        int | None, typer.Option(metavar="N", help="nodes to wait for before training", show_default="1")
    ] = None,
    versions: Annotated[
        int | None, typer.Option(metavar="N", help="stop after N versions", show_default="400, without a limit")
    ] = None,
    updates: Annotated[int | None, typer.Option(metavar="N", help="stop after N counted updates")] = None,
    seconds: Annotated[float | None, typer.Option(metavar="S", help="stop after S seconds of training")] = None,
    change: Annotated[
        bool, typer.Option("--change", help="go on with the settings given here where the message log has others")
    ] = False,
    once: Annotated[bool, typer.Option("--exit-when-finished", help="end when every encoder is finished")] = False,
    shards: Annotated[
        int | None,
        typer.Option(metavar="N", help="leave the numbers to N aggregators, a part each", show_default="1: none"),
    ] = None,
    threads: Threads = None,
    http: MasterHttp = None,
    log_file: LogFile = None,
    json: JsonLogs = False,
) -> None:
    """Run the master: instruct nodes, weigh and merge their updates, publish versions, export the encoder."""
    from deploy.commands.run import run_master

    stop = {"versions": versions, "updates": updates, "seconds": seconds}
    flags: dict[str, Any] = {
        "broker": {"url": broker, "namespace": namespace, "wait_seconds": wait},
        "log": {"json_lines": json or None, "file": log_file},
        "master": {
            "state_dir": state,
            "export_dir": export,
            "exit_when_finished": once or None,
            "shards": shards,
            "threads": threads,
            "http": http,
        },
        "encoder": {"get": get, "tokenizer": tokenizer, "reference": reference, "min_nodes": min_nodes},
        "rule": {"preset": rule},
        "stop": stop,
    }
    run_master(config, flags, change=change, credentials=credentials)


@app.command()
def aggregator(
    shard: Annotated[str, typer.Option(metavar="K/N", help="which it is of how many: 1/2, or 2/2")],
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
    wait: WaitForBroker = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="its part of updates and versions", show_default="aggregator-state/K-of-N"),
    ] = None,
    threads: Threads = None,
    http: Http = None,
    log_file: LogFile = None,
    json: JsonLogs = False,
) -> None:
    """Run one of several aggregators, which hold a part of every encoder each; of a master with `--shards N`."""
    from deploy.commands.aggregator import run_aggregator

    flags: dict[str, Any] = {
        "broker": {"url": broker, "namespace": namespace, "wait_seconds": wait},
        "log": {"json_lines": json or None, "file": log_file},
        "master": {"threads": threads},
    }
    run_aggregator(shard, state, config, flags, credentials=credentials, http=http)


@app.command()
def node(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="this node's id: letters, digits, - and _")] = None,
    config: ConfigFile = None,
    credentials: Credentials = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="file, folder or glob with the private samples; may be repeated"),
    ] = None,
    type_: SampleType = None,
    field: SampleField = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
    wait: WaitForBroker = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="identity and private parts", show_default="node-state/NAME")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="stem + encoder + head", show_default="STATE/encoders/ID/model")
    ] = None,
    get: Annotated[str | None, typer.Option(metavar="TYPE", help="ask the master for an encoder of this type")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps", show_default="auto")
    ] = None,
    threads: Threads = None,
    max_speed: Annotated[
        float | None, typer.Option(metavar="N", help="at most N training steps a second", show_default="no limit")
    ] = None,
    once: Annotated[bool, typer.Option("--exit-when-finished", help="end when the encoder is finished")] = False,
    sent: Annotated[
        Path | None,
        typer.Option("--sent-file", metavar="FILE", help="note each message that leaves, with all that is in it"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="send nothing: try corpus, broker and training, show what would leave")
    ] = False,
    http: Http = None,
    log_file: LogFile = None,
    json: JsonLogs = False,
) -> None:
    """Run a node: train the shared encoder on this machine's samples; only its parameters leave."""
    from deploy.commands.run import run_node

    table: dict[str, Any] | None = {"path": corpus, "type": type_, "field": field}
    if not any(value is not None for value in (corpus, type_, field)):
        table = None
    flags: dict[str, Any] = {
        "broker": {"url": broker, "namespace": namespace, "wait_seconds": wait},
        "log": {"json_lines": json or None, "file": log_file},
        "node": {
            "corpus": table,
            "state_dir": state,
            "export_dir": export,
            "get": get,
            "device": device,
            "threads": threads,
            "max_steps_per_second": max_speed,
            "exit_when_finished": once or None,
            "sent_file": sent,
            "http": http,
        },
    }
    if check:
        from deploy.rehearsal import check_node

        raise typer.Exit(check_node(name, config, flags, credentials=credentials))
    run_node(name, config, flags, credentials=credentials)


@request_app.command("get")
def request_get(
    type_: Annotated[str, typer.Argument(metavar="TYPE", help="text, image, or a type of yours")],
    fresh: Annotated[bool, typer.Option("--fresh", help="a new encoder even if there is a finished one")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="wait until it is finished and write it here")] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="seconds to wait for the master's answer")] = 30.0,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Ask for an encoder of a type: a finished one, the one being trained, or a new one."""
    from deploy.commands.observe import request_encoder

    flags = _broker_flags(broker, namespace, credentials)
    request_encoder(flags, config, timeout, encoder_type=type_, fresh=fresh, out=out)


@request_app.command("update")
def request_update(
    encoder: Annotated[str, typer.Argument(metavar="ENCODER", help="id of a finished encoder, as `status` shows it")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="wait until it is finished and write it here")] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="seconds to wait for the master's answer")] = 30.0,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Ask that a finished encoder be trained further."""
    from deploy.commands.observe import request_encoder

    request_encoder(_broker_flags(broker, namespace, credentials), config, timeout, encoder=encoder, out=out)


@request_app.command("stop")
def request_stop(
    encoder: Annotated[str | None, typer.Argument(metavar="ENCODER", help="id; all encoders if not given")] = None,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """End the training now: what is at hand becomes the last version, which is exported."""
    from deploy.commands.observe import request_stop as stop

    stop(_broker_flags(broker, namespace, credentials), config, encoder)


@app.command()
def status(
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
    watch: Annotated[bool, typer.Option("--watch", help="refresh every second until Ctrl-C")] = False,
    json: Annotated[bool, typer.Option("--json", help="the whole report as JSON")] = False,
    timeout: Annotated[float, typer.Option(metavar="S", help="seconds to wait for the master's answer")] = 10.0,
) -> None:
    """Show a running federation from outside, over the broker."""
    from deploy.commands.observe import show_status

    show_status(_broker_flags(broker, namespace, credentials), config, timeout, watch=watch, as_json=json)


@app.command()
def health(
    http: Annotated[
        str, typer.Option(metavar="ADDRESS", help="where the service of this machine is looked at")
    ] = DEFAULT_HTTP,
    alive: Annotated[bool, typer.Option("--alive", help="ask whether it is alive, not whether it is ready")] = False,
) -> None:
    """Ask a master, node or aggregator of this machine whether it is ready, in one line: exit code 0, or 1 if not."""
    from deploy.commands.health import look

    said = look(http, alive=alive)
    print(said.line)
    raise typer.Exit(0 if said.good else EXIT_FAILED)


@app.command()
def evaluate(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NODE", help="nodes; all in the file if not given")
    ] = None,
    config: ConfigFile = None,
    encoder: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="the shared encoder; more get a column each",
            show_default="master.export_dir of the file",
        ),
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="also train one trunk on all corpora together; needs all of them here")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write the figures as JSON")] = None,
    card: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write the figures into the card of this exported encoder")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the baselines, and of what is masked")] = 0,
    threads: Threads = None,
) -> None:
    """Compare the shared encoder with a random one and one trained alone, on held-out samples and a probe."""
    from deploy.commands.evaluate import run_evaluation

    run_evaluation(
        config, names or [], encoders=encoder or (), pooled=pooled, seed=seed, out=out, card=card, threads=threads
    )


@app.command()
def attach(
    encoder: Annotated[Path, typer.Argument(metavar="ENCODER", help="directory of an exported encoder of texts")],
    corpus: Annotated[list[str], typer.Option(metavar="PATH", help="your texts: files, folders or globs; repeats")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="where model and tokenizer go")] = Path("attached"),
    field: Annotated[
        str | None, typer.Option(metavar="NAME", help="text field of .jsonl .csv .parquet", show_default="text")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="take this tokenizer", show_default="the encoder's, or a new one")
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(metavar="N", help="train a vocabulary of N entries on the texts", show_default="4096, if needed"),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=0, help="at most N steps with all parameters free")] = 800,
    frozen_steps: Annotated[
        int, typer.Option(metavar="N", min=0, help="at most N steps before, with the encoder frozen")
    ] = 400,
    seed: Annotated[int, typer.Option(metavar="N", help="of everything that is left to chance")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    threads: Threads = None,
) -> None:
    """Fit an exported encoder to your texts, and save a whole model for transformers: first what it lacks, then all."""
    from deploy.commands.attach import run_attach

    run_attach(
        encoder,
        corpus,
        out,
        field=field,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        steps=steps,
        frozen_steps=frozen_steps,
        seed=seed,
        device=device,
        threads=threads,
    )


@app.command()
def export(
    encoder: Annotated[str, typer.Argument(metavar="ENCODER", help="id, as `status` shows it")],
    state: State = DEFAULT_STATE,
    version: Annotated[
        int | None, typer.Option(metavar="N", help="rebuild this version", show_default="the newest")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="where AutoModel.from_pretrained will find it")] = Path(
        "encoder"
    ),
    aggregator: Aggregators = None,
) -> None:
    """Rebuild any version of an encoder from the message log and write it for transformers."""
    from deploy.commands.replay import export_version

    export_version(encoder, state, version, out, aggregator or ())


@app.command()
def replay(
    state: State = DEFAULT_STATE,
    encoder: Annotated[str | None, typer.Option(metavar="ID", help="only this encoder", show_default="all")] = None,
    version: Annotated[int | None, typer.Option(metavar="N", help="only up to this version")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write the result for transformers")] = None,
    rule: Annotated[
        str | None, typer.Option(metavar="PRESET", help="decide by this aggregation rule instead of the logged one")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="section.key=value", help="change the rule: outer.lr=2; may be repeated"),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="leave out what this node said; may be repeated")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="a line for every version")] = False,
    aggregator: Aggregators = None,
) -> None:
    """Rebuild every version from the message log and compare the bits, or see what another rule makes of it.

    Exit code 1 at the first version that is not what was published.
    """
    from deploy.commands.replay import run_replay

    run_replay(
        state,
        encoder=encoder,
        version=version,
        out=out,
        rule=rule,
        changes=set_ or (),
        without=without or (),
        every=every,
        aggregators=aggregator or (),
    )


@app.command()
def vocabulary(
    reference: Annotated[Path, typer.Argument(metavar="PATH", help="file or folder of texts that no node holds")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="where the tokenizer.json goes")],
    entries: Annotated[int, typer.Option(min=1, metavar="N", help="entries of it at most")] = 2048,
) -> None:
    """Train a vocabulary on a text that no node holds, to look at before an encoder shares it."""
    from deploy.commands.vocabulary import write_vocabulary

    write_vocabulary(reference, entries, out)


@app.command()
def simulate(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="message log and report.json; an earlier simulation is replaced")
    ] = Path("simulation"),
    nodes: Annotated[int, typer.Option(metavar="N", help="nodes")] = 200,
    returns: Annotated[
        int, typer.Option(metavar="N", help="counted updates for each node, after which the run ends")
    ] = 50,
    speeds: Annotated[
        str, typer.Option(metavar="S,S,…", help="steps a second, dealt out to the nodes in turn")
    ] = "1,2,4,8,16",
    steps: Annotated[int, typer.Option(metavar="N", help="local steps to an update")] = 10,
    parameters: Annotated[int, typer.Option(metavar="N", help="shared parameters")] = 64,
    link: Annotated[str, typer.Option(metavar="SIZE", help="bytes a second of each node's line, each way")] = "10MB",
    late: Annotated[float, typer.Option(metavar="SHARE", help="of the nodes that join later, 0 to 1")] = 0.0,
    leave: Annotated[float, typer.Option(metavar="SHARE", help="of the nodes that leave once and return")] = 0.0,
    crash: Annotated[
        float, typer.Option(metavar="SHARE", help="of the nodes that are killed once and started again")
    ] = 0.0,
    crash_master: Annotated[
        bool, typer.Option("--crash-master", help="kill the master once and start it again from its log")
    ] = False,
    rule: Annotated[
        str, typer.Option(metavar="PRESET", help="return-count, fedavg, fedasync, fedbuff or diloco")
    ] = "return-count",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="section.key=value", help="change the rules: outer.lr=2, update.encoding=float32; repeats"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="of everything that is left to chance")] = 0,
) -> None:
    """The real master and many real nodes in this process under a virtual clock, with training that is modelled.

    The same arguments give the same message log, bit for bit; `replay` proves it.
    """
    from deploy.simulate import run_simulation

    run_simulation(
        out,
        rule=rule,
        changes=set_ or (),
        nodes=nodes,
        returns=returns,
        speeds=speeds,
        steps=steps,
        parameters=parameters,
        link=link,
        late=late,
        leave=leave,
        crash=crash,
        crash_master=crash_master,
        seed=seed,
    )


@app.command()
def compare(
    out: Annotated[Path, typer.Option(metavar="DIR", help="cells, report.json, report.html and report.png")],
    config: ConfigFile = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="seeds, each paired", show_default="5")] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="processes, one CPU each")] = 2,
    arms: Annotated[
        str | None, typer.Option(metavar="ARM,ARM,…", help="only these, and alone", show_default="all")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the comparison in DIR")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="a rehearsal: a twentieth of the steps, two seeds, one point of the grid")
    ] = False,
) -> None:
    """What each organisation gains: random, alone, pooled and federated training, measured on held-out samples.

    Every arm has the same grid and the same steps, choices go by a validation part, and the test part is read last. The
    section compare of the file says how long, over which grid, and which federated arms there are.
    """
    from deploy.compare.command import run_comparison

    run_comparison(config, out, seeds=seeds, jobs=jobs, resume=resume, arms=arms, quick=quick)


def _broker_flags(broker: str | None, namespace: str | None, credentials: Path | None) -> dict[str, Any]:
    from deploy.broker.credentials import merged

    return merged({"broker": {"url": broker, "namespace": namespace}}, credentials)[0]


def main() -> NoReturn:
    """Run the command; what a person can mend is one line, and the exit code says what kind it was."""
    # at once: to process 1 of a container SIGTERM means nothing until there is a handler, and torch takes seconds
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # what is loaded lies on this machine: no library of ours calls out, unless the environment says that it may
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    sys.exit(guarded(lambda: app(standalone_mode=True)))


def guarded(action: Callable[[], Any]) -> int:
    """Run `action` and give the exit code: 2 for what the user can mend, 3 for a broker that is away, 1 otherwise."""
    try:
        action()
    except UserError as error:
        return _say(str(error), EXIT_USER_ERROR)
    except LockHeld as error:
        return _say(str(error), EXIT_USER_ERROR)
    except BrokerUnavailable as error:
        return _say(str(error), EXIT_BROKER)
    except SharedEncoderError as error:
        return _say(str(error), EXIT_FAILED)
    except Exception as error:  # a bug of ours, unless it is about a path of the user's
        from deploy.blame import users_path

        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = f"the disk is full ({error}); make room and start again: what was durable is kept"
            return _say(full, EXIT_FAILED)
        line = users_path(error)
        if line is None:
            raise
        return _say(line, EXIT_USER_ERROR)
    return 0


def _say(text: str, code: int) -> int:
    print(f"shared-encoder: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
