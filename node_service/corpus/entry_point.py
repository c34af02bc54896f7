"""Samples that a function of their owner gives, named as "module:function". What it raises is said as the owner's."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from common.config import suggestion
from common.encoders.owners_code import owners_code
from common.errors import UserError
from common.sample_files.decoding import check_unicode
from node_service.corpus.arrays import Alpha, as_images
from node_service.corpus.pictures import picture_array

log = structlog.get_logger()

_Labelled = tuple[Sequence[Any], list[str] | None]

#: sys.path belongs to the process, and nodes of a demo are threads of one: one load at a time changes it.
_PATH = threading.RLock()


def call_entry_point(name: str, encoder_type: str, beside: Path | None, alpha: Alpha | None = None) -> _Labelled:
    """The samples that "module:function" gives, or samples and labels (a tuple of the two), each any iterable.

    Text comes out as a list of str, images as one uint8 array, other types as they came, in a list or an array.
    Pictures of Pillow are read as files are, and arrays as those of .npz are (`alpha`: see `as_images`). The module is
    looked for in `beside` (the folder of the configuration file), in the current folder, and among what is installed.
    The two folders are on sys.path during the call alone, not for a later import.
    Raises UserError for a module that does not load and for samples that are none, OwnersCodeError for what the
    owner's code raises.
    """
    whose = f"entry_point {name!r}"
    module, _, function = name.partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{whose} names no function; write it as module:function, the module without its folder")
    folders = list(dict.fromkeys(folder.resolve() for folder in (beside, Path()) if folder is not None))
    with _searched(folders):
        call = _function(whose, module, function, folders)
        with owners_code(whose):
            given = call()
            pair = isinstance(given, tuple) and len(given) == 2
            samples = _sequence(whose, "samples", given[0] if pair else given)
            labels = _sequence(whose, "labels", given[1]) if pair and given[1] is not None else None
            texts = None if labels is None else [str(label) for label in labels]
    if len(samples) == 0:
        raise UserError(f"{whose} gave no samples; mend the function or set path")
    if texts is not None and len(texts) != len(samples):
        raise UserError(f"{whose} gave {len(samples)} samples and {len(texts)} labels; give one for each")
    for i, text in enumerate(texts or ()):
        check_unicode(text, f"{whose}: label {i}")
    return _fitting(whose, encoder_type, samples, alpha), texts


def given_samples(whose: str, encoder_type: str, given: Any) -> Sequence[Any]:
    """Samples that somebody has in memory, any iterable, as their type wants them; `whose` begins what errors say.

    Raises UserError for samples that are none, and if there is none.
    """
    samples = _sequence(whose, "samples", given)
    if len(samples) == 0:
        raise UserError(f"{whose} is empty; give samples")
    return _fitting(whose, encoder_type, samples, None)


def _sequence(whose: str, what: str, given: Any) -> Sequence[Any]:
    """Any iterable, a generator too, as a list; an array stays an array. Raises UserError for anything else."""
    if isinstance(given, np.ndarray) and given.ndim > 0:
        return cast("Sequence[Any]", given)  # in all that is asked of it here
    if not isinstance(given, str | bytes | Mapping | np.ndarray):
        if hasattr(given, "__iter__"):
            return list(given)
        if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
            return [given[i] for i in range(len(given))]
    raise UserError(
        f"{whose} gave {_thing(given)} where its {what} should be; give a list, or samples and labels as a tuple of two"
    )


def _fitting(whose: str, encoder_type: str, samples: Sequence[Any], alpha: Alpha | None) -> Sequence[Any]:
    """The samples as their type wants them. A type from another package checks its own."""
    match encoder_type:
        case "text":
            return _texts(whose, samples)
        case "image":
            return cast("Sequence[Any]", _images(whose, samples, alpha))
        case _:
            return samples


def _texts(whose: str, samples: Sequence[Any]) -> list[str]:
    """The samples as str. Raises UserError that names the first which is none, and counts the others."""
    wrong = [i for i, sample in enumerate(samples) if not isinstance(sample, str)]
    if wrong:
        first = f"{whose}: sample {wrong[0]} is {_kind(samples[wrong[0]])}, not str"
        others = f", and {len(wrong) - 1} others are none either" if len(wrong) > 1 else ""
        raise UserError(f"{first}{others}; give each sample's text, or leave it out")
    for i, sample in enumerate(samples):
        check_unicode(sample, f"{whose}: sample {i}")
    return [str(sample) for sample in samples]


def _images(whose: str, samples: Sequence[Any], alpha: Alpha | None) -> NDArray[np.uint8]:
    mend = "give one height, width and number of channels to all"
    if isinstance(samples, np.ndarray) and samples.dtype != np.object_:
        return as_images(samples, whose, mend, alpha)
    arrays: list[NDArray[Any]] = []
    for i, sample in enumerate(samples):
        array = _array(whose, i, sample, alpha)
        if array.ndim not in (2, 3) or array.dtype.kind not in "biuf" or not array.size:
            raise UserError(
                f"{whose}: sample {i} is {_kind(sample)}, not an image: an array (height, width[, channels]) of numbers"
            )
        if arrays and array.shape != arrays[0].shape:
            raise UserError(f"{whose}: sample {i} has shape {array.shape} and sample 0 {arrays[0].shape}; {mend}")
        arrays.append(array)
    return as_images(np.stack(arrays), whose, mend, alpha)


def _array(whose: str, i: int, sample: Any, alpha: Alpha | None) -> NDArray[Any]:
    # who has a picture of pillow's has loaded it: an owner whose samples are arrays need not have it at all
    pillow = sys.modules.get("PIL.Image")
    with owners_code(whose):  # a sample may have a conversion of its own
        if pillow is not None and isinstance(sample, pillow.Image):
            return picture_array(sample, f"{whose}: sample {i}", alpha)
        try:
            return np.asarray(sample)
        except ValueError:  # rows of different lengths
            return np.empty(0)


def _function(whose: str, module: str, function: str, folders: Sequence[Path]) -> Callable[[], Any]:
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # it runs the owner's module, which may raise anything
        log.debug("code that is not ours failed", whose=whose, exc_info=error)
        raise UserError(f"{whose} does not load: {_reason(error, module, folders)}") from error
    top = module.partition(".")[0]
    if taken := _taken(top, folders, regular=True):
        raise UserError(f"{whose} does not load: {taken}")
    found = getattr(loaded, function, None)
    if not callable(found):
        known = [name for name, value in vars(loaded).items() if callable(value) and not name.startswith("_")]
        hint = suggestion(function, known) if known else "it has none"
        raise UserError(f"{whose} does not load: {_place(loaded)} has no function {function!r}; {hint}")
    return found  # type: ignore[no-any-return]


def _reason(error: BaseException, module: str, folders: Sequence[Path]) -> str:
    """Why a module cannot be imported, and the mend."""
    name = ""
    if isinstance(error, ImportError):
        name = error.name or ""
    elif isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        name = error.obj.__name__
    top = name.partition(".")[0]
    if top and (taken := _taken(top, folders, regular=False)):
        return taken
    if isinstance(error, ModuleNotFoundError) and top:
        below = next((path for folder in folders for path in sorted(folder.glob(f"*/{top}.py"))), None)
        if below is not None:
            return f"{below} is in a folder that is not searched; start with PYTHONPATH={below.parent}, or move it"
        if module == name or module.startswith(f"{name}."):
            searched = ", ".join(map(str, folders))
            return (
                f"there is no module {name!r} in {searched}, nor an installed one; put it beside the configuration "
                "file, or start with PYTHONPATH=its folder"
            )
    words = next(iter(str(error).splitlines()), "")[:300] or "no message"
    return f"its module raised {type(error).__name__}: {words}; mend it or install what it needs"


def _taken(top: str, folders: Sequence[Path], *, regular: bool) -> str | None:
    """The error, if the owner has a module of this name but Python has already loaded another one under it."""
    known = sys.modules.get(top)
    shapes = (f"{top}.py", f"{top}/__init__.py") if regular else (f"{top}.py", top)
    own = next((path for folder in folders for shape in shapes if (path := folder / shape).exists()), None)
    if known is None or own is None:
        return None
    places = [Path(place) for place in (getattr(known, "__file__", None), *getattr(known, "__path__", ())) if place]
    if any(own.samefile(place) for place in places if place.exists()):
        return None
    return f"the name {top!r} is taken by {_place(known)}, so your {own} is not found; rename yours"


def _place(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), module.__name__))


def _kind(given: Any) -> str:
    return "None" if given is None else f"of type {type(given).__name__}"


def _thing(given: Any) -> str:
    return "None" if given is None else f"something of type {type(given).__name__}"


@contextmanager
def _searched(folders: Sequence[Path]) -> Iterator[None]:
    """Inside, modules are looked for in `folders` first; outside, sys.path is what it was."""
    with _PATH:
        before = list(sys.path)
        sys.path[:0] = map(str, folders)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path[:] = before
