"""Shared by the encoder types that wrap transformers' models: seeded building, saving, loading, refusing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM
from transformers.utils import logging

from common.errors import UserError

#: The global generator and transformers' verbosity belong to the process; nodes of a demo are threads of one.
_PROCESS_WIDE = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's random numbers on the CPU follow from `seed` alone; outside, they go on undisturbed."""
    with _PROCESS_WIDE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers shows no progress bars and no load reports: our caller reports progress."""
    with _PROCESS_WIDE:
        verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()


def save(model: nn.Module, directory: Path) -> None:
    """Write config.json and model.safetensors, from whatever device the model is on."""
    directory.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(directory)  # type: ignore[operator]


def read_config(directory: Path, *model_types: str) -> dict[str, Any]:
    """config.json of a Hugging Face directory as plain JSON. Raises UserError if it is missing or of another model."""
    model_type = " or ".join(model_types)
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; name an export or another Hugging Face directory of a {model_type}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); export the encoder again") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in model_types:
        raise UserError(f"{path} describes a {found!r} model; this encoder type continues from {model_type}")
    return dict(config)


def load_base_model(directory: Path) -> tuple[nn.Module, set[str]]:
    """`load_model` for the bare encoder."""
    return load_model(directory, masked=False)


def load_model(directory: Path, *, masked: bool) -> tuple[nn.Module, set[str]]:
    """The encoder of a Hugging Face directory in float32, with its head for masked tokens or bare, and the names of
    weights that the files do not hold; those begin anew, the same at every call.

    Raises UserError if the files do not make a model.
    """
    factory = AutoModelForMaskedLM if masked else AutoModel
    try:
        with quiet(), seeded(0):
            model, report = factory.from_pretrained(
                directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory} does not open as a model ({reason}); export or download it again") from error
    return model, set(report["missing_keys"])


def require(directory: Path, wanted: Mapping[str, Tensor], missing: set[str]) -> None:
    """Raise UserError if a shared tensor is among the `missing` names."""
    lost = sorted(set(wanted) & missing)
    if lost:
        raise UserError(
            f"{directory} lacks {len(lost)} shared tensors, {lost[0]!r} the first; export or download it again"
        )


def fill(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into `parameters` of the same names and shapes. Raises ValueError if they differ."""
    if list(parameters) != list(tensors):
        raise ValueError(f"tensors {list(parameters)} were expected, {list(tensors)} came")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name}: {tuple(parameter.shape)} was expected, {tuple(tensors[name].shape)} came")
            parameter.copy_(tensors[name])
