"""`shared-encoder compare`: from the configuration to a comparison, and what is said while it runs."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console

from common.config import explained, suggestion
from common.durable import write_durably
from common.errors import SharedEncoderError, UserError, WordsNeeded
from common.exports import check_writable
from common.extras import need
from common.locks import DirectoryLock
from common.wire.update_rule import UpdateRule
from deploy.commands.display import console, saying
from deploy.commands.run import check_node_id, load_corpora
from deploy.compare.cut import dealt, owner
from deploy.compare.transfer.corpora import read_unseen
from deploy.compare_settings import ALONE, BASELINES, ArmConfig, CompareConfig
from deploy.config import Config, load_config
from deploy.logging import configure_logging
from deploy.signals import interrupted_once
from master_service.decisions.requests import sources
from master_service.decisions.rules.model import AggregationRule, aggregation_rule, check_nodes

if TYPE_CHECKING:
    from deploy.compare.plan import Comparison, FederatedArm
    from node_service.corpus.corpus import Corpus

#: The word for all arms of the table of attacks.
_TABLE = "attacks"
#: What says of a folder that a comparison is in it.
_ABOUT = "comparison.json"


def run_comparison(
    file: Path | None,
    out: Path,
    *,
    seeds: int | None,
    jobs: int,
    resume: bool,
    arms: str | None,
    quick: bool,
) -> None:
    """Compare the arms of a configuration, write the report into `out` and print it.

    Raises UserError for a configuration that does not serve and a folder that holds anything but an earlier comparison
    (which `resume` goes on with), SharedEncoderError for a comparison that was stopped.
    """
    check_comparison_directory(out, resume=resume)
    config = load_config(file, {"compare": {"seeds": seeds}})
    configure_logging(level="error")
    settings = config.compare.rehearsal() if quick else config.compare
    # hours of cells come before what they are for
    need("matplotlib", "a comparison draws its report with")
    if settings.transfer:
        need("sklearn", "compare.transfer probes with")
        need("threadpoolctl", "compare.transfer probes with")
    chosen = chosen_arms(settings, arms)
    encoder_type = encoder_type_of(config)
    corpora = dealt(read_corpora(config, encoder_type, file), settings.cut)
    unseen = read_unseen(settings.transfer, encoder_type, corpora, file and file.parent) if settings.transfer else {}
    with saying("loading torch and transformers, a few seconds"):
        import torch

        from deploy.compare.bench import Bench
        from deploy.compare.cells import Cells
        from deploy.compare.pool import kill_workers, pool
        from deploy.compare.progress import Narrator
        from deploy.compare.report import HTML, PNG, described, print_report, write_report
        from deploy.compare.run import run
        from node_service.training.trainer import choose_device
    torch.set_num_threads(1)
    settings = settings.model_copy(update={"device": choose_device(settings.device)})
    comparison = comparison_of(config, settings, encoder_type, chosen, corpora)
    corpora = {**corpora, **unseen}
    command = shlex.join(["shared-encoder", *sys.argv[1:]])
    started = time.monotonic()
    # a second Ctrl-C while the first is put in order would leave processes that nobody ends
    with interrupted_once(kill_workers), closing(DirectoryLock(out, "--out")):
        cells = Cells(out)
        _write(out / _ABOUT, {"command": command, "comparison": described(comparison)})
        bench = Bench(comparison, corpora, cells)
        with Narrator(bench, jobs, corpora) as narrator:
            try:
                narrator.announce()
                with pool(jobs, bench, corpora, out) as workers:
                    outcome = run(bench, cells, workers, narrator.on_cell)
            except KeyboardInterrupt:
                raise SharedEncoderError(
                    f"stopped; {narrator.done} cells are whole, and the same command with --resume goes on from there"
                ) from None
        report = write_report(out, comparison, outcome, command=command, seconds=time.monotonic() - started)
    screen = console()
    print_report(report, screen if screen.is_terminal else Console(width=240))
    screen.print(f"written to {out / HTML} and {out / PNG}", highlight=False)


def check_comparison_directory(directory: Path, *, resume: bool) -> None:
    """Whether a comparison may go there: nothing is there yet, or one that is to be gone on with. Raises UserError."""
    try:
        if directory.is_dir() and any(directory.iterdir()):
            if not (directory / _ABOUT).exists():
                raise UserError(f"{directory} holds something else than a comparison; give a new directory with --out")
            if not resume:
                raise UserError(f"{directory} holds a comparison; go on with it by --resume, or give a new --out")
        elif directory.exists() and not directory.is_dir():
            raise UserError(f"{directory} is a file; give a new directory with --out")
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; give another directory with --out") from None
    check_writable(directory, directory)


def chosen_arms(settings: CompareConfig, words: str | None) -> tuple[str, ...]:
    """The arms to run, in the order of the report: all, or those named (`attacks`: the whole table of them); alone
    always, what all others are compared with. Raises UserError for a name that is no arm's."""
    known = [*BASELINES, *settings.federated]
    if words is None:
        return tuple(known)
    table = list(settings.attacks.arms()) if settings.attacks else []
    wanted = [name for word in words.split(",") for name in (table if word.strip() == _TABLE else [word.strip()])]
    for word in wanted:
        if word not in known:
            raise UserError(f"--arms: there is no arm {word!r}; {suggestion(word, known)}")
    return tuple(arm for arm in known if arm in wanted or arm == ALONE)


