"""`log` and `replay` as a person types them: what they print, what they refuse, and their exit codes."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
import subprocess
from pathlib import Path

import pytest

from common.locks import DirectoryLock
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt
from deploy.counterfactual import changed_rule, parse_changes
from master_service.decisions.records import Loggable, Started, Versioned
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings
from master_service.history.replay import rebuild
from master_service.log.jsonl import export_log, opened
from master_service.log.payload_files import payload_path
from tests.unit.deploy.conftest import Command
from tests.unit.master.test_fold import Federation, snapshot
from tests.unit.master.test_replay import flip, rewritten, some_update, trained

RECORDED = Path(__file__).parents[2] / "logs"


# --- replay -----------------------------------------------------------------------------------------------------------


def test_replay_says_how_many_versions_are_identical(command: Command, run: Federation) -> None:
    code, out, err = command("replay", "--state", run.directory)
    assert code == 0, err
    row = next(line for line in out.splitlines() if run.encoder in line)
    count = str(run.state.version + 1)
    assert re.findall(r"[^│\s]+", row)[:5] == [run.encoder, count, count, "none", str(run.state.version)]
    assert run.state.digest[:32] in row and re.search(r"\d+ messages, [\d,]+ messages/s", out)
    code, out, _ = command("replay", "--state", run.directory, "--all")
    assert code == 0 and out.count(" identical\n") == run.state.version + 1


def test_replay_names_the_first_version_that_differs_and_why_that_may_be(command: Command, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "fedasync")

    def changed(body: Loggable) -> Loggable:
        if isinstance(body, Versioned) and body.version >= 3:
            return body.model_copy(update={"digest": f"{body.version}" * 64})
        if isinstance(body, Started):
            return body.model_copy(update={"fingerprint": {"torch": "0.1", "machine": "abacus"}})
        return body

    rewritten(run.log, tmp_path / "forged", changed)
    code, out, err = command("replay", "--state", tmp_path / "forged")
    assert code == 1 and "version 3 " in out and err.count("shared-encoder:") == 1
    assert f"version 3 of {run.encoder} is not what was published: {'3' * 64} in row" in err
    assert "torch 0.1 there" in err and "machine abacus there" in err and "Traceback" not in err


def test_damage_and_what_is_not_there_are_one_line(command: Command, run: Federation, tmp_path: Path) -> None:
    for arguments in (
        ["replay", "--state", tmp_path / "none"],
        ["log", "list", "--state", tmp_path / "none"],
        ["log", "repair", "--state", tmp_path / "none"],
        ["log", "prune", "--keep", "5MiB", "--state", tmp_path / "none"],
        ["export", "text-1", "--state", tmp_path / "none"],
    ):
        code, _, err = command(*arguments)
        assert code == 2 and "no message log in" in err and not (tmp_path / "none").exists()
    for arguments, words in {
        ("--rule", "fedprox"): "no aggregation rule 'fedprox'; there are: return-count",
        ("--set", "outer.lrr=2"): "there is no setting 'outer.lrr'; did you mean 'lr'?",
        ("--set", "outre.lr=2"): "there is no setting 'outre'; did you mean 'outer'?",
        ("--set", "outer.lr=-1"): "outer.lr: input should be greater than 0",
        ("--set", "outer"): "write it as section.key=value",
        ("--without", "z"): "no node 'z' is in the log; there are: a, b, c",
        ("--encoder", "text-1"): f"no encoder text-1 is in the log; there are: {run.encoder}",
        ("--version", "99", "--out", "x"): f"version 99 is not in the log: {run.encoder}'s newest is",
    }.items():
        code, _, err = command("replay", "--state", run.directory, *arguments)
        assert code == 2 and words in err.splitlines()[-1], err
    entry = some_update(run)
    flip(payload_path(run.log.directory / "payloads", str(entry.payload)))
    for arguments in ([], ["--rule", "fedasync"]):
        code, _, err = command("replay", "--state", run.directory, *arguments)
        assert code == 1 and str(entry.payload) in err.splitlines()[-1] and "Traceback" not in err


def test_another_rule_is_shown_next_to_what_was_published(command: Command, run: Federation) -> None:
    code, out, err = command("replay", "--state", run.directory, "--rule", "return-count")
    assert code == 0 and "‖new − published‖ / ‖published‖ = 0;" in out, err
    arguments = ["--without", "c", "--set", "outer.lr=0.5", "--set", "weights.count=none"]
    code, out, err = command("replay", "--state", run.directory, *arguments)
    returns = run.state.members["c"].returns
    assert code == 0 and f"{returns} → 0" in out and "= 0;" not in out, err
    assert "trained on what was really published" in " ".join(out.split())
    assert "with outer.lr=0.5, weights.count=none without c" in " ".join(out.split())


def test_changes_are_of_the_logged_rule_unless_a_preset_is_named() -> None:
    changes = parse_changes(["outer.lr=2", "weights.count=sqrt", "guards.norm_clip=null"])
    assert changes == {"outer": {"lr": 2}, "weights": {"count": "sqrt"}, "guards": {"norm_clip": None}}
    logged = Settings(rule=aggregation_rule("diloco"))
    rule = changed_rule(None, changes)(logged).rule
    assert (rule.outer.lr, rule.outer.momentum, rule.guards.norm_clip) == (2.0, 0.9, None)
    assert changed_rule("fedavg", changes)(logged).rule == aggregation_rule("fedavg", changes)


def test_versions_and_counterfactuals_open_with_transformers(command: Command, tmp_path: Path) -> None:
    from transformers import AutoModel

    state, out = RECORDED / "text-diloco.jsonl.gz", tmp_path / "encoder"
    with opened(state) as log:
        encoder = next(row.encoder for row in log.rows() if row.kind == "generated")
        digest = rebuild(log, encoder, 5)[1].digest()
    code, printed, err = command("export", encoder, "--state", state, "--version", 5, "--out", out)
    assert code == 0 and digest in printed, err
    assert AutoModel.from_pretrained(out).config.model_type == "modernbert"
    code, printed, err = command("replay", "--state", state, "--without", "a", "--out", out)
    assert code == 0 and digest not in printed, err
    card = (out / "README.md").read_text()
    assert "trained on what was really published" in card and "upon without a node, and" in card, "it did not agree"
    assert AutoModel.from_pretrained(out).config.model_type == "modernbert"


# --- log --------------------------------------------------------------------------------------------------------------


def test_list_and_show(command: Command, run: Federation) -> None:
    code, out, _ = command("log", "list", "--state", run.directory, "--kind", "update", "--node", "c", "--limit", 2)
    assert code == 0 and out.count("from version") == 2 and "5 steps, loss 3.000" in out and "updat" in out
    code, out, _ = command("log", "list", "--state", run.directory, "--after", -1, "--limit", 3, "--json")
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["started", "configured", "request.get"]
    assert json.loads(out.splitlines()[2])["body"]["encoder_type"] == "text"
    code, _, err = command("log", "list", "--state", run.directory, "--kind", "updates")
    assert code == 2 and "there are: ack, configured" in err

    entry = some_update(run)
    code, out, _ = command("log", "show", entry.offset, "--state", run.directory)
    shown = json.loads(out)
    assert shown["checksum_is_right"] and shown["payload"]["state"] == "here" and shown["facts"]["finite"]
    assert Path(shown["payload"]["file"]).stat().st_size == shown["payload"]["bytes"]
    run.log.drop([str(entry.payload)], "retention 5", 9.0)
    assert "dropped: retention 5" in command("log", "show", entry.offset, "--state", run.directory)[1]
    with sqlite3.connect(run.directory / "ledger.sqlite") as db:
        db.execute("UPDATE entries SET body = 'no JSON' WHERE offset = ?", (entry.offset,))
    db.close()
    assert not json.loads(command("log", "show", entry.offset, "--state", run.directory)[1])["checksum_is_right"]
    assert "not readable" in command("log", "list", "--state", run.directory)[1]
    assert command("log", "show", 999, "--state", run.directory)[0] == 2


def test_the_query_that_the_help_gives_is_answered(run: Federation) -> None:
    from deploy.commands.log_commands import log_app

    query = re.search(r'"(SELECT .*)"', str(log_app.info.epilog))
    assert query is not None
    with sqlite3.connect(run.directory / "ledger.sqlite") as db:
        rows = db.execute(query[1]).fetchall()
    db.close()
    assert len(rows) == run.log.last_offset + 1
    assert (rows[0][2], rows[0][3]) == ("started", "master") and rows[0][1].startswith("1970-01-01")
    assert [row[4] for row in rows if row[2] == "update"] == list(range(12))


def test_an_export_is_the_log(command: Command, run: Federation, tmp_path: Path) -> None:
    for name in ("log.jsonl", "log.jsonl.gz"):
        file = tmp_path / name
        code, out, err = command("log", "export", file, "--state", run.directory)
        assert code == 0 and out.startswith(f"{run.log.last_offset + 1} rows, 13 payloads"), err
        with opened(file) as log:
            assert list(log.entries()) == list(run.log.entries()) and list(log.rows()) == list(run.log.rows())
            assert rebuild(log, run.encoder)[1].digest() == run.state.digest
        for arguments in (["replay"], ["log", "verify"], ["log", "list"], ["replay", "--rule", "fedasync"]):
            code, _, err = command(*arguments, "--state", file)
            assert code == 0, err
    again = tmp_path / "again.jsonl"
    assert command("log", "export", again, "--state", tmp_path / "log.jsonl.gz")[0] == 0
    assert again.read_text() == (tmp_path / "log.jsonl").read_text()
    assert gzip.decompress((tmp_path / "log.jsonl.gz").read_bytes()) == again.read_bytes()


def test_a_part_and_an_export_without_payloads_say_what_they_are(
    command: Command, run: Federation, tmp_path: Path
) -> None:
    part, bare = tmp_path / "part.jsonl", tmp_path / "bare.jsonl"
    assert command("log", "export", part, "--state", run.directory, "--after", 9, "--before", 20)[0] == 0
    with opened(part) as log:
        assert [entry.offset for entry in log.entries()] == list(range(10, 20))
    assert command("log", "verify", "--state", part)[0] == 0
    code, _, err = command("replay", "--state", part)
    assert code == 1 and "begins with row 10" in err
    assert command("log", "export", bare, "--state", run.directory, "--no-payloads")[0] == 0
    assert command("log", "verify", "--state", bare)[0] == 0
    code, _, err = command("replay", "--state", bare)
    assert code == 1 and "13 payloads were dropped (left out of the export)" in err


@pytest.mark.parametrize(
    ("pattern", "other"),
    [
        (r'{"row": {"offset": 12.*\n', ""),
        (r'\\"steps\\":5', r'\\"steps\\":6'),
        (r'"base64": "....', '"base64": "AAAA'),
        (r'{"end".*\n', ""),
        (r'{"row": {"offset": 1,', '{"row": {"ofset": 1,'),
        (r"(?s)^.*$", "something else"),
        (r"(?s)^.*$", ""),
    ],
)
def test_an_export_that_was_changed_is_refused(
    command: Command, run: Federation, tmp_path: Path, pattern: str, other: str
) -> None:
    file = tmp_path / "log.jsonl"
    export_log(run.log, file)
    changed = re.sub(pattern, other, file.read_text(), count=1)
    assert changed != file.read_text()
    file.write_text(changed)
    code, _, err = command("log", "list", "--state", file)  # whatever is asked, it is checked first
    assert code in (1, 2) and str(file) in err and "Traceback" not in err


def test_verify_names_everything_that_is_damaged(command: Command, run: Federation) -> None:
    place = snapshot(run)
    code, out, err = command("log", "verify", "--state", run.directory)
    assert code == 0 and "13 payloads and 1 snapshots whole; nothing damaged" in out, err
    updates = [entry for entry in run.log.entries() if isinstance(entry.body, UpdateManifest)]
    flip(payload_path(run.log.directory / "payloads", str(updates[0].payload)))
    run.log.payloads.remove(str(updates[1].payload))
    run.log.write_payload(b"nobody names this")
    flip(place / "state.json", 5)
    with sqlite3.connect(run.directory / "ledger.sqlite") as db:
        db.execute("UPDATE entries SET body = replace(body, '50', '51') WHERE offset = ?", (updates[2].offset,))
    db.close()
    code, out, err = command("log", "verify", "--state", run.directory)
    assert code == 1 and "4 things in" in err
    for words in (
        f"payload {updates[0].payload} of row {updates[0].offset} is damaged",
        f"payload {updates[1].payload} of row {updates[1].offset} is missing",
        f"row {updates[2].offset} is not what was written",
        f"snapshot {place} is damaged",
        "1 payload files that no row names",
    ):
        assert words in out


def test_receipts_are_proved_and_a_forged_one_is_named(command: Command, tmp_path: Path) -> None:
    state = RECORDED / "text-return-count.jsonl.gz"
    file = RECORDED / "text-return-count.receipts.jsonl"
    held = [Receipt.model_validate_json(line) for line in file.read_text().splitlines()]
    code, out, err = command("log", "verify", "--state", state, "--receipts", file)
    assert code == 0 and f"{len(held)} of {len(held)} receipts are what the log leads to" in out, err
    mine = [receipt for receipt in held if receipt.node == "a" and receipt.accepted]
    total = sum(receipt.weight for receipt in mine)
    assert f"{len(mine)} counted in versions {mine[0].version}–{mine[-1].version} with total weight {total:.4f}" in out

    forged = tmp_path / "receipts.jsonl"
    for change in ({"weight": 9.0}, {"version": 1}, {"previous": "0" * 64}, {"sequence": 500}):
        lie = mine[3].model_copy(update=change)
        forged.write_text("\n".join(each.model_dump_json() for each in [*mine[:3], lie, *mine[4:]]))
        code, out, err = command("log", "verify", "--state", state, "--receipts", forged)
        assert code == 1 and "1 receipts are not what the log of" in err
        line = next(line for line in out.splitlines() if line.startswith("the first that is not"))
        assert f"update {lie.sequence} of a" in line
        assert next(iter(change)) in line or ("sequence" in change and "no receipt for this update" in line)
    forged.write_text("{}")
    assert "line 1 is no receipt" in command("log", "verify", "--state", state, "--receipts", forged)[2]


def test_prune_says_what_it_would_drop_and_leaves_a_running_master_alone(command: Command, tmp_path: Path) -> None:
    run = Federation(tmp_path / "state", "fedasync")
    state = ["--state", run.directory]
    for sequence, node in enumerate("abcabc"):
        run.update(node, sequence)
        if sequence in (3, 5):
            snapshot(run)
    lock = DirectoryLock(run.directory)
    for arguments in (["prune", "--keep", "0"], ["repair"]):
        code, _, err = command("log", *arguments, *state)
        assert code == 2 and "is in use by process" in err
    lock.close()
    assert "give since-snapshot, or a size" in command("log", "prune", "--keep", "few", *state)[2]
    code, out, _ = command("log", "prune", "--keep", "since-snapshot", "--dry-run", *state)
    assert code == 0 and "would drop 4 payloads" in out and not run.log.dropped()
    code, out, _ = command("log", "prune", "--keep", "since-snapshot", *state)
    assert code == 0 and "dropped 4 payloads" in out and len(run.log.dropped()) == 4
    code, out, _ = command("replay", *state)
    assert code == 0 and "4 payloads were dropped (retention since-snapshot)" in " ".join(out.split())
    code, _, err = command("replay", *state, "--without", "a")
    assert code == 1 and "another rule needs all of them" in err


def test_repair_says_what_was_wrong_and_what_is_lost(command: Command, run: Federation) -> None:
    state = ["--state", run.directory]
    run.log.close()
    assert "nothing is wrong" in command("log", "repair", *state)[1]
    with sqlite3.connect(run.directory / "ledger.sqlite") as db:
        db.execute("UPDATE entries SET at = at + 1 WHERE offset = 20")
    db.close()
    code, out, _ = command("log", "repair", *state)
    assert code == 0 and "row 20 of the ledger" in out and "kept: rows up to 19" in out
    code, out, _ = command("replay", *state)
    assert code == 0 and "rows after 19 were lost" in out


def test_the_sqlite3_program_reads_it(run: Federation) -> None:
    query = "SELECT count(*), max(json_extract(body,'$.sequence')) FROM entries"
    try:
        shown = subprocess.run(
            ["sqlite3", "-readonly", run.directory / "ledger.sqlite", query], capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        pytest.skip("there is no sqlite3 program here")
    assert shown.stdout.strip() == f"{run.log.last_offset + 1}|11"


# --- backup -----------------------------------------------------------------------------------------------------------


def test_a_backup_is_a_state_directory_and_goes_into_an_empty_folder(
    command: Command, run: Federation, tmp_path: Path
) -> None:
    snapshot(run)
    code, out, err = command("log", "backup", tmp_path / "copy", "--state", run.directory)
    assert code == 0, err
    assert f"{run.log.last_offset + 1} rows" in out and "1 snapshots copied" in out
    code, out, err = command("log", "verify", "--state", tmp_path / "copy")
    assert code == 0 and "nothing damaged" in out, err
    code, _, err = command("log", "backup", tmp_path / "copy", "--state", run.directory)
    assert code == 2 and "is not empty; give a new folder for the copy" in err
    code, _, err = command("log", "backup", tmp_path / "new", "--state", tmp_path / "none")
    assert code == 2 and "no message log in" in err
