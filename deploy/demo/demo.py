"""`shared-encoder demo`: four nodes, one topic of Python's standard library each, one shared encoder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.exports import check_writable
from common.extras import need
from deploy.commands.display import FederationDisplay, console, saying
from deploy.commands.progress import counting
from deploy.commands.run import load_corpora
from deploy.config import Config, load_config
from deploy.demo.federation import Federation, over_rabbitmq
from deploy.example_texts import write_corpora
from deploy.logging import configure_logging
from master_service.status import Report

if TYPE_CHECKING:
    from common.encoders.base import PrivateSpec
    from deploy.compare.training import State
    from deploy.simulation.configured import KeptSession
    from node_service.corpus.corpus import Corpus
    from node_service.training.checkpoint import Facts

#: The node that starts when this share of the training is done, and the one that is away for a while.
LATE, LATE_AT = "numeric", 0.25
AWAY, AWAY_FROM, AWAY_UNTIL = "parsing", 0.5, 0.7
#: Steps a second of the virtual clock: organisations have unequal machines. Over RabbitMQ, at most so many real ones.
SPEEDS = {"networking": 20.0, "concurrency": 10.0, "parsing": 20.0, "numeric": 15.0}
#: The quick demo over RabbitMQ trains slowly on purpose: the late node's start takes longer than a few steps' training.
QUICK_SPEED = 5.0
#: Steps of the fastest node together with the others, and the share of them that each finishes alone with.
STEPS, QUICK_STEPS, FINISH_SHARE = 2000, 120, 0.25

#: What a demo leaves in its folder.
_MAKES = {"data", "demo.toml", "master", "nodes", "logs", "encoder", "report.json", "report.png"}

_SHOWS = (
    "What this shows: one encoder with one vocabulary, trained by four parties at unequal speeds, one late and one "
    "away for a while; only parameter updates left a node. Each then finished its own copy by itself. What it does not "
    'show: a good encoder. It is tiny and was trained for minutes. "alone" took as many steps on its topic as the node '
    "did in all, with a rate and decay of its own, and kept its best moment too."
)


@dataclass(frozen=True)
class _Found:
    """What became of a node: facts of its pinned version, its private spec, parameters by encoder, steps in all."""

    facts: Facts
    spec: PrivateSpec
    states: dict[str, State]
    steps: int


def run_demo(out: Path, *, quick: bool, broker_url: str | None, seed: int = 0) -> None:
    """Run the demo and write its results into `out`. Raises UserError if `out` holds anything but an earlier demo."""
    configure_logging(level="warning" if broker_url else "error")
    need("matplotlib", "the demo draws its report with")
    need("sklearn", "the demo measures with")
    screen, started = console(), time.monotonic()
    _prepare(out)
    screen.print(f"[bold]shared-encoder demo[/bold]: four private corpora, one shared encoder; results go to {out}/")
    corpora = write_corpora(out / "data")
    file = out / "demo.toml"
    file.write_text(configuration(out, corpora, quick=quick, broker_url=broker_url, seed=seed))
    config = load_config(file, {})
    with saying("loading torch and transformers, a few seconds"):
        import torch
        import transformers  # noqa: F401  # here, where it can be said, and not at the first instruction
    # the matrices are tiny: a second thread costs more than it brings, and much more on a busy machine
    torch.set_num_threads(1)
    read = {name: load_corpora(name, node)["text"] for name, node in config.nodes.items()}
    if broker_url:
        with over_rabbitmq(config, file, out / "logs") as federation:
            report = _train(federation, quick=quick)
    else:
        report, sessions = _step(config, read, QUICK_STEPS if quick else STEPS)
    trained = time.monotonic() - started
    screen.print(f"trained in {trained:.0f} s; now each topic alone, for as many steps, and all measured")

    from deploy.demo.comparison import QUICK, Effort, Topic, compared
    from deploy.demo.report import print_figures, print_nodes, write_report

    topics, states = [], {}
    for name, corpus in read.items():
        found = _of_disk(out, config, name, corpus) if broker_url else _of_session(sessions[name])
        if found is None:
            screen.print(f"{name} did not get ready before the training was over: it has no row", highlight=False)
            continue
        states[name] = found.states
        seeds = {"seed": config.nodes[name].seed, "encoder_seed": config.encoder.seed}
        topics.append(Topic(name, "text", found.facts.architecture, found.spec, corpus, steps=found.steps, **seeds))
    with counting("measured", "topics", len(topics)) as (_, advance):
        effort = QUICK if quick else Effort()
        figures = compared(topics, states, effort, min(2, os.cpu_count() or 1), lambda name: advance())
    summary = write_report(out, config.master.state_dir, report, figures, time.monotonic() - started, seed)
    print_figures(figures)
    print_nodes(summary)
    screen.print(_SHOWS, highlight=False)
    screen.print(
        f"\n{time.monotonic() - started:.0f} s in all. Report: {out}/report.json and report.png. The encoder, with its "
        f"tokenizer: transformers.AutoModelForMaskedLM.from_pretrained({str(out / 'encoder')!r})",
        highlight=False,
    )


def _step(config: Config, corpora: dict[str, Corpus], steps: int) -> tuple[Report, dict[str, KeptSession]]:
    """Train under the virtual clock, with a display."""
    from deploy.simulation.configured import Absence, ConfiguredFederation

    absences = {LATE: Absence(LATE, 0.0, LATE_AT), AWAY: Absence(AWAY, AWAY_FROM, AWAY_UNTIL)}
    demo = ConfiguredFederation(config, corpora, SPEEDS, seconds=steps / max(SPEEDS.values()))
    with FederationDisplay(quiet=False) as display:

        def show(report: Callable[[], Report]) -> None:
            if display.due():
                display.show(report())

        found = demo.train(absences, show)
        display.show(found)
    return found, demo.sessions


def _of_session(session: KeptSession) -> _Found:
    """What a node's session has come to: its shared version with the private parts that fit it, and its own copy."""
    from deploy.compare.training import state_of
    from node_service.training.checkpoint import read_checkpoint
    from node_service.training.private_parts import load_spec

    spec, pinned, finished = load_spec(session.directory), read_checkpoint(session.directory), session.finished
    assert spec is not None and pinned is not None and finished is not None, "it has finished"
    states = {"shared": state_of(session.model), "finished": finished}
    return _Found(pinned.facts, spec, states, session.steps_in_all)


