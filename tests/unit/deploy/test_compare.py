"""`compare`: the same start for every arm, choices that the test part has no part in, cells that are whole, and the
command from its file to its report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from common.encoders import get_encoder_type
from common.errors import UserError
from common.wire.update_rule import InnerOptimizer, ReturnWhen, UpdateRule
from deploy.compare.bench import Bench
from deploy.compare.cells import Cells
from deploy.compare.cut import dealt, owner
from deploy.compare.plan import FINISHED, VERSION, WITHOUT, Cell, Comparison, FederatedArm, Point
from deploy.compare.pool import OneProcess, Task, pool
from deploy.compare.run import Outcome, run
from deploy.compare.training import Pace, agreed_words, best_of, parts
from deploy.compare_settings import BASELINES, CompareConfig
from master_service.decisions.rules.model import aggregation_rule
from node_service.corpus.corpus import Corpus
from tests.faults.tiny import ASSETS, samples
from tests.unit.deploy.conftest import Command

ROOT = Path(__file__).parents[3]
STEPS = 40


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "tests/faults/plugin"))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


class Watched(Sequence[Any]):
    """A test part that counts how often each of its samples is read for a model, and how often as a whole."""

    def __init__(self, inner: np.ndarray[Any, Any]) -> None:
        self.inner = inner
        self.read = np.zeros(len(inner), dtype=int)
        self.passes = 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: Any) -> Any:
        self.read[index] += 1
        return self.inner[index]

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.inner)


def corpora() -> dict[str, Corpus]:
    return {
        name: Corpus("tiny", samples(seed, 80), None, Watched(samples(seed + 100, 20)), None)
        for seed, name in enumerate(("a", "b", "c"))
    }


def comparison(**settings: Any) -> Comparison:
    kind = get_encoder_type("tiny")
    inner = InnerOptimizer(warmup_steps=5, batch_size=8)
    update = UpdateRule(when=ReturnWhen(steps=5), inner=inner)
    given: dict[str, Any] = {
        "steps": STEPS,
        "seeds": 2,
        "learning_rates": (0.01, 0.05),
        "weight_decays": (0.01,),
        "look_every": 10,
        "look_windows": 32,
        "validation": 0.2,
        **settings,
    }
    return Comparison(
        settings=CompareConfig(**given),
        encoder_type="tiny",
        architecture=kind.architecture({}),
        assets=dict(ASSETS),
        initial=("fresh", None),
        overrides={},
        base_seed=5,
        update=update,
        federated={"shared": FederatedArm(aggregation_rule("fedbuff"), update, (0.25,))},
        arms=(*BASELINES, "shared"),
        private={name: {} for name in ("a", "b", "c")},
        fingerprints={name: name for name in ("a", "b", "c")},
    )


class Run:
    """A comparison in this process, and what was said while it ran."""

    def __init__(self, directory: Path, plan: Comparison | None = None) -> None:
        self.said: list[tuple[Task, Cell, bool]] = []
        self.corpora = corpora()
        self.cells = Cells(directory)
        self.bench = Bench(plan or comparison(), self.corpora, self.cells, self.on_step)
        self.steps_left = math.inf
        #: Reads of test parts, at every cell that was done.
        self.reads: list[tuple[Task, int]] = []

    def on_step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise KeyboardInterrupt

    def on_cell(self, task: Task, cell: Cell, kept: bool) -> None:
        self.said.append((task, cell, kept))
        self.reads.append((task, sum(each.passes + int(each.read.sum()) for each in self.tests)))

    @property
    def tests(self) -> list[Watched]:
        return [corpus.test for corpus in self.corpora.values() if isinstance(corpus.test, Watched)]

    def __call__(self) -> Outcome:
        return run(self.bench, self.cells, OneProcess(self.bench), self.on_cell)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Outcome]]:
    """One whole comparison, for the tests that look at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests/faults/plugin"))
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
        found = Run(tmp_path_factory.mktemp("compare"))
        yield found, found()
        structlog.reset_defaults()


def without_times(outcome: Outcome) -> dict[str, Any]:
    facts = {name: {key: each[key] for key in each if key != "seconds"} for name, each in outcome.facts.items()}
    return {"choices": outcome.choices, "columns": outcome.columns, "facts": facts}


# --- honesty ---------------------------------------------------------------------------------------------------------


