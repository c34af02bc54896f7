"""`simulate`: the same seed gives the same log, a replay proves it, and time, speeds, lines and kills are as said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import ByteSize

from common.locks import DirectoryLock
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt
from common.wire.update_rule import UpdateRule
from deploy.simulation.plan import Plan, fates
from deploy.simulation.report import summary
from deploy.simulation.simulation import Simulation
from master_service.decisions.records import Leave, Started
from master_service.decisions.rules.model import aggregation_rule
from master_service.history.audit import audit
from master_service.history.replay import origin, verify
from master_service.log.message_log import MessageLog, open_log
from tests.unit.deploy.conftest import Command

#: Everything that can happen, in a run of about a second.
STORM: dict[str, Any] = {
    "nodes": 12,
    "returns": 8,
    "speeds": (1, 2, 4, 8),
    "steps": 5,
    "late": 0.25,
    "leave": 0.25,
    "crash": 0.25,
    "crash_master": True,
    "seed": 3,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


def simulated(directory: Path, **arguments: Any) -> Simulation:
    directory.mkdir()
    run = Simulation(Plan(**arguments), directory)
    run.run()
    return run


def logged(directory: Path) -> MessageLog:
    return open_log(directory, read_only=True)


def figures(run: Simulation, directory: Path) -> dict[str, Any]:
    with closing(logged(directory)) as log:
        return summary(run, log)


# --- the same seed ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_log_and_figures_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        figures(simulated(tmp_path / name, **{**STORM, "seed": seed}), tmp_path / name)
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert first["ledger"]["checksum"] != other["ledger"]["checksum"]
    assert first["master_killed"] == 1 and first["killed"] >= 1 and first["left"] >= 1


def test_a_seed_decides_who_comes_late_leaves_and_is_killed() -> None:
    plan = Plan(**STORM)
    found = fates(plan)
    assert found == fates(plan) != fates(plan.model_copy(update={"seed": 4}))
    absences = Counter(fate.absence.killed for fate in found if fate.absence is not None)
    assert sum(fate.joins > 0 for fate in found) == 3 and absences == {False: 3, True: 3}
    everybody = fates(plan.model_copy(update={"late": 1.0}))
    assert sum(fate.joins > 0 for fate in everybody) == 11, "one begins"


# --- the log proves itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["return-count", "fedasync", "fedbuff", "fedavg", "diloco"])
def test_every_version_of_a_simulation_is_replayed_bit_for_bit(tmp_path: Path, preset: str) -> None:
    plan = {**STORM, "rule": aggregation_rule(preset), "returns": 4}
    run = simulated(tmp_path / "out", **plan)
    with closing(logged(tmp_path / "out")) as log:
        checks = [check for _, check in verify(log, origin(log).fold) if check is not None]
    assert run.master.result is not None and run.master.result.updates >= 48 and not run.given_up
    assert [check.version for check in checks] == list(range(run.master.result.version + 1))
    assert all(check.identical for check in checks)


def test_the_command_writes_what_replay_proves_and_replaces_an_earlier_simulation(
    command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("--nodes", 4, "--returns", 3, "--speeds", "1,4", "--crash-master", "--out", out)
    code, printed, err = command("simulate", *arguments, "--set", "outer.lr=0.5", "--set", "update.encoding=float32")
    assert code == 0 and "12 counted" in printed, err
    report = json.loads((out / "report.json").read_text())
    assert report["updates"] == 12 and report["simulation"]["rule"]["outer"]["lr"] == 0.5
    code, printed, err = command("replay", "--state", out)
    assert code == 0 and f"{report['versions'] + 1}" in printed and "none" in printed, err
    # again, with less to do: nothing of the first is left
    (out / "notes.txt").write_text("mine")
    code, printed, err = command("simulate", *arguments[:2], "--returns", 2, "--out", out)
    assert code == 0 and json.loads((out / "report.json").read_text())["updates"] == 8, err
    with closing(logged(out)) as log:
        assert log.payloads.stored() == {row.payload for row in log.rows() if row.payload}
    assert (out / "notes.txt").read_text() == "mine"


def test_it_writes_over_nothing_that_is_no_simulation(command: Command, tmp_path: Path) -> None:
    state = tmp_path / "master-state"
    state.mkdir()
    (state / "ledger.sqlite").write_bytes(b"real")
    code, _, err = command("simulate", "--nodes", 1, "--returns", 1, "--out", state)
    assert (code, err.count("\n")) == (2, 1) and f"{state} holds something else than a simulation" in err
    assert (state / "ledger.sqlite").read_bytes() == b"real"
    (file := tmp_path / "file").touch()
    code, _, err = command("simulate", "--nodes", 1, "--returns", 1, "--out", file)
    assert code == 2 and f"{file} is a file" in err


def test_a_directory_in_which_a_simulation_runs_is_left_to_it(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with closing(DirectoryLock(out)):
        (out / "report.json").write_text('{"simulation": {}}')
        code, _, err = command("simulate", "--nodes", 1, "--returns", 1, "--out", out)
    last = err.splitlines()[-1]
    assert code == 2 and f"{out} is in use by process" in last and "another directory with --out" in last
    assert (out / "report.json").read_text() == '{"simulation": {}}'


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nodes", 0), "nodes: input should be greater than or equal to 1"),
        (("--speeds", "1;2"), "--speeds 1;2: write numbers with commas between them"),
        (("--speeds", "0"), "speeds.0: input should be greater than 0"),
        (("--link", "fast"), "link: "),
        (("--late", 2), "late: input should be less than or equal to 1"),
        (("--rule", "best"), "no aggregation rule 'best'"),
        (("--set", "outer.speed=1"), "there is no setting 'outer.speed'"),
        (("--set", "update.encoding=int2"), "--set update: encoding: "),
    ],
)
def test_what_is_wrong_is_one_line(command: Command, tmp_path: Path, arguments: tuple[object, ...], words: str) -> None:
    code, _, err = command("simulate", *arguments, "--out", tmp_path / "out")
    assert code == 2 and words in err.splitlines()[-1], err
    assert not (tmp_path / "out").exists()


# --- nothing is lost or doubled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_update_that_was_handed_in_is_counted_once_or_refused_with_a_reason(tmp_path: Path, seed: int) -> None:
    """By the nodes' receipt books, by the log, and by the fold of the log; whoever was killed meanwhile."""
    run = simulated(tmp_path / "out", **{**STORM, "seed": seed})
    receipts = [receipt for node in run.nodes for receipt in node.receipts()]
    assert sum(node.owed() for node in run.nodes) == 0, "every update has its answer"
    assert len({(each.incarnation, each.sequence) for each in receipts}) == len(receipts)
    for node in run.nodes:
        numbers = sorted(receipt.sequence for receipt in node.receipts())
        assert numbers == list(range(len(numbers))), "no number is skipped: nothing that was handed in is lost"
    counted = [receipt for receipt in receipts if receipt.accepted]
    assert all(receipt.reason for receipt in receipts if not receipt.accepted)
    encoder = run.master.result
    assert encoder is not None and encoder.updates == len(counted) >= 96
    assert Counter(receipt.node for receipt in counted) == {
        name: member.returns for name, member in encoder.members.items() if member.returns
    }
    with closing(logged(tmp_path / "out")) as log:
        assert not audit(log, receipts).unproven
        bodies = [body for body in log.bodies("update") if isinstance(body, UpdateManifest)]
        handed_in = {(body.incarnation, body.sequence) for body in bodies}
        assert {(each.incarnation, each.sequence) for each in counted} <= handed_in
        steps = {(body.incarnation, body.sequence): body.steps for body in bodies}
        assert sum(steps[each.incarnation, each.sequence] for each in counted) == sum(
            member.steps for member in encoder.members.values()
        )
        assert len(log.bodies("started")) == 2 and isinstance(log.bodies("started")[1], Started)
        assert len([body for body in log.bodies("request.leave") if isinstance(body, Leave)]) == 3


