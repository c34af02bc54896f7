"""What share of its time a node loses: a real masked language model is trained, by a master, nodes and RabbitMQ as
processes, as users start them.

    python -m tests.benchmarks.time_lost                       # one node, 10 M parameters, an update every 30 s
    python -m tests.benchmarks.time_lost --parameters 110M --device cuda --precision bfloat16 --nodes 5

Lost is what a node says is: seconds in which no step ran though one could have (see `node_service.time_spent`), by what
was done instead, between two looks at the master's status. Where processors are shared, master, broker and the node's
own threads make steps slower, too: that is in no node's figures, but in its steps a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.durable import write_durably
from common.errors import BrokerUnavailable, UserError
from deploy.commands.display import console, share
from deploy.commands.observe import observing
from deploy.local_rabbitmq import LocalRabbitMQ
from master_service.status import MemberReport, Report
from tests.benchmarks.processes import machine_seconds

_ROOT = Path(__file__).parents[2]
#: Architectures by about how many parameters they have; 110M is ModernBERT's own base (Warner et al. 2024), all of them
#: over the vocabulary that is shipped.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "10M": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768},
    "25M": {"hidden_size": 512, "num_hidden_layers": 9, "num_attention_heads": 8, "intermediate_size": 1024},
    "110M": {"hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152},
}
#: How long a process may take to end.
_END_SECONDS = 60.0
_LOOK_SECONDS = 1.0
#: From one look to the next once figures are measured: each one costs the master something.
_LATER_LOOK_SECONDS = 10.0
_BEGUN = time.monotonic()


@dataclass(frozen=True)
class Setting:
    """What is run. An update is due after `seconds`, or after `steps` where that is given; `corpus` is text."""

    parameters: str = "10M"
    nodes: int = 1
    seconds: float = 30.0
    steps: int | None = None
    device: str = "cpu"
    precision: str = "float32"
    compile: bool = False
    micro_batch: int | None = None
    batch: int = 16
    window: int = 32
    corpus: str = f"{_ROOT}/docs/*.md"
    checkpoint_every: float = 60.0
    evaluate_every: int = 10


def measured(
    setting: Setting,
    url: str,
    directory: Path,
    *,
    minutes: float,
    patience: float = 300.0,
    each: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> dict[str, Any]:
    """Run for so long after every node has had an update counted; the figures of each node, plain for JSON.

    Each look at the status on the way is in them as it was (`looks`: what nodes have counted since they began), and
    `each` is handed what is known with it. The processes are killed in the end: nobody wants what they made.
    Raises RuntimeError with the last words of a process that failed, or if no update counts in `patience` seconds.
    """
    directory.mkdir(parents=True)
    names = [f"n{number}" for number in range(setting.nodes)]
    file = configuration(setting, url, directory, names)
    begun = time.monotonic()
    processes = {"master": start(file, directory, "master")}
    processes |= {name: start(file, directory, "node", name) for name in names}
    figures: dict[str, Any] = {"setting": asdict(setting), "looks": []}
    first: _Look | None = None
    try:
        while True:
            now = _look(file, names, begun)
            figures["looks"].append(now.plain())
            if first is None and all(member.returns for member in now.members.values()):
                first = now
            if first is not None and now.parameters:  # else there was no answer
                figures |= _figures(first, now)
            each(figures)
            if first is not None and now.parameters and now.seconds - first.seconds >= 60.0 * minutes:
                return figures
            until = now.seconds + (_LOOK_SECONDS if first is None else _LATER_LOOK_SECONDS)
            if first is not None and until > first.seconds + 60.0 * minutes > now.seconds:
                until = first.seconds + 60.0 * minutes
            while (passed := time.monotonic() - begun) < until:
                _check(processes, directory, late=first is None and passed > patience)
                time.sleep(min(_LOOK_SECONDS, until - passed))
    finally:
        end(processes, signal.SIGKILL)


@dataclass(frozen=True)
class _Look:
    """At the status, so many seconds after all was started."""

    seconds: float
    members: dict[str, MemberReport]
    version: int
    parameters: int
    busy: float
    idle: float

    def plain(self) -> dict[str, Any]:
        kept = {"note", "steps", "returns", "version", "step_seconds", "waiting_seconds", "lost_seconds"}
        nodes = {name: member.model_dump(include=kept) for name, member in self.members.items()}
        return {"seconds": round(self.seconds, 1), "version": self.version, "nodes": nodes}


def _look(file: Path, names: list[str], begun: float) -> _Look:
    report = status(file)
    encoder = next(iter(report.encoders.values()), None)
    version, parameters = (encoder.version or 0, encoder.parameters) if encoder is not None else (0, 0)
    found = dict(zip(names, members(report, names), strict=True))
    return _Look(time.monotonic() - begun, found, version, parameters, *machine_seconds())


def _figures(first: _Look, last: _Look) -> dict[str, Any]:
    busy, idle = last.busy - first.busy, last.idle - first.idle
    return {
        "parameters": last.parameters,
        "seconds": round(last.seconds - first.seconds, 1),
        "versions": last.version,
        "machine_busy": round(busy / (busy + idle), 3) if busy + idle else 0.0,
        "nodes": {name: between(before, last.members[name]) for name, before in first.members.items()},
    }


def show(figures: dict[str, Any], where: Console) -> None:
    """A row for each node."""
    title = (
        f"{figures['parameters']:,} parameters, {figures['seconds']:.0f} s, {figures['versions']} versions, "
        f"machine {figures['machine_busy']:.0%} busy"
    )
    table = Table(title=title, title_justify="left")
    kinds = list(next(iter(figures["nodes"].values()))["lost"])
    for heading in ("node", "updates", "steps", "steps/s", "lost", *kinds, "waited"):
        table.add_column(heading, justify="left" if heading == "node" else "right")
    for name, node in figures["nodes"].items():
        table.add_row(
            name,
            str(node["updates"]),
            str(node["steps"]),
            f"{node['steps_per_second']:.2f}",
            share(node["lost_share"]),
            *(share(node["lost"][kind] / node["could_train"]) for kind in kinds),
            f"{node['waiting']:.1f} s",
        )
    where.print(table)


def between(before: MemberReport, after: MemberReport) -> dict[str, Any]:
    """What happened to a node from one look to another; seconds."""
    lost = {kind: seconds - before.lost_seconds.get(kind, 0.0) for kind, seconds in after.lost_seconds.items()}
    stepped = after.step_seconds - before.step_seconds
    could_train = stepped + sum(lost.values())
    steps = after.steps - before.steps
    return {
        "updates": after.returns - before.returns,
        "steps": steps,
        "steps_per_second": steps / stepped if stepped else 0.0,
        "could_train": could_train,
        "lost": lost,
        "lost_share": sum(lost.values()) / could_train if could_train else None,
        "waiting": after.waiting_seconds - before.waiting_seconds,
    }


def members(report: Report, names: list[str]) -> list[MemberReport]:
    encoder = next(iter(report.encoders.values()), None)
    members = encoder.members if encoder is not None else {}
    return [members.get(name, MemberReport()) for name in names]


def status(file: Path) -> Report:
    """What the master says; nothing while it does not answer yet."""
    with contextlib.suppress(BrokerUnavailable, UserError), observing({}, file) as (observer, _, _):
        return observer.status(5.0)
    return Report()


def configuration(setting: Setting, url: str, directory: Path, names: list[str]) -> Path:
    architecture = {**ARCHITECTURES[setting.parameters], "sequence_length": setting.window}
    architecture |= {"initializer_range": 0.02} if setting.parameters != "tiny" else {}
    when = f"steps = {setting.steps}" if setting.steps is not None else f"seconds = {setting.seconds}"
    settings = ", ".join(f"{name} = {json.dumps(value)}" for name, value in architecture.items())
    lines = [
        f'[broker]\nurl = "{url}"\nnamespace = "lost-{uuid.uuid4().hex[:8]}"',
        f'[master]\nstate_dir = "{directory}/master"',
        f'[encoder]\nget = "text"\nmin_nodes = {setting.nodes}\narchitecture = {{{settings}}}',
        "[stop]\nversions = 1000000",
        f"[update]\nwhen = {{{when}}}\nevaluate_every = {setting.evaluate_every}\n"
        f"inner = {{batch_size = {setting.batch}, lr = 3e-4}}",
    ]
    lines += [
        f'[nodes.{name}]\nstate_dir = "{directory}/{name}"\ndevice = "{setting.device}"\n'
        f'precision = "{setting.precision}"\ncompile = {json.dumps(setting.compile)}\n'
        + (f"micro_batch = {setting.micro_batch}\n" if setting.micro_batch else "")
        + f"seed = {number}\nalive_every_seconds = 1.0\ncheckpoint_every_seconds = {setting.checkpoint_every}\n"
        + f'corpus = {{path = {json.dumps(setting.corpus)}, documents = "paragraph"}}'
        for number, name in enumerate(names)
    ]
    file = directory / "run.toml"
    file.write_text("\n".join(lines))
    return file


def start(file: Path, directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    with (directory / f"{arguments[-1]}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *arguments, "--config", str(file), "--json"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            cwd=directory,
        )


def _check(processes: dict[str, subprocess.Popen[bytes]], directory: Path, *, late: bool) -> None:
    for name, process in processes.items():
        if process.poll() is not None or late:
            words = (directory / f"{name}.log").read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{name} {'is late' if process.poll() is None else 'has ended'}: {words}")


def end(processes: dict[str, subprocess.Popen[bytes]], by: int = signal.SIGTERM) -> None:
    for process in reversed(processes.values()):
        process.send_signal(by)
    for process in processes.values():
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _broker(url: str | None, directory: Path) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with LocalRabbitMQ(directory / "rabbitmq") as server:
        yield server.url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", choices=ARCHITECTURES, default="10M")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=4.0, help="after every node's first update")
    parser.add_argument("--seconds", type=float, default=30.0, help="from one update to the next")
    parser.add_argument("--steps", type=int, help="of an update, in the place of --seconds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--corpus", default=Setting.corpus, help="texts, as a node's corpus.path")
    parser.add_argument("--checkpoint-every", type=float, default=60.0)
    parser.add_argument("--evaluate-every", type=int, default=10, help="versions, as in the rule; 0: never")
    parser.add_argument("--broker", help="address of a RabbitMQ; by default one is started")
    parser.add_argument("--json", type=Path, help="file for the figures; whole after every look")
    parser.add_argument("--logs", type=Path, help="folder that is not there yet, for what processes say and keep")
    chosen = vars(parser.parse_args())
    minutes, url, json_file, logs = (chosen.pop(name) for name in ("minutes", "broker", "json", "logs"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was started ends with this
    said = -_LATER_LOOK_SECONDS

    def keep(figures: dict[str, Any]) -> None:
        nonlocal said
        if json_file is not None:
            write_durably(json_file, json.dumps(figures, indent=1).encode())
        now = figures["looks"][-1]
        if now["seconds"] >= said + _LATER_LOOK_SECONDS or "nodes" in figures:
            said = now["seconds"]
            print(_in_a_line(now), flush=True)

    with tempfile.TemporaryDirectory() as folder, _broker(url, Path(folder)) as broker:
        print(f"the broker is up after {time.monotonic() - _BEGUN:.0f} s", flush=True)
        figures = measured(Setting(**chosen), broker, logs or Path(folder) / "run", minutes=minutes, each=keep)
        show(figures, console())


def _in_a_line(look: dict[str, Any]) -> str:
    nodes = "; ".join(
        f"{name}: {node['steps']} steps in {node['step_seconds']:.1f} s, {node['returns']} updates, "
        f"lost {sum(node['lost_seconds'].values()):.2f} s, waited {node['waiting_seconds']:.1f} s, {node['note']!r}"
        for name, node in look["nodes"].items()
    )
    return f"{look['seconds']:.0f} s, version {look['version']}; {nodes}"


if __name__ == "__main__":
    main()
