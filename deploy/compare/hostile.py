"""Hostile members of an arm: they train as others do, and hand in something else."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.encoders.base import Samples
from common.numbers.encodings import decode_vector, encode_vector
from deploy.compare_settings import Attack
from deploy.simulation.timed import TimedSession
from node_service.training.update_rule import SinceReturn

#: Norms of what is sent, as multiples of that of the update that was trained.
NOISE, SCALING, FREE_RIDER = 1000.0, 100.0, 1e-3


class HostileSession(TimedSession):
    """A session whose updates are what the attack makes of them; it knows no more than a node of the federation."""

    def __init__(self, *arguments: Any, attack: Attack, seed: int, **named: Any) -> None:
        super().__init__(*arguments, seed=seed, **named)
        self._attack = attack
        self._chance = torch.Generator().manual_seed(seed)

    @property
    def must_return(self) -> bool:
        return self.since.steps > 0 if self._attack == "flood" else super().must_return

    def hand_in(self, sequence: int) -> tuple[SinceReturn, list[bytes]]:
        since, bodies = super().hand_in(sequence)
        trained = decode_vector(b"".join(bodies), self.trainer.layout.size, self.rule.encoding)
        return since, encode_vector(lie(self._attack, trained, self._chance), self.rule.encoding)


def lie(attack: Attack, trained: Tensor, chance: torch.Generator) -> Tensor:
    """What is sent in the place of an update, float32 of its shape."""
    match attack:
        case "noise":
            return _noise(trained, NOISE, chance)
        case "free-rider":
            return _noise(trained, FREE_RIDER, chance)
        case "scaling":
            return trained * SCALING
        case "sign-flip" | "flood":
            return -trained
        case "foreign":
            return trained


def foreign(texts: Samples, seed: int) -> list[str]:
    """The texts in a script of their own: each small letter is another one, and so is each capital one."""
    order = np.random.default_rng([seed, 7]).permutation(len(string.ascii_lowercase))
    small = "".join(string.ascii_lowercase[index] for index in order)
    table = str.maketrans(string.ascii_letters, small + small.upper())
    return [str(text).translate(table) for text in texts]


def _noise(trained: Tensor, multiple: float, chance: torch.Generator) -> Tensor:
    noise = torch.randn(trained.shape, generator=chance)
    return noise * (multiple * float(trained.norm()) / float(noise.norm()))