def test_a_killed_node_comes_back_as_the_same(tmp_path: Path) -> None:
    run = simulated(tmp_path / "out", nodes=4, returns=10, speeds=(2,), crash=1.0, seed=2)
    assert sum(node.killed for node in run.nodes) == 4
    for node in run.nodes:
        receipts = node.receipts()
        assert len({receipt.incarnation for receipt in receipts}) == 1 and len(receipts) > 3


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_node_returns_as_often_as_it_is_fast(tmp_path: Path) -> None:
    """Under a rule that waits for nobody."""
    rule = aggregation_rule("fedasync", {"guards": {"norm_clip": None}})  # else the first waits for the second's
    run = simulated(tmp_path / "out", nodes=2, returns=40, speeds=(1, 16), rule=rule)
    slow, fast = (sum(receipt.accepted for receipt in node.receipts()) for node in run.nodes)
    assert 13 <= fast / slow <= 20
    # 80 updates of 10 steps, 17 steps a second together
    assert run.ended_at == pytest.approx(80 * 10 / 17, rel=0.1)


def staleness(receipts: list[Receipt]) -> float:
    counted = [receipt.staleness for receipt in receipts if receipt.accepted]
    return sum(counted) / len(counted)


def test_a_slow_line_makes_updates_stale(tmp_path: Path) -> None:
    """Updates of 1,088 bytes and versions of 2 KiB take seconds on it."""
    mean = {}
    for link in (10_000_000, 500):
        name = tmp_path / f"link-{link}"
        plan = {"nodes": 4, "returns": 12, "speeds": (2, 4), "parameters": 1024, "rule": aggregation_rule("fedasync")}
        run = simulated(name, **plan, link=ByteSize(link))
        mean[link] = staleness([receipt for node in run.nodes for receipt in node.receipts()])
    assert mean[500] > 1.5 * mean[10_000_000]