def _of_disk(out: Path, config: Config, name: str, corpus: Corpus) -> _Found | None:
    """The same of a node that was a process, without its own copy; None if it was not ready before the end."""
    from common.encoders import get_encoder_type
    from deploy.compare.training import state_of
    from node_service.evaluation.evaluate import Domain, shared_model
    from node_service.training.private_parts import load_spec

    state_dir = config.nodes[name].state_dir
    assert state_dir is not None
    private = next(state_dir.glob("encoders/*/pinned.json"), None)
    if private is None:
        return None
    domain = Domain.of(name, {"text": corpus}, private.parent)
    _, tensors = get_encoder_type("text").architecture_of(out / "encoder")
    spec = load_spec(private.parent)
    assert spec is not None, "Domain.of has read it"
    return _Found(domain.pinned, spec, {"shared": state_of(shared_model(domain, tensors))}, domain.steps)


def _prepare(out: Path) -> None:
    """Make `out` an empty folder; an earlier demo in it is removed. Raises UserError if it holds anything else."""
    check_writable(out, out)
    out.mkdir(parents=True, exist_ok=True)
    inside = list(out.iterdir())
    strangers = sorted(path.name for path in inside if path.name not in _MAKES)
    if strangers or (inside and not (out / "demo.toml").exists()):
        found = strangers[0] if strangers else inside[0].name
        raise UserError(f"{out} is there and not from a demo: it holds {found}; give another folder with --out DIR")
    for path in inside:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def configuration(
    out: Path, corpora: dict[str, tuple[Path, Path]], *, quick: bool, broker_url: str | None, seed: int
) -> str:
    """The TOML text of the demo's configuration; `--config` reads the same file."""

    def text(value: object) -> str:
        return json.dumps(str(value))

    steps = QUICK_STEPS if quick else STEPS
    # over RabbitMQ time is real, and what a machine takes for it is not known
    end = f"updates = {40 if quick else 400}" if broker_url else f"seconds = {steps / max(SPEEDS.values())}"
    finish = '{ what = "none" }' if broker_url else f"{{ share = {FINISH_SHARE} }}"
    lines = [
        "[broker]",
        f"url = {text(broker_url)}" if broker_url else "# the demo used the embedded broker",
        'namespace = "shared-encoder-demo"',
        "\n[master]",
        f"state_dir = {text(out / 'master')}",
        f"export_dir = {text(out / 'encoder')}",
        "\n[encoder]",
        'get = "text"',
        f"seed = {seed}",
        f"min_nodes = {len(corpora) - 1}",
        "\n[stop]",
        end,
        "\n[update]",
        "when = { steps = 10 }",
        f"finish = {finish}",
        'inner = { schedule = "constant" }',
        "\n[rule]",
        "outer = { rho = 0.67 }",
        "\n# `compare --arms alone` chose rate and decay of the encoder that is trained alone; see docs/learning.md",
        "[compare]",
        f"steps = {steps}",
        "seeds = 1",
        "learning_rates = [3e-3, 6e-3, 1.2e-2]",
        "weight_decays = [0.01, 0.1]",
    ]
    for index, (name, (train, test)) in enumerate(corpora.items()):
        lines += [f"\n[nodes.{name}]", f"state_dir = {text(out / 'nodes' / name)}", "alive_every_seconds = 1.0"]
        lines += ["exit_when_finished = true", f"seed = {seed * len(corpora) + index}"]
        if broker_url:
            lines.append(f"max_steps_per_second = {QUICK_SPEED if quick else SPEEDS[name]}")
        lines += [f"corpus = {{ path = {text(train)}, test_path = {text(test)} }}"]
    return "\n".join(lines) + "\n"


def _train(federation: Federation, *, quick: bool) -> Report:
    """Start the master and the nodes, one of them late, stop one early, and watch until the encoder is finished.

    The last report. Raises UserError if the encoder could not be made.
    """
    federation.start_master()
    for name in federation.config.nodes:
        if name != LATE:
            federation.start_node(name)
    late, left = False, False
    with FederationDisplay(quiet=False) as display:
        while True:
            federation.check()
            report = federation.observer.status(60.0)
            if display.due():
                display.show(report)
            encoder = next(iter(report.encoders.values()), None)
            if encoder is not None:
                # the quick demo is over before a process that starts later has loaded torch
                if encoder.progress >= (0.0 if quick else LATE_AT) and encoder.members and not late:
                    late = True
                    federation.start_node(LATE)
                if encoder.progress >= AWAY_FROM and not left:
                    left = True
                    federation.nodes[AWAY].stop()
                if encoder.status in ("finished", "failed"):
                    display.show(report)
                    break
            time.sleep(0.3)
    if encoder.status == "failed":
        raise UserError(f"the encoder could not be made: {encoder.reason}")
    for name, party in federation.nodes.items():
        if name not in encoder.members:
            party.stop()
    federation.wait_for_nodes()
    return federation.observer.status(10.0)
