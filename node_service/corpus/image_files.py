"""Images and their labels out of .npz and .npy arrays and folders of pictures."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.sample_files.decoding import first_line
from common.sample_files.kinds import PICTURE, SampleFile
from common.sample_files.refusals import LeftOut, Refusals, shown
from common.sample_files.tables import label_text
from node_service.corpus.arrays import Alpha, Images, as_images
from node_service.corpus.pictures import read_pictures

#: Names that arrays of an .npz go by, in the order in which they are looked for; the test parts stand beside them.
_IMAGES = ("x_train", "x", "images", "data")
_LABELS = ("y_train", "y", "labels")

_Labelled = tuple[Any, list[str] | None]


@dataclass
class _Parts:
    """Arrays of one shape, which become one."""

    paths: list[Path] = field(default_factory=list)
    images: list[Images] = field(default_factory=list)
    labels: list[list[str] | None] = field(default_factory=list)

    def add(self, path: Path, images: Images, labels: list[str] | None) -> None:
        """Raises UserError for images of another shape than those before."""
        if self.images and images.shape[1:] != self.images[0].shape[1:]:
            raise UserError(
                f"{shown(path)} holds images of shape {images.shape[1:]} and {shown(self.paths[0])} of "
                f"{self.images[0].shape[1:]}; a corpus has one shape: make it two corpora"
            )
        self.paths.append(path)
        self.images.append(images)
        self.labels.append(labels)

    def joined(self) -> _Labelled:
        """All as one array, and their labels if every part has them."""
        if not self.images:
            return np.empty((0, 1, 1), np.uint8), None
        known = [labels for labels in self.labels if labels is not None]
        joined = [label for labels in known for label in labels]
        return np.concatenate(self.images), joined if len(known) == len(self.labels) else None


@dataclass(frozen=True)
class ImageOptions:
    """What of a CorpusConfig is about images."""

    field: str | None = None
    label: str | None = None
    image_size: int | None = None
    alpha: Alpha | None = None


def read_images(
    files: Sequence[SampleFile], wanted: ImageOptions, refusals: Refusals, test: bool = False
) -> tuple[_Labelled, _Labelled | None, tuple[LeftOut, ...]]:
    """All images as one uint8 array (n, height, width[, channels]), their labels if every one has one; the part that an
    .npz sets aside as x_test, if there is one; and what was left out.

    `field` and `label` name arrays of an .npz. A picture's label is its folder's name, if there are several folders.
    `image_size` scales pictures to a square of so many pixels a side. With `test`, x_test is preferred over x_train.
    `refusals` gathers a line for each file that cannot be read right.
    """
    parts, aside = _Parts(), _Parts()
    pictures = [file for file in files if file.kind is PICTURE]
    for file in files:
        if file.kind is not PICTURE:
            with refusals.gathering():
                _read_arrays(file.path, wanted, parts, aside, test)
    images, labels, left_out = read_pictures(pictures, wanted.image_size, wanted.alpha, refusals)
    if images is not None:
        with refusals.gathering():
            parts.add(pictures[0].path, images, labels)
    return parts.joined(), aside.joined() if aside.images else None, left_out


def _read_arrays(path: Path, wanted: ImageOptions, parts: _Parts, aside: _Parts, test: bool) -> None:
    """Adds the images of a file, and what it sets aside. Raises UserError."""
    found, where = _load(path), shown(path)
    name = _array_name(where, found, wanted.field, test)
    images = as_images(found[name], where, alpha=wanted.alpha)
    parts.add(path, images, _labels(found, where, wanted.label, name, len(images)))
    if name == "x_train" and "x_test" in found:
        images = as_images(found["x_test"], where, alpha=wanted.alpha)
        aside.add(path, images, _labels(found, where, wanted.label, "x_test", len(images)))


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with _loadable(path):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}


@contextmanager
def _loadable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError) as error:
        raise UserError(
            f"{shown(path)} is not readable as {path.suffix} ({first_line(error)}); save it again with numpy"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"{shown(path)} is larger than this machine's memory, or damaged; save it again, in parts"
        ) from error
    except OSError as error:
        raise UserError(
            f"{shown(path)} cannot be read ({error.strerror or error}); correct path or its permissions"
        ) from error


def _array_name(where: str, found: dict[str, NDArray[Any]], field: str | None, test: bool) -> str:
    if "" in found:
        return ""
    candidates = [field] if field is not None else [*(["x_test"] if test else []), *_IMAGES]
    for name in candidates:
        if name in found:
            return name
    raise UserError(f"{where}: no array {candidates[0]!r}; set field to one of {', '.join(map(repr, found)) or 'none'}")


def _labels(found: dict[str, NDArray[Any]], where: str, label: str | None, images: str, count: int) -> list[str] | None:
    own_test = images == "x_test"
    candidates = [label] if label is not None and not own_test else ["y_test"] if own_test else _LABELS
    name = next((name for name in candidates if name in found), None)
    if name is None:
        if label is not None and not own_test:
            raise UserError(f"{where}: no array {label!r}; correct label in the configuration, or leave it out")
        return None
    labels = found[name]
    if labels.shape != (count,):
        raise UserError(f"{where}: array {name!r} has shape {labels.shape} for {count} images; give one label for each")
    return [label_text(value, where) or "" for value in labels.tolist()]
