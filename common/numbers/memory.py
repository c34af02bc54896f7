"""Fresh memory for what is large."""

from __future__ import annotations

import contextlib
import mmap

Bytes = bytes | bytearray | memoryview | mmap.mmap

#: Below that, the allocator has memory at hand that was used before.
LARGE = 1 << 23


def fresh(size: int) -> bytearray | mmap.mmap:
    """Zeros, so many bytes. Where the system has huge pages a large one consists of those: with pages of 4 KiB, the
    first write to each costs more than what is written (100 MiB: 84 ms, in huge pages 24)."""
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
