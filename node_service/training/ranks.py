"""One node on several GPUs of its machine: `torchrun` starts a process for each. The first is the node; it talks to the
broker and holds the state directory. The others only train: they do what the first one tells them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError

#: A node may wait for its master for as long as it takes; a process that has died is noticed by its connection.
_FOR_EVER = timedelta(days=365)


class Ranks:
    """This process among those of its node. `device`: where it trains. Every method is called by all of them, or waits.

    All raise UserError once another process has ended.
    """

    def __init__(self, rank: int, size: int, device: str) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        on_gpu = torch.device(device).type == "cuda"
        with one_line():
            dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=size, timeout=_FOR_EVER)
            #: What is told goes another way than what is computed: between processors, where nobody waits for a GPU.
            self._told = dist.new_group(backend="gloo", timeout=_FOR_EVER)

    @classmethod
    def started(cls, device: str) -> Ranks | None:
        """As `torchrun` says in the environment; None for a process that is the whole node. `device`: as configured;
        each process takes a GPU of its own. Raises UserError for a configuration that names one GPU for all."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return None
        if device.startswith("cuda:"):
            raise UserError(f"device {device!r} is one GPU, and torchrun started {size} processes; say device = 'cuda'")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        return cls(int(os.environ["RANK"]), size, device)

    def tell(self, order: dict[str, Any]) -> None:
        """To all others, by the first: plain JSON."""
        self._exchange(json.dumps(order).encode())

    def hear(self) -> dict[str, Any]:
        """What the first one tells; waits until it does."""
        heard: dict[str, Any] = json.loads(self._exchange(b""))
        return heard

    def spread(self, tensor: Tensor) -> None:
        """The first one's tensor, into that of all others."""
        with one_line():
            dist.broadcast(tensor, 0)

    def summed(self, tensor: Tensor) -> Tensor:
        """In place: the sum of all."""
        with one_line():
            dist.all_reduce(tensor)
        return tensor

    def close(self) -> None:
        """No more is said or heard."""
        dist.destroy_process_group()

    def _exchange(self, data: bytes) -> bytes:
        with one_line():
            length = torch.tensor([len(data)])
            dist.broadcast(length, 0, group=self._told)
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(length)).byte()
            dist.broadcast(body, 0, group=self._told)
        return body.numpy().tobytes()


@contextmanager
def one_line() -> Iterator[None]:
    """Inside, another process that has ended is a UserError, and not one of torch's with its whole story."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no error of its own; a model's own errors pass as they are
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        story = str(error).strip().partition("\n")[0][:160]
        raise UserError(
            f"another process of this node's training has ended, and this one with it ({story}); its own lines say why"
        ) from None
