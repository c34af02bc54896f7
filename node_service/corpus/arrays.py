"""What an array of pictures may be: the same answer wherever the numbers come from, files or a function."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

Images = NDArray[np.uint8]

#: What becomes of transparent pixels: white shows through them, or transparency is one more channel.
Alpha = Literal["white", "channel"]

#: Channels of pictures with transparency: grey and colours.
_WITH_ALPHA = (2, 4)
#: Where one axis must be told from another: so many channels at most, and more pixels than that.
_FEW = 4
#: Pictures that are laid on white at a time, so that what is between is small.
_BLOCK = 1024


def as_images(
    array: NDArray[Any], where: object, mend: str = "correct field or reshape it", alpha: Alpha | None = None
) -> Images:
    """Images (n, height, width[, channels]) as uint8; numbers from 0 to 1 are scaled to 0 to 255.

    Of two or four channels the last may be transparency, and `alpha` has to say so. Raises UserError that begins with
    `where`, for another shape (with `mend`), channels that stand first, and values that are no pixels.
    """
    if array.ndim not in (3, 4) or not array.size:
        raise UserError(
            f"{where} holds no images: its array has shape {array.shape}, not (n, height, width[, channels]); {mend}"
        )
    _check_axes(array.shape, where)
    if array.ndim == 4 and array.shape[3] in _WITH_ALPHA and alpha is None:
        raise UserError(
            f"{where} holds images of {array.shape[3]} channels, of which the last may be transparency; set alpha = "
            '"white" to lay them on white, or alpha = "channel" if each channel is data'
        )
    found = pixels(array, where)
    return over_white(found) if array.ndim == 4 and array.shape[3] in _WITH_ALPHA and alpha == "white" else found


def over_white(images: Images) -> Images:
    """Pictures (…, channels + 1) on a white ground, (…, channels), grey without its one channel. The last channel is
    how much of a pixel covers it: colour · a + 255 · (1 − a), rounded."""
    blocks = []
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK].astype(np.uint32)
        colours, covers = block[..., :-1], block[..., -1:]
        blocks.append(((colours * covers + 255 * (255 - covers) + 127) // 255).astype(np.uint8))
    made = np.concatenate(blocks)
    return made[..., 0] if made.shape[-1] == 1 else made


def _check_axes(shape: tuple[int, ...], where: object) -> None:
    """Raises UserError for shapes that are (n, channels, height, width), or one picture alone, beyond doubt."""
    if len(shape) == 4:
        _, second, third, last = shape
        if (second <= _FEW < last) or (second < third == last):
            raise UserError(
                f"{where} holds an array of shape {shape}, whose channels seem to stand before height and width; turn "
                "it: numpy.moveaxis(x, 1, -1)"
            )
    elif shape[2] <= _FEW < shape[1]:
        raise UserError(
            f"{where} holds an array of shape {shape}, which seems to be one picture with {shape[2]} channels and not "
            f"{shape[0]} pictures that are {shape[2]} pixels wide; give it an axis for pictures: x[None]"
        )


def pixels(array: NDArray[Any], where: object) -> Images:
    """The numbers as uint8: whole ones from 0 to 255, or fractions from 0 to 1. Raises UserError for others."""
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
