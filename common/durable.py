"""Writing files so that after a crash each is the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_durably(path: Path, *content: bytes) -> None:
    """Replace a file, whose content may come in parts: written beside, synced, renamed, and the directory synced."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *, synced: bool = True
) -> None:
    """Write a safetensors file and sync it. Raises OSError, also where the library says it in words of its own.

    Without `synced` the operating system has all of it, and none of it need be on disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if f"os error {number}" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from None
        raise
    if synced:
        sync(path)