def test_nothing_reads_the_test_part_before_all_choices_and_then_each_model_reads_it_once(
    done: tuple[Run, Outcome],
) -> None:
    found, _ = done
    trained = [reads for task, reads in found.reads if task == "train"]
    assert len(trained) == 20 and set(trained) == {0}
    assert [task for task, _, _ in found.said] == sorted((task for task, _, _ in found.said), reverse=True), (
        "every training comes before every test"
    )
    models = 2 * (4 + 3)  # two seeds of random, alone, pooled twice, and three views of the federated arm
    for test in found.tests:
        assert set(test.read) == {models}, "each sample once for each model"
        assert test.passes == 1, "for the digest"


def test_every_arm_begins_with_the_same_model_samples_and_masks(done: tuple[Run, Outcome]) -> None:
    """The look before the first step is that of the random arm; in the pooled arms, its mean."""
    bench = done[0].bench
    for seed in bench.comparison.seeds:
        random = bench.trained(Cell("random", None, seed, None))
        assert random is not None
        for domain in ("a", "b", "c"):
            alone = next(
                found
                for point in bench.comparison.points("alone")
                if (found := bench.trained(Cell("alone", domain, seed, point))) is not None
            )
            assert alone.looks[domain][0] == (0, random.validation["random"][domain])
        pooled = bench.trained(Cell("pooled", None, 5, Point(0.01, 0.01)))
    assert pooled is not None
    first = bench.trained(Cell("random", None, 5, None))
    assert first is not None
    assert pooled.looks["mean"][0][1] == pytest.approx(fmean(first.validation["random"].values()))


