"""What the engineer of an organisation can set for a node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from common.config import Http, Section
from common.wire.fields import INLINE_BYTES
from node_service.accept import Accept
from node_service.corpus.corpus import CorpusConfig

#: What forward and backward passes are computed in; parameters, optimiser and updates are float32 in either.
Precision = Literal["float32", "bfloat16"]


class NodeConfig(Section):
    """One node. `corpus` may be one table or a list of them, at most one per encoder type.

    `device`: auto, cpu, cuda, cuda:1, mps. `precision`: bfloat16 is mixed precision (autocast), for GPUs that are fast
    at it: parameters, optimiser and updates stay float32. `compile`: the model's loss is compiled (torch.compile),
    which takes a minute or more before the first step. Where it fails, training goes on without.
    `micro_batch`: at most so many samples of the rule's batch go through the model at once, for a memory that holds no
    more; their gradients are added up, and the result is the same. `max_steps_per_second` leaves the machine to others.
    `get` asks the master for an encoder of a type. Without a sign of life from the master for `away_after_seconds`,
    it is away: then a node trains on beyond what it may hand in. Updates of up to `inline_bytes` (0: none) are one
    message, longer ones are sent in chunks. `private` are the settings of the private parts (for text: see
    `TextPrivate`). `named`: the cards of encoders that this node takes part in may say its name; else it is a
    number there. `accept`: what its owner agrees to. `http`: where health, readiness and metrics are to be had
    ("127.0.0.1:9464"); not set: nowhere. `sent_file`: a line for each message that leaves, with all that is in it, for
    an auditor; without it nothing leaves.
    """

    corpus: list[CorpusConfig] = Field(default_factory=list)
    state_dir: Path | None = None
    export_dir: Path | None = None
    private: dict[str, Any] = Field(default_factory=dict)
    device: str = "auto"
    precision: Precision = "float32"
    compile: bool = False
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    threads: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    inline_bytes: Annotated[int, Field(ge=0, le=INLINE_BYTES)] = INLINE_BYTES
    get: str | None = None
    named: bool = False
    accept: Accept = Accept()
    http: Http | None = None
    sent_file: Path | None = None
    exit_when_finished: bool = False
    max_steps_per_second: Annotated[float, Field(gt=0)] | None = None
    alive_every_seconds: Annotated[float, Field(gt=0)] = 5.0
    away_after_seconds: Annotated[float, Field(gt=0)] = 30.0
    ask_after_seconds: Annotated[float, Field(gt=0)] = 30.0
    resend_after_seconds: Annotated[float, Field(gt=0)] = 180.0
    checkpoint_every_seconds: Annotated[float, Field(gt=0)] = 60.0

    @field_validator("corpus", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value
