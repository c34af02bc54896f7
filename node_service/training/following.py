"""What the other processes of a node do: they build the model that the first one trains, and take its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
import torch

from common.encoders import get_encoder_type
from common.encoders.base import PrivateSpec
from common.wire.to_node import Instruction
from common.wire.update_rule import UpdateRule
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.training.ranks import Ranks
from node_service.training.together import Together
from node_service.training.trainer import Trainer

log = structlog.get_logger()


def build(ranks: Ranks, instruction: Instruction, spec: PrivateSpec, seed: int) -> None:
    """By the first process: all others build the same model. What it depends on besides samples is in this."""
    encoder = {"encoder": instruction.encoder, "type": instruction.encoder_type}
    ranks.tell({"do": "build", **encoder, "architecture": instruction.architecture, "spec": spec, "seed": seed})


def stop(ranks: Ranks) -> None:
    """By the first process: all others end."""
    ranks.tell({"do": "stop"})


def follow(ranks: Ranks, config: NodeConfig, corpora: Mapping[str, Corpus]) -> Trainer | None:
    """By another process: do what the first one tells, until that is to stop. `corpora`: the node's samples. Gives
    what was trained last.

    Raises UserError once another process has ended, and for a model that cannot be built here.
    """
    torch.set_num_threads(config.threads)
    trained: tuple[Trainer, Together] | None = None
    while (order := ranks.hear())["do"] != "stop":
        if order["do"] == "build":
            trained = None  # before there is a second model in memory
            trained = _built(ranks, config, corpora, order)
            log.info("training with others", encoder=order["encoder"], process=ranks.rank, of=ranks.size)
        else:
            assert trained is not None, "a step is told only of what was built"
            trainer, together = trained
            together.follow(trainer, order)
    if trained is None:
        return None
    trained[0].settle()
    return trained[0]


def _built(
    ranks: Ranks, config: NodeConfig, corpora: Mapping[str, Corpus], order: dict[str, Any]
) -> tuple[Trainer, Together]:
    together = Together(ranks, order["seed"])
    model = get_encoder_type(order["type"]).build(order["architecture"], order["spec"], order["seed"])
    trainer = Trainer(
        model,
        model.encode(corpora[order["type"]].train),
        UpdateRule().inner,
        seed=order["seed"],
        device=ranks.device,
        precision=config.precision,
        compiled=config.compile,
        micro_batch=config.micro_batch,
        together=together,
    )
    return trainer, together