def encoder_type_of(config: Config) -> str:
    """That of encoder.get, or the one that all nodes have samples of. Raises UserError."""
    if not config.nodes:
        raise UserError("a comparison needs nodes: give --config FILE with sections [nodes.NAME]")
    if config.encoder.get is not None:
        return config.encoder.get
    kinds = {corpus.type for node in config.nodes.values() for corpus in node.corpus}
    if len(kinds) != 1:
        named = ", ".join(sorted(kinds)) or "none"
        raise UserError(f"the nodes' corpora are of several types ({named}); say which with get in the section encoder")
    return kinds.pop()


def read_corpora(config: Config, encoder_type: str, file: Path | None) -> dict[str, Corpus]:
    """Each node's corpus of the type. Raises UserError for what is missing in one."""
    found = {}
    for name, node in config.nodes.items():
        check_node_id(name)
        corpus = load_corpora(name, node, file).get(encoder_type)
        if corpus is None:
            raise UserError(f"node {name!r} has no samples of type {encoder_type}; add a corpus, or leave the node out")
        if len(corpus.test) == 0:
            raise UserError(f"node {name!r} holds no samples out; set test_path, or held_out above 0")
        if len(corpus.train) < 2:
            raise UserError(f"node {name!r} has {len(corpus.train)} training sample; a validation part needs two")
        found[name] = corpus
    return found


def comparison_of(
    config: Config,
    settings: CompareConfig,
    encoder_type: str,
    arms: Sequence[str],
    corpora: Mapping[str, Corpus],
) -> Comparison:
    """Everything that cells depend on, from the configuration. An agreed vocabulary is made here, of words of the
    nodes that would contribute some. Raises UserError for what does not go together."""
    from common.encoders import get_encoder_type, words
    from deploy.compare.held_out import fingerprint
    from deploy.compare.plan import Comparison
    from deploy.compare.training import agreed_words

    if encoder_type != "text" and any(each.attack == "foreign" for each in settings.federated.values()):
        raise UserError("compare.attacks: the attack foreign exchanges letters; leave it out where samples have none")
    unknown = [name for name in settings.speeds if name not in corpora]
    if unknown:
        raise UserError(f"compare.speeds: there is no node {unknown[0]!r}; {suggestion(unknown[0], corpora)}")
    encoder, kind = config.encoder, get_encoder_type(encoder_type)
    if encoder.generation == "continue":
        if encoder.source is None:
            raise UserError("generation 'continue' needs encoder.source: the directory of an exported encoder")
        architecture = kind.architecture_of(encoder.source, encoder.architecture)[0]
    else:
        architecture = kind.architecture(encoder.architecture)
    private = {name: config.nodes[owner(name, settings.cut)].private for name in corpora}
    named = sources(config.settings())
    try:
        completed, assets = kind.assets(architecture, named)
    except WordsNeeded:
        seeds = [encoder.seed + index for index in range(settings.seeds)]
        counts = agreed_words(corpora, private, settings.validation, seeds)
        completed, assets = kind.assets(architecture, {**named, words.SOURCE: words.written(counts)})
    return Comparison(
        settings=settings,
        encoder_type=encoder_type,
        architecture=completed,
        assets=assets,
        initial=(encoder.generation, str(encoder.source) if encoder.source else None),
        overrides=encoder.architecture,
        base_seed=encoder.seed,
        update=config.update,
        federated={
            name: federated_arm(config, settings, name, arm, len(corpora))
            for name, arm in settings.federated.items()
            if name in arms
        },
        arms=tuple(arms),
        private=private,
        fingerprints={name: fingerprint(corpus.train) for name, corpus in corpora.items()},
    )


def federated_arm(config: Config, settings: CompareConfig, name: str, arm: ArmConfig, nodes: int) -> FederatedArm:
    """The rules of an arm of so many nodes: those of the sections rule and update, with what it changes. Raises
    UserError."""
    from deploy.compare.plan import FederatedArm

    where = f"compare.arms.{name}"
    changes = {section: getattr(arm, section) for section in ("weights", "buffer", "outer", "guards", "combine")}
    base: dict[str, Any] = {} if arm.rule else config.rule.model_dump(exclude={"preset"})
    merged = {section: {**base.get(section, {}), **values} for section, values in changes.items()}
    try:
        rule = aggregation_rule(arm.rule or config.rule.preset, merged)
    except ValidationError as error:
        raise explained(error, AggregationRule, where) from None
    plain = config.update.model_dump()
    # bounds replace one another, so `when` is taken as a whole; the inner optimiser's numbers stand for themselves
    plain |= {**arm.update, "inner": {**plain["inner"], **arm.update.get("inner", {})}}
    try:
        update = UpdateRule.model_validate(plain)
    except ValidationError as error:
        raise explained(error, UpdateRule, f"{where}.update") from None
    hostile = arm.hostile if arm.attack else 0
    check_nodes(rule, nodes + hostile, f"{where} has")
    return FederatedArm(rule, update, arm.finish_shares or settings.finish_shares, arm.attack, hostile)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    import json

    write_durably(path, json.dumps(content, indent=1).encode() + b"\n")
