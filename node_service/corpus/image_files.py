"""Images and their labels out of .npz and .npy arrays and folders of pictures."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})
SUFFIXES = _PICTURES | {".npz", ".npy"}

#: Names that arrays of an .npz go by, in the order in which they are looked for; the test parts stand beside them.
_IMAGES = ("x_train", "x", "images", "data")
_LABELS = ("y_train", "y", "labels")

_Images = NDArray[np.uint8]
_Labelled = tuple[Any, list[str] | None]


def read_images(
    files: Sequence[Path], field: str | None, label: str | None, image_size: int | None, test: bool = False
) -> tuple[_Labelled, _Labelled | None]:
    """All images as one uint8 array (n, height, width[, channels]), their labels if every one has one, and the part
    that an .npz sets aside as x_test, if there is one.

    `field` and `label` name arrays of an .npz. A picture's label is its folder's name, if there are several folders.
    `image_size` scales pictures to a square of so many pixels a side. With `test`, x_test is preferred over x_train.
    Raises UserError naming the file and the mend.
    """
    arrays = [path for path in files if path.suffix.lower() in (".npz", ".npy")]
    pictures = [path for path in files if path not in set(arrays)]
    parts: list[tuple[Path, _Images, list[str] | None]] = []
    set_aside: list[tuple[Path, _Images, list[str] | None]] = []
    for path in arrays:
        found = _load(path)
        name = _array_name(path, found, field, test)
        parts.append((path, as_images(found[name], path), _labels(found, path, label, name, len(found[name]))))
        if name == "x_train" and "x_test" in found:
            aside = found["x_test"]
            set_aside.append((path, as_images(aside, path), _labels(found, path, label, "x_test", len(aside))))
    if pictures:
        parts.append((pictures[0], *_pictures(pictures, image_size)))
    held_out = _joined(set_aside) if set_aside else None
    return _joined(parts), held_out


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is not readable as {path.suffix} ({reason}); save it again with numpy") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); correct path or its permissions"
        ) from error


def _array_name(path: Path, found: dict[str, NDArray[Any]], field: str | None, test: bool) -> str:
    if "" in found:
        return ""
    candidates = [field] if field is not None else [*(["x_test"] if test else []), *_IMAGES]
    for name in candidates:
        if name in found:
            return name
    raise UserError(f"{path}: no array {candidates[0]!r}; set field to one of {', '.join(map(repr, found)) or 'none'}")


def _labels(found: dict[str, NDArray[Any]], path: Path, label: str | None, images: str, count: int) -> list[str] | None:
    own_test = images == "x_test"
    candidates = [label] if label is not None and not own_test else ["y_test"] if own_test else _LABELS
    name = next((name for name in candidates if name in found), None)
    if name is None:
        if label is not None and not own_test:
            raise UserError(f"{path}: no array {label!r}; correct label in the configuration, or leave it out")
        return None
    labels = found[name]
    if labels.shape != (count,):
        raise UserError(f"{path}: array {name!r} has shape {labels.shape} for {count} images; give one label for each")
    return [str(value) for value in labels.tolist()]


def as_images(array: NDArray[Any], where: object, mend: str = "correct field or reshape it") -> _Images:
    """Images (n, height, width[, channels]) as uint8; numbers from 0 to 1 are scaled to 0 to 255.

    Raises UserError that begins with `where` the array is from; `mend` is for one of another shape.
    """
    if array.ndim not in (3, 4) or not array.size:
        raise UserError(
            f"{where} holds no images: its array has shape {array.shape}, not (n, height, width[, channels]); {mend}"
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where} holds {array.dtype} values, not pixels; save it as uint8")
    lowest, highest = float(array.min()), float(array.max())
    if array.dtype.kind in "iu" and lowest >= 0 and highest <= 255:
        return array.astype(np.uint8)
    if array.dtype.kind in "bf" and lowest >= 0 and highest <= 1:
        return np.round(array.astype(np.float32) * 255).astype(np.uint8)
    raise UserError(
        f"{where} holds {array.dtype} values from {lowest:g} to {highest:g}; save whole numbers from 0 to 255, "
        "or fractions from 0 to 1"
    )


def _pictures(files: Sequence[Path], image_size: int | None) -> _Labelled:
    from PIL import Image, UnidentifiedImageError

    grey = True
    pictures: list[Image.Image] = []
    for path in files:
        try:
            with Image.open(path) as picture:
                grey = grey and picture.mode in ("1", "L")
                colours = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        except UnidentifiedImageError as error:
            raise UserError(f"{path} is not a picture; take it out of path") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read ({error}); save it again or take it out of path") from error
        if image_size is not None:
            colours = colours.resize((image_size, image_size))
        elif pictures and colours.size != pictures[0].size:
            raise UserError(
                f"{path} is {colours.width}x{colours.height} and {files[0]} is "
                f"{pictures[0].width}x{pictures[0].height}; set image_size to scale all to one size"
            )
        pictures.append(colours)
    mode = "L" if grey else "RGB"
    folders = [path.parent.name for path in files]
    stacked = np.stack([np.asarray(picture.convert(mode), dtype=np.uint8) for picture in pictures])
    return stacked, folders if len(set(folders)) > 1 else None


def _joined(parts: Sequence[tuple[Path, _Images, list[str] | None]]) -> _Labelled:
    first, images, _ = parts[0]
    for path, other, _ in parts[1:]:
        if other.shape[1:] != images.shape[1:]:
            raise UserError(
                f"{path} holds images of shape {other.shape[1:]} and {first} of {images.shape[1:]}; "
                "a corpus has one shape: make it two corpora"
            )
    known = [labels for _, _, labels in parts if labels is not None]
    joined = [label for labels in known for label in labels]
    return np.concatenate([part for _, part, _ in parts]), joined if len(known) == len(parts) else None
