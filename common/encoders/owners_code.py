"""Code that is not ours: encoder types from other packages, and what an owner wrote to load samples.

Whatever it raises becomes one line that says whose it is. Importing this file imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from common.errors import OwnersCodeError, SharedEncoderError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from common.encoders.base import Architecture, Assets, EncoderModel, EncoderType, PrivateSpec, Samples

log = structlog.get_logger()

#: What an encoder type must have, besides its name.
TYPE_METHODS = ("architecture", "architecture_of", "assets", "initial", "fit_private", "build", "export_shared")

#: The methods of a model that run its owner's code.
MODEL_METHODS = (
    "shared_parameters",
    "private_parameters",
    "encode",
    "batch",
    "prepared",
    "counted",
    "loss",
    "held_out_losses",
    "backward",
    "pooled",
    "features",
    "export",
)

#: These write to our disk: an OSError there says nothing against the code, and its caller knows what to do.
_WRITING = ("export", "export_shared")


@contextmanager
def owners_code(whose: str, where: str = "") -> Iterator[None]:
    """Inside, code of `whose` runs ("entry_point 'mydata:load'"), in its function `where`.

    Raises OwnersCodeError for what it raises; its traceback is logged at level debug. Our own errors pass as they are.
    """
    try:
        yield
    except SharedEncoderError:
        raise
    except (Exception, SystemExit) as error:  # anything at all, a script's sys.exit too: it would end us without a word
        if where in _WRITING and isinstance(error, OSError):
            raise
        log.debug("code that is not ours failed", whose=whose, where=where, exc_info=error)
        raise OwnersCodeError(whose, error, where) from error


def checked_encoder_type(found: Any, whose: str) -> OwnersEncoderType:
    """An encoder type of another package, behind a proxy that reports its errors as that package's. Raises UserError if
    it is not an encoder type."""
    missing = [method for method in TYPE_METHODS if not callable(getattr(found, method, None))]
    if not isinstance(getattr(found, "name", None), str):
        missing.insert(0, "name")
    if missing:
        raise UserError(
            f"{whose}: its entry point is {_kind(found)}, not an encoder type: it lacks {', '.join(missing)}; "
            "see EncoderType in common/encoders/base.py"
        )
    return OwnersEncoderType(found, whose)


class OwnersEncoderType:
    """An encoder type from another package: errors and wrong results of its methods are reported as that package's."""

    def __init__(self, inner: EncoderType, whose: str) -> None:
        self._inner = inner
        self._whose = whose
        self.name = inner.name

    def architecture(self, overrides: Mapping[str, Any]) -> Architecture:
        with owners_code(self._whose, "architecture"):
            found = self._inner.architecture(overrides)
        return self._plain("architecture", found)

    def architecture_of(
        self, directory: Path, overrides: Mapping[str, Any] | None = None
    ) -> tuple[Architecture, dict[str, Tensor]]:
        with owners_code(self._whose, "architecture_of"):
            # so that a type which cannot change anything need not take them
            changes = (overrides,) if overrides else ()
            architecture, tensors = self._inner.architecture_of(directory, *changes)
        return self._plain("architecture_of", architecture), self._tensors("architecture_of", tensors)

    def assets(self, architecture: Architecture, sources: Mapping[str, str]) -> tuple[Architecture, dict[str, bytes]]:
        with owners_code(self._whose, "assets"):
            completed, found = self._inner.assets(architecture, sources)
        if not (isinstance(found, dict) and all(isinstance(each, bytes) for each in found.values())):
            raise UserError(f"{self._whose}: its assets gave {_kind(found)}, not bytes by name; mend it")
        return self._plain("assets", completed), found

    def initial(self, architecture: Architecture, seed: int) -> dict[str, Tensor]:
        with owners_code(self._whose, "initial"):
            found = self._inner.initial(architecture, seed)
        return self._tensors("initial", found)

    def fit_private(
        self, samples: Samples, architecture: Architecture, settings: Mapping[str, Any], assets: Assets
    ) -> PrivateSpec:
        with owners_code(self._whose, "fit_private"):
            found = self._inner.fit_private(samples, architecture, settings, assets)
        return self._plain("fit_private", found)

    def build(self, architecture: Architecture, private: PrivateSpec, seed: int) -> EncoderModel:
        from common.encoders.base import EncoderModel

        with owners_code(self._whose, "build"):
            model = self._inner.build(architecture, private, seed)
        if not isinstance(model, EncoderModel):
            raise UserError(
                f"{self._whose}: its build gave {_kind(model)}, not an EncoderModel; derive it from the one in "
                "common/encoders/base.py"
            )
        for method in MODEL_METHODS:
            # a partial of a bound method is copied and pickled along with its model
            setattr(model, method, partial(_call, self._whose, method, getattr(model, method)))
        return model

    def export_shared(
        self,
        directory: Path,
        architecture: Architecture,
        tensors: Mapping[str, Tensor],
        card: str,
        assets: Assets,
    ) -> None:
        with owners_code(self._whose, "export_shared"):
            self._inner.export_shared(directory, architecture, tensors, card, assets)

    def _plain(self, method: str, found: Any) -> dict[str, Any]:
        """A value as it will be read back, since it is logged, sent and kept as JSON: a tuple becomes a list."""
        try:
            if isinstance(found, dict):
                # a spec stays in a file of this node, which Python reads with NaN in it too
                return dict(json.loads(json.dumps(found, allow_nan=method == "fit_private")))
        except (TypeError, ValueError, RecursionError):
            pass
        raise UserError(f"{self._whose}: its {method} gave {_kind(found)}, not a dictionary of plain JSON; mend it")

    def _tensors(self, method: str, found: Any) -> dict[str, Tensor]:
        if _are_tensors(found):
            return dict(found)
        raise UserError(f"{self._whose}: its {method} gave {_kind(found)}, not tensors by name; mend it")


def _call(whose: str, method: str, call: Any, *args: Any, **kwargs: Any) -> Any:
    with owners_code(whose, method):
        found = call(*args, **kwargs)
    if method == "loss" and not _is_scalar(found):
        raise UserError(f"{whose}: its loss gave {_kind(found)}, not one number to descend; mend it")
    if method in ("batch", "prepared", "shared_parameters") and not _are_tensors(found):
        raise UserError(f"{whose}: its {method} gave {_kind(found)}, not tensors by name; mend it")
    return found


def _is_scalar(found: Any) -> bool:
    from torch import Tensor

    return isinstance(found, Tensor) and found.numel() == 1


def _are_tensors(found: Any) -> bool:
    from torch import Tensor

    return isinstance(found, Mapping) and bool(found) and all(isinstance(each, Tensor) for each in found.values())


def _kind(found: Any) -> str:
    if found is None:
        return "None"
    name = type(found).__name__
    name = f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    if isinstance(found, Mapping) and found:
        return f"{name} with other things in it"
    return f"{name} of shape {tuple(found.shape)}" if hasattr(found, "shape") else name
