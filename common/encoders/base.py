"""What an encoder type is: how the shared encoder is built, and the private parts and the task around it.

The master needs only `architecture`, `initial` and `export_shared`; the node fits its private parts to its own samples,
builds the whole model and trains it. A type of your own is a class with these methods, registered as an entry point of
the group `shared_encoder.encoder_types`. Raise UserError for what a person can mend; anything else that a type or its
model raises, in a training step too, ends what was asked for with one line that names your package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import NotProbed

#: Everything that the shared encoder's parameters depend on, as plain JSON; it travels in the instruction.
Architecture = dict[str, Any]

#: What nodes need of an encoder beside its architecture, by name (a tokenizer): bytes that travel once.
Assets = Mapping[str, bytes]

#: Among the assets of an export, by a name that no asset can have: the directory of the base, as the operator of this
#: machine said. It never travels.
BASE_DIRECTORY = "base directory"

#: What the private parts depend on besides tensors (a vocabulary, an image shape), as plain JSON; it never travels.
PrivateSpec = dict[str, Any]

Batch = dict[str, Tensor]

#: A list of str for text, a uint8 array (N, H, W) or (N, H, W, C) for images.
Samples = Sequence[Any]


class EncoderModel(nn.Module, ABC):
    """Private encoder + shared encoder + private decoder of one node, with its self-supervised task."""

    @abstractmethod
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that travel, named and ordered exactly as `EncoderType.initial` gives them."""

    def private_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that never travel: all others (a tied weight appears once)."""
        shared = {id(parameter) for parameter in self.shared_parameters().values()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) not in shared}

    @abstractmethod
    def encode(self, samples: Samples) -> Any:
        """Turn samples into the compact form (token ids, pixels) that `batch` draws from; done once per corpus."""

    @abstractmethod
    def batch(self, encoded: Any, size: int, generator: torch.Generator) -> Batch:
        """Draw `size` samples at random and corrupt them; a function of the generator's state alone."""

    def prepared(self, batch: Batch) -> Batch:
        """A batch as `batch` gave it, with what can be worked out of it before it goes to the model's device: there,
        whoever asks what a number is waits for all that is under way. `loss` takes either."""
        return batch

    def counted(self, batch: Batch) -> int:
        """How many positions the loss of a batch, as `batch` gave it, is the mean of. By default the samples, which
        will do where all of them have equally many. A batch that is too large is trained in pieces by it."""
        return max((len(tensor) for tensor in batch.values() if tensor.ndim), default=0)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The self-supervised loss of a batch: a scalar, mean over the masked positions (nats for text)."""

    @torch.no_grad()
    def held_out_losses(self, samples: Samples, generator: torch.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """All of the samples, once each, corrupted by the generator: of each the sum of its losses, and how many
        positions were predicted, which may be none; both float64 (n,). By default a sample is a batch of one, whose
        loss counts once."""
        rows = (samples[index : index + 1] for index in range(len(samples)))
        sums = [float(self.loss(self.batch(self.encode(row), 1, generator))) for row in rows]
        return np.array(sums, dtype=float), np.ones(len(samples))

    def backward(self, loss: Tensor) -> None:
        """Put the gradients of a loss, as `loss` gave it, into all parameters."""
        loss.backward()  # type: ignore[no-untyped-call]

    def pooled(self, samples: Samples) -> Tensor:
        """One vector for each whole sample, float32 (n, d), on the model's device, with gradient: for fine-tuning.

        `features` gives the same numbers. Raises NotProbed for a type that has no such output.
        """
        raise NotProbed("models of this type give no pooled output to fine-tune")

    @abstractmethod
    def features(self, samples: Samples) -> Tensor:
        """Frozen features of whole samples, float32 (n, d), on the CPU, for probes; no gradient."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write stem + shared encoder + head so that transformers' Auto classes open it with no weight missing."""


class EncoderType(Protocol):
    """A kind of encoder: what samples it takes and how it is built."""

    name: str

    def architecture(self, overrides: Mapping[str, Any]) -> Architecture:
        """The architecture with defaults filled in. Raises UserError for a wrong key, suggesting the right one."""

    def architecture_of(
        self, directory: Path, overrides: Mapping[str, Any] | None = None
    ) -> tuple[Architecture, dict[str, Tensor]]:
        """Architecture and shared tensors of an export or a Hugging Face directory, to continue from it; `overrides`
        may change how it is trained. Raises UserError for one that the tensors do not fit."""

    def assets(self, architecture: Architecture, sources: Mapping[str, str]) -> tuple[Architecture, dict[str, bytes]]:
        """What nodes need beside the architecture, made from what the operator named (`sources`: paths and words, by
        name), and the architecture completed by what that says. Raises UserError for a source that does not serve.

        A type that makes them of words which nodes contribute raises WordsNeeded as long as there is no source `words`:
        a JSON object, the number of documents of all nodes by word; empty if nobody contributed."""

    def initial(self, architecture: Architecture, seed: int) -> dict[str, Tensor]:
        """The shared encoder's float32 tensors at version 0, in layout order; the same for the same seed."""

    def fit_private(
        self, samples: Samples, architecture: Architecture, settings: Mapping[str, Any], assets: Assets
    ) -> PrivateSpec:
        """Fit what the private parts need besides tensors, from the owner's samples (a vocabulary, a shape), or take it
        from what came with the instruction. Raises UserError for assets that are not what this type made."""

    def build(self, architecture: Architecture, private: PrivateSpec, seed: int) -> EncoderModel:
        """The whole model with freshly initialised private parts. `seed` need not be equal across nodes."""

    def export_shared(
        self,
        directory: Path,
        architecture: Architecture,
        tensors: Mapping[str, Tensor],
        card: str,
        assets: Assets,
    ) -> None:
        """Write the shared encoder so that `AutoModel.from_pretrained(directory)` opens it; `card` is its README."""
