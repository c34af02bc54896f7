"""Recorded logs of real runs, replayed on every run of the tests: today's code makes the same bits of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.wire.to_master import Leave
from common.wire.to_node import receipt_hash
from master_service.decisions.records import Configured, Started
from master_service.history.audit import audit, examine, issued, read_receipts
from master_service.history.replay import Refold, origin, verify
from master_service.log.jsonl import opened
from master_service.log.message_log import MessageLog
from shared_encoder import Log

FILES = sorted(Path(__file__).parent.glob("*.jsonl.gz"))


@pytest.fixture(params=FILES, ids=lambda path: path.name.removesuffix(".jsonl.gz"))
def file(request: pytest.FixtureRequest) -> Path:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def log(file: Path) -> Iterator[MessageLog]:
    with opened(file) as log:
        yield log


def test_every_version_comes_out_as_it_was_published(file: Path, message_log: Callable[[Path], Log]) -> None:
    """As whoever has recorded a log writes it."""
    replayed = message_log(file).replay()
    assert replayed.identical and not replayed.left_out and len(replayed.checks) > 5


def test_nothing_is_damaged(log: MessageLog) -> None:
    assert not examine(log).damage


@pytest.mark.parametrize("counterfactual", [False, True])
def test_decided_anew_by_the_same_rule_it_is_the_same_encoder(log: MessageLog, counterfactual: bool) -> None:
    published = origin(log).fold
    assert all(check is None or check.identical for _, check in verify(log, published))
    refold = Refold(log, (lambda settings: settings) if counterfactual else None)
    assert sum(1 for _ in refold.run()) == log.last_offset + 1
    for name, encoder in published.coordinator.state.encoders.items():
        again = refold.fold.coordinator.state.encoders[name]
        assert encoder.status == again.status == "finished"
        assert (again.version, again.digest, again.updates) == (encoder.version, encoder.digest, encoder.updates)
        assert {node: (each.returns, each.weight, each.refused) for node, each in again.members.items()} == {
            node: (each.returns, each.weight, each.refused) for node, each in encoder.members.items()
        }
        # that it was stopped by the replay stands in the receipts of a counterfactual
        # logs of old masters lack the norms that agreement follows from
        assert counterfactual or again.model_copy(update={"agreement": encoder.agreement}) == encoder
        assert refold.fold.arithmetic.targets[name].parameters.digest() == encoder.digest
    assert refold.uncounted == 0


def test_every_receipt_of_the_nodes_is_in_the_log_and_in_one_chain(file: Path, log: MessageLog) -> None:
    held = read_receipts(file.with_name(file.name.replace(".jsonl.gz", ".receipts.jsonl")))
    found = audit(log, held)
    assert len(held) > 20 and not found.unproven and not found.gaps
    state = origin(log).fold
    assert all(check is None or check.identical for _, check in verify(log, state))
    [encoder] = state.coordinator.state.encoders.values()
    for node, member in encoder.members.items():
        account = found.accounts[node, encoder.encoder]
        assert account.counted == member.returns and account.weight == pytest.approx(member.weight)
    before = ""
    for receipt in issued(log):
        if receipt.previous == before:
            before = receipt_hash(receipt)
        else:  # a duplicate is answered with the receipt that it had
            assert receipt in held
    assert before == encoder.last_receipt


def test_what_the_recorded_logs_cover() -> None:
    presets, types, starts, returned = set(), set(), [], False
    for path in FILES:
        with opened(path) as log:
            entries = list(log.entries())
        presets |= {entry.body.settings.rule.preset for entry in entries if isinstance(entry.body, Configured)}
        types.add(path.name.partition("-")[0])
        starts.append(sum(isinstance(entry.body, Started) for entry in entries))
        left = {entry.body.node: entry.offset for entry in reversed(entries) if isinstance(entry.body, Leave)}
        returned |= any(
            entry.body.kind == "request.join" and entry.offset > left.get(entry.body.node, entry.offset)
            for entry in entries
        )
    assert presets >= {"return-count", "diloco", "fedbuff"} and types == {"text", "image"}
    assert max(starts) >= 2 and returned


def test_the_bits_do_not_depend_on_the_processors_capability() -> None:
    """The plainest kernels that torch has must come to what the fastest of the recording machine came to."""
    code = (
        "import sys, pathlib, torch; from deploy.commands.replay import run_replay\n"
        "for path in sys.argv[1:]: run_replay(pathlib.Path(path), encoder=None, version=None, out=None, rule=None,"
        " changes=(), without=(), every=False)\n"
        "print(torch.backends.cpu.get_cpu_capability())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, FILES)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("DEFAULT")
