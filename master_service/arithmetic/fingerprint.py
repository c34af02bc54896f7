"""What the bits of a computation depend on; the log carries it, so that replay elsewhere can say why bits differ."""

from __future__ import annotations

import platform

import torch


def fingerprint() -> dict[str, str]:
    """Versions and processor capability of this process."""
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