def test_losses_fall_and_the_rule_says_how_updates_travel(tmp_path: Path) -> None:
    found = {}
    for encoding in ("int8", "int4", "float32"):
        rule = UpdateRule.model_validate({"encoding": encoding})
        run = simulated(tmp_path / encoding, nodes=4, returns=10, speeds=(4,), parameters=512, update=rule)
        report = figures(run, tmp_path / encoding)
        assert report["loss"]["last"] < 0.5 * report["loss"]["first"] and report["refused"].keys() <= {"finished"}
        with closing(logged(tmp_path / encoding)) as log:
            found[encoding] = {body.size for body in log.bodies("update") if isinstance(body, UpdateManifest)}
    assert found == {"int8": {512 + 2 * 4}, "int4": {256 + 4 * 4}, "float32": {4 * 512}}


def test_a_run_that_makes_no_headway_is_ended_and_says_so(command: Command, tmp_path: Path) -> None:
    """A line so slow that no version ever comes over it in the time that a node gives it."""
    code, _, err = command("simulate", "--nodes", 2, "--returns", 1, "--link", "1", "--out", tmp_path / "out")
    assert code == 2 and "the run was ended after 0 of 2 updates" in err.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["given_up"] is True


def test_a_node_that_is_back_before_its_goodbye_has_left_sends_the_rest_then(tmp_path: Path) -> None:
    """An update takes about as long over the line as the node is away."""
    slow = {"parameters": 1024, "link": ByteSize(160), "steps": 8}
    run = simulated(tmp_path / "out", nodes=4, returns=12, speeds=(1,), leave=1.0, **slow)
    assert sum(node.left for node in run.nodes) == 4 and not run.given_up
    for node in run.nodes:
        receipts = node.receipts()
        assert [receipt.sequence for receipt in receipts] == list(range(len(receipts))) and node.owed() == 0
        assert node.bytes_up > 1040 * len(receipts), "the bytes of all its processes are counted"


@pytest.mark.parametrize("how", ["median", "centered-clip"])
def test_a_robust_rule_is_simulated_replayed_and_refused_where_nodes_are_too_few(
    command: Command, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "out"
    arguments = ("simulate", "--returns", 4, "--steps", 3, "--set", f"combine.how={how}", "--out", out)
    code, _, told = command(*arguments, "--nodes", 4)
    assert code == 2 and f"'{how}' with liars = 1 needs 5 distinct nodes, and --nodes is 4" in told
    code, printed, told = command(*arguments, "--nodes", 6)
    assert code == 0, told
    code, printed, _ = command("replay", "--state", out)
    assert code == 0 and "identical" in printed
    assert command("log", "verify", "--state", out)[0] == 0
    code, printed, _ = command("replay", "--state", out, "--set", "combine.how=trimmed-mean")
    assert code == 0 and "updates counted" in printed
    code, _, told = command("replay", "--state", out, "--set", "combine.liars=2")
    assert code == 2 and "needs 7 distinct nodes, and there are in the log 6" in told