def test_every_arm_takes_the_same_steps_finishing_included(done: tuple[Run, Outcome]) -> None:
    for name, facts in done[1].facts.items():
        if name.startswith("pooled"):
            assert facts["steps"] == (3 * STEPS if name.startswith("pooled-all") else STEPS) and facts["one_model"]
        elif not name.startswith("random"):
            assert set(facts["steps"].values()) == {STEPS}, name
        if name.startswith("shared"):
            assert set(facts["steps_together"].values()) == {STEPS * 3 // 4}
            assert facts["updates"] >= 3 * (STEPS * 3 // 4) // 5 - 3, "nearly all that was trained was counted"


def test_the_choice_is_the_least_validation_loss_for_each_domain_alone_and_for_all_together(
    done: tuple[Run, Outcome],
) -> None:
    _, outcome = done
    assert [(each["arm"], each["domain"]) for each in outcome.choices] == [
        ("alone", "a"),
        ("alone", "b"),
        ("alone", "c"),
        ("pooled", None),
        ("pooled-all", None),
        ("shared", None),
    ]
    for choice in outcome.choices:
        assert len({point["validation"] for point in choice["grid"]}) == 2, "the rate reaches the training of every arm"
        best = min(choice["grid"], key=lambda point: point["validation"])
        assert {key: choice[key] for key in ("lr", "weight_decay", "finish_share")} == {
            key: best[key] for key in ("lr", "weight_decay", "finish_share")
        }


def test_a_point_that_diverged_is_not_chosen() -> None:
    plan = comparison()
    losses = {0.01: math.nan, 0.05: 9.0}
    choices = plan.choose(lambda cell: losses[cell.point.lr] if cell.point else 0.0)
    assert {point.lr for point in choices.values()} == {0.05}


def test_finishing_is_never_worse_than_what_it_began_with_by_the_validation_part(done: tuple[Run, Outcome]) -> None:
    found, _ = done
    tried = [cell for task, cell, _ in found.said if task == "train" and cell.arm == "shared"]
    assert len(tried) == 3
    for cell in tried:
        result = found.bench.trained(cell)
        assert result is not None
        for domain, loss in result.validation[FINISHED].items():
            assert loss <= result.validation[VERSION][domain]
            assert result.models[WITHOUT][domain].shared_only


def test_the_best_moment_is_kept_and_one_that_is_not_finite_never_is() -> None:
    at = [0]
    losses = {0: 5.0, 2: 3.0, 4: math.nan, 5: 4.0}
    best = best_of(
        lambda step: at.__setitem__(0, step + 1),
        lambda: losses[at[0]],
        lambda: {"": {"step": torch.tensor(at[0])}},
        Pace(steps=5, look_every=2),
    )
    assert (best.step, best.loss, int(best.state[""]["step"])) == (2, 3.0, 2)
    assert [step for step, _ in best.looks] == [0, 2, 4, 5]


# --- cells -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers_bit_for_bit_in_processes_of_their_own(
    done: tuple[Run, Outcome], tmp_path: Path
) -> None:
    found = done[0]
    plain = {name: replace(each, test=np.asarray(list(each.test))) for name, each in corpora().items()}
    cells = Cells(tmp_path)
    bench = Bench(found.bench.comparison, plain, cells)
    arms = ("alone", "pooled", "shared")
    wanted = [cell for task, cell, _ in found.said if task == "test" and cell.seed == 5 and cell.arm in arms]
    with pool(2, bench, plain, tmp_path) as workers:
        assert set(workers.do("train", wanted)) == set(workers.do("test", wanted)) == set(wanted)
    for cell in wanted:
        here, there = found.bench.trained(cell), bench.trained(cell)
        assert here is not None and there is not None
        assert (here.validation, here.looks, here.models) == (there.validation, there.looks, there.models)
        states = found.cells.states(cell.name), cells.states(cell.name)
        assert states[0].keys() == states[1].keys()
        for key, state in states[1].items():
            assert all(torch.equal(states[0][key][name], tensor) for name, tensor in state.items())
        tests = found.cells.read_test(cell.name, found.bench.test_digest(cell))
        again = cells.read_test(cell.name, bench.test_digest(cell))
        assert tests is not None and again is not None
        for view, by_domain in tests.items():
            for domain, losses in by_domain.items():
                assert np.array_equal(losses.sums, again[view][domain].sums)


def test_a_run_that_is_interrupted_leaves_whole_cells_and_the_next_one_goes_on(
    done: tuple[Run, Outcome], tmp_path: Path
) -> None:
    first = Run(tmp_path)
    first.steps_left = 5.5 * STEPS
    with pytest.raises(KeyboardInterrupt):
        first()
    whole = {cell for _, cell, _ in first.said}
    assert whole and {path.stem for path in (tmp_path / "cells").glob("*.json")} == {cell.name for cell in whole}
    again = Run(tmp_path)
    outcome = again()
    assert {cell for _, cell, kept in again.said if kept} == whole
    assert without_times(outcome) == without_times(done[1])


def test_a_cell_is_computed_anew_only_where_something_that_it_depends_on_changed() -> None:
    plan = comparison()
    alone, shared = Cell("alone", "a", 5, Point(0.01, 0.01)), Cell("shared", None, 5, Point(0.01, 0.01, 0.25))

    def changed(other: Comparison) -> tuple[bool, bool]:
        return plan.digest(alone) != other.digest(alone), plan.digest(shared) != other.digest(shared)

    assert changed(comparison()) == (False, False)
    assert changed(comparison(seeds=3, learning_rates=(0.01, 0.1))) == (False, False), "more cells, not other ones"
    assert changed(comparison(steps=50)) == (True, True)
    assert changed(comparison(link=1e6)) == (False, True)
    assert changed(replace(plan, fingerprints={**plan.fingerprints, "b": "other"})) == (False, True)
    arm = replace(plan.federated["shared"], rule=aggregation_rule("fedasync"))
    assert changed(replace(plan, federated={"shared": arm})) == (False, True)


def test_unequal_speeds_share_the_steps_out_and_every_arm_has_the_same_time(tmp_path: Path) -> None:
    """The fast node takes four times the steps of the slow ones in every arm; in a cohort it waits."""
    plan = comparison(speeds={"a": 4.0, "b": 1.0, "c": 1.0}, seeds=1)
    assert [plan.steps(name) for name in ("a", "b", "c")] == [80, 20, 20]
    found = Run(tmp_path, plan)
    for preset, takes_all in (("fedbuff", True), ("fedavg", False)):
        arm = replace(plan.federated["shared"], rule=aggregation_rule(preset))
        bench = Bench(replace(plan, federated={"shared": arm}), found.corpora, found.cells)
        cell = Cell("shared", None, 5, Point(0.05, 0.01, 0.25))
        bench.train(cell)
        result = bench.trained(cell)
        assert result is not None
        together = result.facts["steps_together"]
        assert (together["a"] == 60) == takes_all and together["a"] <= 60
        assert together["b"] == together["c"] == 15
        assert result.facts["virtual_seconds"] == pytest.approx(17, abs=0.5)


def test_a_comparison_that_continues_begins_with_the_encoder_that_is_named(tmp_path: Path) -> None:
    kind = get_encoder_type("tiny")
    source = tmp_path / "source"
    source.mkdir()
    tensors = kind.initial({"width": 8}, seed=77)
    kind.export_shared(source, {"width": 8}, tensors, "", {})
    bench = Bench(replace(comparison(), initial=("continue", str(source))), corpora(), Cells(tmp_path))
    shared = bench.model("a", 5).shared_parameters()
    assert all(torch.equal(shared[name], tensor) for name, tensor in tensors.items())


# --- the command -----------------------------------------------------------------------------------------------------

CONFIG = """
[encoder]
get = "tiny"
[update]
when = { steps = 5 }
inner = { warmup_steps = 2, batch_size = 8 }
[compare]
steps = 20
learning_rates = [0.01, 0.05]
weight_decays = [0.01]
look_every = 5
look_windows = 16
[compare.arms.buffered]
rule = "fedbuff"
[compare.arms.cohorts]
rule = "fedavg"
outer = { lr = 0.5 }
update = { when = { steps = 4 } }
finish_shares = [0.5]
[nodes.a]
corpus = { type = "tiny", entry_point = "domains:a" }
[nodes.b]
corpus = { type = "tiny", entry_point = "domains:b" }
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    module = f"domains_{tmp_path.name}"  # a module of this name may be loaded only once in a process
    (tmp_path / f"{module}.py").write_text(
        "from tests.faults.tiny import samples\n\n\ndef a():\n    return samples(0, 120)\n\n\n"
        "def b():\n    return samples(1, 120)\n"
    )
    file = tmp_path / "run.toml"
    file.write_text(CONFIG.replace("domains:", f"{module}:"))
    return file


def test_the_command_from_a_file_to_its_report(command: Command, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("compare", "--config", config, "--out", out, "--jobs", 1, "--seeds", 2, "--arms", "buffered,cohorts")
    code, printed, err = command(*arguments)
    assert code == 0, err
    assert "cells" in err and "about" in err and "left" in err
    assert "buffered, without private parts" in printed and "chosen by the validation part" in printed
    report = json.loads((out / "report.json").read_text())
    assert set(report) >= {"command", "versions", "comparison", "choices", "columns", "cells"}
    assert report["comparison"]["arms"]["cohorts"]["update"]["when"]["steps"] == 4
    assert report["comparison"]["arms"]["cohorts"]["rule"]["outer"]["lr"] == 0.5
    assert set(report["columns"]["buffered"]["domains"]) == {"a", "b"}
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
    assert (out / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    code, _, err = command(*arguments)
    assert code == 2 and "--resume" in err
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    code, _, err = command(*arguments, "--resume")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({}, ("--arms", "bufered"), "did you mean 'buffered'?"),
        ({"steps = 20": "stesp = 20"}, (), "did you mean 'steps'?"),
        ({'"fedbuff"': '"fedbuf"'}, (), "no aggregation rule 'fedbuf'"),
        ({"arms.buffered": "arms.alone"}, (), "that name is a baseline's"),
        ({"update = { when": "update = { inner = { lr = 1.0 }, when"}, (), "the same for every arm"),
        ({"look_every": "speeds = { x = 2.0 }\nlook_every"}, (), "there is no node 'x'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    command: Command, config: Path, tmp_path: Path, change: Mapping[str, str], arguments: Sequence[str], said: str
) -> None:
    text = config.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    code, _, err = command("compare", "--config", config, "--out", tmp_path / "out", *arguments)
    assert code == 2 and said in err.splitlines()[-1], err
    assert not (tmp_path / "out" / "cells").exists()


def test_a_folder_of_something_else_is_left_alone(command: Command, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    code, _, err = command("compare", "--config", config, "--out", tmp_path / "out", "--resume")
    assert code == 2 and "something else" in err


def test_samples_that_are_dealt_out_are_all_there_once_and_measured_by_the_same() -> None:
    labels = [str(row) for row in range(10)]
    whole = {name: Corpus("text", list(labels), list(labels), ["test"], ["a"], ["look"]) for name in ("one", "two-x")}
    found = dealt(whole, 3)
    assert {owner(name, 3) for name in found} == set(whole) and len(found) == 6
    for name in whole:
        parts = [corpus for each, corpus in found.items() if owner(each, 3) == name]
        assert sorted(text for part in parts for text in part.train) == labels
        assert {len(part.train) for part in parts} == {3, 4}
        assert all(part.train_labels == part.train and part.test == ["test"] for part in parts)
        assert all(part.validation == ["look"] for part in parts)
    with pytest.raises(UserError, match=r"compare\.cut 6: node 'one' has 10 training samples, too few; lower it"):
        dealt(whole, 6)


def test_ctrl_c_ends_a_comparison_and_its_processes_however_often_it_comes(config: Path, tmp_path: Path) -> None:
    """A terminal, or `timeout`, sends it to all of them, and people press it twice."""
    config.write_text(config.read_text().replace("steps = 20", "steps = 100000"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "deploy.cli", "compare", "--config", config, "--out", out, "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/faults/plugin"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        until = time.monotonic() + 60
        while len(workers := children(process.pid)) < 3 or not all(map(ignores_ctrl_c, workers)):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        time.sleep(1)  # they are at work
        for _ in range(3):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.01)
        assert process.wait(30) == 1 and "--resume goes on from there" in process.stderr.read()
        while any(map(ignores_ctrl_c, workers)):  # one that is gone does not
            assert time.monotonic() < until + 30
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def children(parent: int) -> list[str]:
    """Two workers of a pool, and the tracker of what they share."""
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()


def ignores_ctrl_c(process: str) -> bool:
    """As a worker does once it is there."""
    with suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return bool(
            int(next(line.split()[1] for line in lines if line.startswith("SigIgn")), 16) & 1 << signal.SIGINT - 1
        )
    return False


# --- an agreed vocabulary --------------------------------------------------------------------------------------------

AGREED = """
[encoder]
get = "text"
[encoder.architecture]
vocabulary = "agreed"
entries = 280
hidden_size = 16
intermediate_size = 16
num_attention_heads = 2
num_hidden_layers = 1
sequence_length = 8
[update]
when = { steps = 2 }
inner = { warmup_steps = 1, batch_size = 4 }
[compare]
steps = 4
seeds = 1
learning_rates = [0.01]
weight_decays = [0.01]
finish_shares = [0.5]
look_every = 2
look_windows = 4
validation = 0.2
"""
NODE = """
[nodes.{name}]
corpus = {{ path = "{folder}/{name}.txt", test_path = "{folder}/test.txt", documents = "line", validation = 0 }}
private = {{ contribute_words = {contributes}, min_documents = {least} }}
"""


def agreed_config(folder: Path, contributes: Sequence[bool], least: int = 3) -> Path:
    """Nodes of thirty documents each, whose words say whose they are, and a test part that has a word of its own."""
    (folder / "test.txt").write_text("\n".join(f"heldout common fever of test {number}" for number in range(9)))
    nodes = ""
    for name, yes in zip("abc", contributes, strict=False):
        lines = [f"common fever {name * 5} only{name} {chr(97 + n % 26) * 4}{chr(97 + n // 26) * 4}" for n in range(30)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
        nodes += NODE.format(folder=folder, name=name, contributes=str(yes).lower(), least=least)
    file = folder / "agreed.toml"
    file.write_text(AGREED + nodes)
    return file


def test_an_agreed_vocabulary_is_of_the_training_parts_of_who_contributes_and_every_row_says_so(
    command: Command, tmp_path: Path
) -> None:
    file, out = agreed_config(tmp_path, (True, False)), tmp_path / "out"
    code, printed, err = command("compare", "--config", file, "--out", out, "--jobs", 1, "--arms", "pooled")
    assert code == 0, err
    page = (out / "report.html").read_text()
    for row in ("pooled", "alone"):
        assert f"{row} (agreed vocabulary)" in printed and f">{row} (agreed vocabulary)<" in page
    assert "no text of a validation or test part" in page
    report = json.loads((out / "report.json").read_text())
    assert report["comparison"]["architecture"]["vocab_size"] > 259 and report["comparison"]["assets"]


def test_words_of_validation_and_test_parts_are_not_in_it(tmp_path: Path) -> None:
    own = [f"common {chr(97 + n) * 4}" for n in range(20)]
    corpus = Corpus("text", own, None, ["common heldout"] * 9, None)
    seeds, private = (5, 6, 7), {"a": {"contribute_words": True, "min_documents": 2}, "b": {}}
    set_aside = {text for seed in seeds for text in parts(corpus, 0.2, seed).validation}
    assert 4 < len(set_aside) < 12
    found = agreed_words({"a": corpus, "b": corpus}, private, 0.2, seeds)
    assert found == {"common": 20 - len(set_aside)}, "of the one that contributes, and no seed's validation part"


def test_where_no_node_contributes_it_is_refused_in_one_line(command: Command, tmp_path: Path) -> None:
    code, _, err = command("compare", "--config", agreed_config(tmp_path, (False, False)), "--out", tmp_path / "out")
    assert code == 2 and "private.contribute_words = true" in err.splitlines()[-1]
