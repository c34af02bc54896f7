"""One node of several processes, on CPUs: they train as one process would that took all of their batches."""

from __future__ import annotations

import os
import socket
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.encoders.base import Batch
from common.errors import UserError
from common.numbers.encodings import decode_vector, encode_vector
from common.numbers.parameters import ParameterSet
from common.wire.to_node import Instruction, ParameterChunk
from common.wire.transfer import CompleteVersion
from common.wire.update_rule import FinishRule, InnerOptimizer, ReturnWhen, UpdateRule
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.handover.receipt_book import Ledger
from node_service.training import following, session
from node_service.training.following import follow, stop
from node_service.training.ranks import Ranks
from node_service.training.session import Session
from node_service.training.together import Together, seed_of
from tests.faults.tiny import ASSETS, TinyEncoderType, samples

TYPE, TRAIN = TinyEncoderType(), samples(3, 60)
START = ParameterSet.from_tensors(TYPE.initial(TYPE.architecture({}), 1))
INSTRUCTION = Instruction(
    encoder="tiny-1",
    encoder_type="tiny",
    architecture=TYPE.architecture({}),
    layout=START.layout.plain(),
    layout_digest=START.layout.digest,
)
BATCH, STEPS = 6, 5
RULE = UpdateRule(
    when=ReturnWhen(steps=STEPS),
    encoding="float32",
    inner=InnerOptimizer(lr=1e-2, warmup_steps=3, batch_size=BATCH, gradient_clip=0.1),
    finish=FinishRule(steps=4, what="private"),
)


def version(number: int) -> CompleteVersion:
    payload = b"".join(encode_vector(START.vector + number, "float32"))
    plain: dict[str, Any] = {"encoder": "tiny-1", "epoch": 1, "version": number, "index": 0, "chunks": 1}
    plain |= {"encoding": "float32", "layout_digest": START.layout.digest, "size": len(payload), "digest": "0" * 64}
    return CompleteVersion(ParameterChunk(**plain, checksum="", data=b""), payload)


def opened(directory: Path, **options: Any) -> Session:
    made = Session(
        INSTRUCTION,
        TRAIN,
        directory,
        private={},
        assets=ASSETS,
        seed=0,
        device="cpu",
        ledger=Ledger("i", {}, {}),
        **options,
    )
    made.retune(RULE, 0.0)
    return made


def trained(training: Session) -> dict[str, Any]:
    """Two updates with a version between them, then a finishing phase that moves the private parts alone."""
    found: dict[str, Any] = {}
    for number in range(2):
        training.adopt(version(number))
        for _ in range(STEPS):
            training.step()
        since, bodies = training.hand_in(number)
        found[f"update {number}"] = decode_vector(b"".join(bodies), START.layout.size, "float32")
        found[f"loss {number}"], found[f"samples {number}"] = since.mean_loss, since.samples
    training.finish(version(2), None)
    while training.finishing is not None and not training.finishing.over:
        training.step()
    training.settle()
    return {**found, **parameters(training.model)}


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def first(ranks: Ranks, directory: Path) -> dict[str, Any]:
    found = trained(opened(directory / "a", ranks=ranks, micro_batch=4))
    stop(ranks)
    # the other one dies in a step, and this one does not wait for it for ever
    training = opened(directory / "b", ranks=ranks)
    training.adopt(version(0))
    with pytest.raises(UserError) as caught:
        for _ in range(10):
            training.step()
    return {**found, "died": str(caught.value), "steps": training.steps}


def second(ranks: Ranks, directory: Path) -> dict[str, Any]:
    corpora = {"tiny": Corpus("tiny", TRAIN, None, [], None)}
    config = NodeConfig(compile=False, micro_batch=4)
    trainer = follow(ranks, config, corpora)
    assert trainer is not None
    torch.save(parameters(trainer.model), directory / "second.pt")
    follows, seen = Together.follow, []

    def dies(self: Together, *arguments: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            os._exit(3)
        follows(self, *arguments)

    Together.follow = dies  # type: ignore[method-assign]
    follow(ranks, config, corpora)
    raise AssertionError("it is dead")


def process(rank: int, port: int, directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    session.get_encoder_type = following.get_encoder_type = lambda name: TYPE  # type: ignore[attr-defined,assignment]
    ranks = Ranks.started("cpu")
    assert ranks is not None and (ranks.rank, ranks.size) == (rank, 2)
    torch.save((first, second)[rank](ranks, directory), directory / f"{rank}.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor], int | None]:
    """What the first of two processes found, the parameters of the second, and how that ended."""
    directory = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = get_context("spawn")
    started = [spawn.Process(target=process, args=(rank, port, directory)) for rank in range(2)]
    for each in started:
        each.start()
    for each in started:
        each.join(150.0)
        each.kill()
        each.join()
    return torch.load(directory / "0.pt"), torch.load(directory / "second.pt"), started[1].exitcode


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One process that takes the batches of both."""
    monkeypatch.setattr(session, "get_encoder_type", lambda name: TYPE)
    training = opened(tmp_path)
    draw, others = training.model.batch, torch.Generator()
    began: set[bool] = set()

    def both(encoded: Any, size: int, generator: torch.Generator) -> Batch:
        # the second process begins anew when everything was changed: before the first step, and with the phase
        if (finishing := training.finishing is not None) not in began:
            began.add(finishing)
            others.manual_seed(seed_of(0, 1, training.steps))
        halves = draw(encoded, size, generator), draw(encoded, size, others)
        return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}

    monkeypatch.setattr(training.model, "batch", both)
    return trained(training)


def test_two_processes_train_as_one_with_both_batches(
    two: tuple[dict[str, Any], dict[str, Tensor], int | None], alone: dict[str, Any]
) -> None:
    found, other, _ = two
    for number in range(2):
        assert found.pop(f"samples {number}") == 2 * STEPS * BATCH == 2 * alone.pop(f"samples {number}")
    for name, value in alone.items():
        close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5, err_msg=name)
        close(np.asarray(found[name]), np.asarray(value))
    assert all(torch.equal(found[name], value) for name, value in other.items()), (
        "they take the same steps, bit for bit"
    )


def test_a_process_that_dies_ends_the_node_with_one_line(
    two: tuple[dict[str, Any], dict[str, Tensor], int | None],
) -> None:
    found, _, ended = two
    assert ended == 3 and found["steps"] == 2
    assert found["died"].startswith("another process of this node's training has ended, and this one with it (")
    assert "\n" not in found["died"]


def test_torchrun_with_one_gpu_named_for_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device 'cuda:1' is one GPU, and torchrun started 2 processes"):
        Ranks.started("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Ranks.started("cuda:1") is None
