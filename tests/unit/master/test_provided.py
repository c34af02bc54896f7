"""An encoder's assets: in state and log, told to nodes, written for who misses them, kept for good, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.wire.assets import asset_entry
from common.wire.fields import MAX_ASSET_BYTES
from common.wire.to_master import Continue, FetchAssets, Finished, Get, Join
from common.wire.to_node import Answer, Instruction, Introduce
from master_service.arithmetic.export import assets_of, export_encoder
from master_service.arithmetic.generation import check_assets, generated
from master_service.decisions.effects import Broadcast, DeleteStream, Effect, Generate, Provide, Publish
from master_service.decisions.messages_out import PUBLISH_AGAIN_SECONDS
from master_service.decisions.records import Generated, GenerationFailed, Provided, Tick
from master_service.decisions.requests import sources
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.decisions.streams import STREAM_SECONDS
from master_service.history.audit import examine
from master_service.history.repair import repair
from master_service.history.replay import origin, rebuild, verify
from master_service.history.retention import prune
from master_service.history.snapshot import kept_snapshots, read_snapshot
from master_service.log.jsonl import export_log, opened
from master_service.log.message_log import open_log
from master_service.log.payload_files import payload_path
from tests.builders import LAYOUT
from tests.faults.tiny import ASSETS
from tests.unit.master.test_fold import Federation, checkpoint_wal, snapshot
from tests.unit.scenario import DIGEST, Scenario, sent

TOKENIZER, VOCABULARY = asset_entry("tokenizer.json", b"{}"), asset_entry("vocab.txt", b"a b c")


def provided(name: str, *entries: Any) -> list[Provided]:
    return [Provided(encoder=name, **entry.model_dump()) for entry in entries]


def made(run: Scenario, *entries: Any) -> tuple[str, list[Effect]]:
    """An encoder with these assets; what its generation led to."""
    [order] = run.apply(Get(sender="operator", encoder_type="text"))
    assert isinstance(order, Generate)
    for body in provided(order.encoder, *entries):
        assert run.apply(body) == []
    return order.encoder, run.apply(version_0(order.encoder, *entries))


def version_0(name: str, *entries: Any) -> Generated:
    plain = {"layout": LAYOUT.plain(), "layout_digest": LAYOUT.digest, "digest": DIGEST}
    return Generated(encoder=name, architecture={}, assets=[entry.name for entry in entries], **plain)


def missed(run: Scenario, name: str, node: str = "a") -> list[Effect]:
    return run.apply(FetchAssets(node=node, incarnation="first", encoder=name))


# --- decisions -------------------------------------------------------------------------------------------------------


def test_assets_are_written_before_the_first_instruction_which_names_them() -> None:
    run = Scenario()
    name, effects = made(run, TOKENIZER, VOCABULARY)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(Provide) < kinds.index(Broadcast) and kinds.count(Provide) == 1
    [instruction] = [each.message for each in effects if isinstance(each, Broadcast)]
    assert isinstance(instruction, Instruction) and instruction.assets == [TOKENIZER, VOCABULARY]
    [answer] = sent(effects, Answer, "operator")
    assert answer.assets == instruction.assets
    told = run.apply(Join(node="late", incarnation="first", types=["text"]))
    assert sent(told, Instruction) == [instruction] and Provide(name) not in told, "they are on the stream"


def test_an_encoder_without_assets_is_told_of_as_before() -> None:
    run = Scenario()
    name, effects = made(run)
    assert Provide(name) not in effects and missed(run, name) == [*missed(run, "none")]
    run.join("a", name)
    assert missed(run, name) == [] and run.coordinator.deadline() is None


def test_a_master_that_died_between_the_rows_makes_them_again_and_only_the_last_attempt_counts() -> None:
    run = Scenario()
    [order] = run.apply(Get(sender="operator", encoder_type="text"))
    assert isinstance(order, Generate)
    other = asset_entry("tokenizer.json", b"of a file that was changed meanwhile")
    for body in provided(order.encoder, asset_entry("merges.txt", b"of the first attempt"), other):
        run.apply(body)
    assert run.coordinator.unmade() == [order]
    for body in provided(order.encoder, VOCABULARY, TOKENIZER, TOKENIZER):
        run.apply(body)
    run.apply(version_0(order.encoder, VOCABULARY, TOKENIZER))
    assert run.coordinator.state.encoders[order.encoder].assets == [VOCABULARY, TOKENIZER]


def test_assets_are_written_again_for_who_misses_them_but_once_in_a_while_for_all() -> None:
    run = Scenario()
    name, _ = made(run, TOKENIZER)
    assert [type(each) for each in sent(missed(run, name), Introduce, "a")] == [Introduce], "it has not joined"
    for node in "abc":
        run.join(node, name)
    assert missed(run, name) == [] == missed(run, "none"), "they were written just now"
    run.at += PUBLISH_AGAIN_SECONDS
    assert missed(run, name) == [Provide(name)]
    assert missed(run, name, "b") == missed(run, name, "c") == []
    run.at += PUBLISH_AGAIN_SECONDS
    assert missed(run, name, "b") == [Provide(name)]


def ended(*entries: Any) -> tuple[Scenario, str]:
    """An encoder whose streams have gone, because its one node has the last version."""
    run = Scenario(rule=aggregation_rule("fedasync"), stop=StopRule(versions=1))
    name, _ = made(run, *entries)
    run.join("a", name)
    run.update("a", name, 0)
    run.at += PUBLISH_AGAIN_SECONDS
    effects = run.apply(Finished(node="a", incarnation="first", encoder=name, version=1))
    assert effects == [DeleteStream(name, assets=bool(entries))]
    return run, name


@pytest.mark.parametrize("who", ["node", "reader", "continue"])
def test_the_assets_go_with_the_parameters_and_are_there_again_for_whoever_comes_later(who: str) -> None:
    run, name = ended(TOKENIZER)
    assert run.coordinator.deadline() is None
    match who:
        case "node":
            effects = missed(run, name)
        case "reader":
            effects = run.apply(Get(sender="reader", encoder_type="text"))
            assert sent(effects, Answer)[0].assets == [TOKENIZER]
        case _:
            effects = run.apply(Continue(sender="reader", encoder=name))
    assert effects.count(Provide(name)) == 1
    assert not any(isinstance(each, Publish) for each in effects) or who != "node"
    if who == "continue":
        kinds = [type(effect) for effect in effects]
        assert kinds.index(Provide) < kinds.index(Broadcast)
        assert run.apply(Tick()) == [], "it runs"
        return
    assert run.coordinator.deadline() == run.at + STREAM_SECONDS
    run.at += STREAM_SECONDS
    assert run.apply(Tick()) == [DeleteStream(name, assets=True)]


def test_what_the_operator_names_is_what_a_type_may_make_assets_of() -> None:
    assert sources(Settings()) == {}
    assert sources(Settings(tokenizer="bytes", reference="a.txt")) == {"tokenizer": "bytes", "reference": "a.txt"}
    assert sources(Settings(generation="continue", source="bert")) == {"tokenizer": "bert"}
    assert sources(Settings(generation="continue", source="bert", tokenizer="t")) == {"tokenizer": "t"}
    assert sources(Settings(source="bert")) == {}, "a fresh one has nothing of it"
    run = Scenario(tokenizer="tokens", reference="a.txt")
    [order] = run.apply(Get(sender="operator", encoder_type="text"))
    assert isinstance(order, Generate) and order.sources == {"tokenizer": "tokens", "reference": "a.txt"}


# --- making them -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "faults/plugin"))


def order(**changes: Any) -> Generate:
    plain = {"encoder": "tiny-1", "encoder_type": "tiny", "architecture": {}, "generation": "fresh"}
    return Generate(**{**plain, "source": None, "seed": 1, **changes})


@pytest.mark.usefixtures("_tiny")
def test_a_generation_is_a_row_for_each_asset_and_then_the_encoder(tmp_path: Path) -> None:
    log = open_log(tmp_path / "m")
    [asset, version] = generated(order())
    assert isinstance(asset.body, Provided) and isinstance(version.body, Generated)
    assert {asset.body.name: asset.payload} == ASSETS and version.body.assets == list(ASSETS)
    assert [asset, version] == generated(order()), "made again it is the same"
    assert asset.payload is not None and log.write_payload(asset.payload) == asset.body.digest
    # exported, and gone on from
    run = Scenario()
    [get] = run.apply(Get(sender="operator", encoder_type="tiny"))
    assert isinstance(get, Generate)
    for outcome in generated(order(encoder=get.encoder)):
        run.apply(outcome.body)
    state = run.coordinator.state.encoders[get.encoder]
    parameters = rebuilt(version.body, version.payload)
    export_encoder(tmp_path / "out", state, Settings(), parameters, log.payloads)
    assert (tmp_path / "out/curve.json").read_bytes() == ASSETS["curve.json"]
    going_on = generated(order(generation="continue", source=str(tmp_path / "out")))
    assert going_on[0] == asset and going_on[1].body.kind == "generated"


def rebuilt(body: Generated, payload: bytes | None) -> Any:
    from common.numbers.layout import Layout
    from common.numbers.parameters import ParameterSet

    assert payload is not None
    return ParameterSet.from_bytes(Layout(body.layout), payload)


@pytest.mark.usefixtures("_tiny")
def test_what_cannot_travel_is_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "large", bytes(MAX_ASSET_BYTES + 1))
    [outcome] = generated(order())
    assert isinstance(outcome.body, GenerationFailed)
    assert outcome.body.reason == (
        "type tiny gives the asset large of 16.0 MiB, at most 16 MiB travel; take a smaller one"
    )


@pytest.mark.parametrize("assets", [{"a/b": b""}, {"": b""}, {".a\nb": b""}, dict.fromkeys("123456789", b"")])
def test_names_and_numbers_are_bounded_and_said_in_one_line(assets: dict[str, bytes]) -> None:
    check_assets("text", dict.fromkeys("12345678", b""))
    with pytest.raises(UserError, match=r"^type text gives .*$"):
        check_assets("text", assets)


# --- in the log ------------------------------------------------------------------------------------------------------


def test_assets_survive_whatever_the_log_goes_through(tmp_path: Path) -> None:
    """Snapshots, a start, retention, an export, a repair; and damage to one is found and refused."""
    assets = {"tokenizer.json": b"tokens" * 999, "vocab.txt": b"words"}
    run = Federation(tmp_path, "fedasync", assets=assets)
    for sequence in range(6):
        run.update("a", sequence)
        if sequence in (2, 4):
            snapshot(run)
    entries = run.state.assets
    assert assets_of(entries, run.log.payloads) == assets
    assert read_snapshot(tmp_path / "snapshots", run.log).coordinator.state.encoders[run.encoder].assets == entries
    assert prune(run.log, kept_snapshots(tmp_path / "snapshots"), "since-snapshot", 0.0) > 0
    assert assets_of(entries, run.log.payloads) == assets and not examine(run.log).damage
    export_log(run.log, tmp_path / "log.jsonl.gz")
    with opened(tmp_path / "log.jsonl.gz") as again:
        assert assets_of(entries, again.payloads) == assets
    checkpoint_wal(run.log)
    run.log.close()
    ledger = tmp_path / "ledger.sqlite"
    ledger.write_bytes(ledger.read_bytes()[: ledger.stat().st_size * 4 // 5])
    assert repair(tmp_path) is not None
    log = open_log(tmp_path)
    fold = origin(log).fold
    assert all(check is None or check.identical for _, check in verify(log, fold))
    assert fold.coordinator.state.encoders[run.encoder].assets == entries
    assert assets_of(entries, log.payloads) == assets and not examine(log).damage
    path = payload_path(tmp_path / "payloads", entries[0].digest)
    path.write_bytes(path.read_bytes()[:-1])
    assert [entries[0].digest in line for line in examine(log).damage] == [True]
    with pytest.raises(UserError, match=r"^the asset tokenizer\.json is damaged: restore .*$"):
        assets_of(entries, log.payloads)


def test_an_update_of_the_same_bytes_does_not_take_an_asset_with_it(tmp_path: Path) -> None:
    """A member may hand in the bytes of version 0, or of an asset; dropping its update leaves those."""
    run = Federation(tmp_path, "fedasync", assets={"vocab.txt": b"words"})
    kept = {row.payload for row in run.log.rows() if row.kind in ("generated", "provided")}
    for sequence in range(3):
        run.update("a", sequence)
    for payload in kept:
        manifest = next(entry for entry in run.log.entries() if entry.facts is not None)
        later = manifest.body.model_copy(update={"sequence": 10 + len(payload or "")})
        run.log.append(later, message_id=f"like {payload}", at=0.0, payload=payload)
    found = run.log.update_payloads(run.log.last_offset)
    assert len(kept) == 2 and len(found) == 3 and not kept & set(found)
    assert rebuild(run.log, run.encoder, 0)[1].digest() in kept
