"""`shared-encoder demo`: four nodes, one topic of Python's standard library each, one shared encoder."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from common.errors import UserError
from common.exports import check_writable
from deploy.commands.display import FederationDisplay, console, saying
from deploy.commands.run import load_corpora
from deploy.config import load_config
from deploy.demo.corpus import write_corpora
from deploy.demo.federation import Federation, embedded, over_rabbitmq
from deploy.logging import configure_logging
from master_service.status import Report

#: The node that starts when this share of the training is done, and the one that leaves then.
LATE, LATE_AT = "numeric", 0.25
EARLY, EARLY_AT = "parsing", 0.7
#: Steps a second at most: organisations have unequal machines.
SPEEDS = {"networking": None, "concurrency": 6.0, "parsing": None, "numeric": 12.0}
#: The quick demo trains slowly on purpose: the late node's start takes longer than the training of a few steps.
QUICK_SPEED = 5.0

#: What a demo leaves in its folder.
_MAKES = {"data", "demo.toml", "master", "nodes", "logs", "encoder", "report.json", "report.png"}

_SHOWS = (
    "What this shows: one encoder trained by four parties at unequal speeds, one late and one leaving early, each with "
    "its own vocabulary; only parameter updates left a node. What it does not show: a good encoder. It is tiny and was "
    "trained for a minute or two; a probe of a barely trained encoder can lie below a random one, and the figures are "
    'as they came. "alone" trained as many steps as the node did, so the late node and the early leaver compare less '
    "training."
)


def run_demo(out: Path, *, quick: bool, broker_url: str | None) -> None:
    """Run the demo and write its results into `out`. Raises UserError if `out` holds anything but an earlier demo."""
    configure_logging(level="warning")
    screen, started = console(), time.monotonic()
    _prepare(out)
    screen.print(f"[bold]shared-encoder demo[/bold]: four private corpora, one shared encoder; results go to {out}/")
    corpora = write_corpora(out / "data")
    file = out / "demo.toml"
    file.write_text(_configuration(out, corpora, quick=quick, broker_url=broker_url))
    config = load_config(file, {})
    with saying("loading torch and transformers, a few seconds"):
        import torch
        import transformers  # noqa: F401  # here, where it can be said, and not at the first instruction
    # the matrices are tiny: a second thread costs more than it brings, and much more on a busy machine
    torch.set_num_threads(1)
    with over_rabbitmq(config, file, out / "logs") if broker_url else embedded(config) as federation:
        report = _train(federation, quick=quick)
    trained = time.monotonic() - started
    screen.print(f"trained in {trained:.0f} s; now the comparison, which trains each domain alone for as many steps")

    from common.encoders import get_encoder_type
    from deploy.commands.evaluate import evaluate_domains, print_table
    from deploy.demo.report import print_nodes, write_report
    from node_service.evaluation.evaluate import Domain

    domains = []
    for name, node in config.nodes.items():
        assert node.state_dir is not None
        private = next(node.state_dir.glob("encoders/*/pinned.json"), None)
        if private is None:
            screen.print(f"{name} did not get ready before the training was over: it has no row", highlight=False)
            continue
        domains.append(Domain.of(name, load_corpora(name, node), private.parent))
    _, tensors = get_encoder_type("text").architecture_of(out / "encoder")
    figures = evaluate_domains(domains, tensors, config.update.inner, probe_rows=400 if quick else 2000)
    summary = write_report(out, config.master.state_dir, report, figures, time.monotonic() - started)
    print_table(figures)
    print_nodes(summary)
    screen.print(_SHOWS, highlight=False)
    screen.print(
        f"\n{time.monotonic() - started:.0f} s in all. Report: {out}/report.json and report.png. The encoder: "
        f"transformers.AutoModel.from_pretrained({str(out / 'encoder')!r})",
        highlight=False,
    )


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


def _configuration(out: Path, corpora: dict[str, tuple[Path, Path]], *, quick: bool, broker_url: str | None) -> str:
    """The TOML text of the demo's configuration; `--config` reads the same file."""

    def text(value: object) -> str:
        return json.dumps(str(value))

    updates, steps = (40, 5) if quick else (150, 25)
    lines = [
        "[broker]",
        f"url = {text(broker_url)}" if broker_url else "# the demo used the embedded broker",
        'namespace = "shared-encoder-demo"',
        "\n[master]",
        f"state_dir = {text(out / 'master')}",
        f"export_dir = {text(out / 'encoder')}",
        "\n[encoder]",
        'get = "text"',
        f"min_nodes = {len(corpora) - 1}",
        "\n[stop]",
        f"updates = {updates}",
        "\n[update]",
        f"when = {{ steps = {steps} }}",
        # what is compared afterwards is the shared version
        'finish = { what = "none" }',
    ]
    for name, (train, test) in corpora.items():
        lines += [f"\n[nodes.{name}]", f"state_dir = {text(out / 'nodes' / name)}", "alive_every_seconds = 1.0"]
        lines += ["exit_when_finished = true"]
        speed = QUICK_SPEED if quick else SPEEDS[name]
        if speed is not None:
            lines.append(f"max_steps_per_second = {speed}")
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
                if encoder.progress >= EARLY_AT and not left:
                    left = True
                    federation.nodes[EARLY].stop()
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
