"""Pictures as an owner sees them: upright, every page of a stack, and on white where they are transparent.

Pillow is imported when there is a picture: a node of texts does without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError
from common.extras import need
from common.sample_files.decoding import first_line
from common.sample_files.kinds import SampleFile
from common.sample_files.refusals import LeftOut, Refusals, shown
from node_service.corpus.arrays import Alpha, Images, over_white, pixels

if TYPE_CHECKING:
    from PIL import Image

#: A photo of a telephone with a second picture for its own use (depth, brightness) behind the first.
_WITH_EXTRAS = "MPO"
_MEND = "set image_size to scale all to one size"


def read_pictures(
    files: Sequence[SampleFile], image_size: int | None, alpha: Alpha | None, refusals: Refusals
) -> tuple[Images | None, list[str] | None, tuple[LeftOut, ...]]:
    """All pages of all pictures as one uint8 array (n, height, width[, channels]), their labels, and what was left out.

    A picture's label is its folder's name, if there are several folders. `image_size` scales to a square of so many
    pixels a side; without it all have one size. All grey is grey, else all is RGB; with `alpha` "channel" all is RGBA.
    None where nothing could be read; `refusals` gathers a line for each file that could not.
    """
    if files:
        need("PIL", "pictures need")
    found: list[tuple[Path, Images]] = []
    left_out: list[LeftOut] = []
    for file in files:
        with refusals.gathering():
            pages = [_scaled(page, image_size) for page in _pages(file.path, alpha, left_out)]
            for number, page in enumerate(pages, 1):
                if found and page.shape[:2] != found[0][1].shape[:2]:
                    where = shown(file.path) + (f" page {number}" if len(pages) > 1 else "")
                    raise UserError(
                        f"{where} is {_size(page)} and {shown(found[0][0])} is {_size(found[0][1])}; {_MEND}"
                    )
                found.append((file.path, page))
    if not found:
        return None, None, tuple(left_out)
    grey = all(page.ndim == 2 for _, page in found)
    stacked = np.stack([page if grey or page.ndim == 3 else np.stack([page] * 3, axis=-1) for _, page in found])
    folders = [path.parent.name for path, _ in found]
    return stacked, folders if len(set(folders)) > 1 else None, tuple(left_out)


def _size(page: Images) -> str:
    return f"{page.shape[1]}x{page.shape[0]}"


def _scaled(page: Images, image_size: int | None) -> Images:
    from PIL import Image

    return page if image_size is None else np.asarray(Image.fromarray(page).resize((image_size, image_size)))


def _pages(path: Path, alpha: Alpha | None, left_out: list[LeftOut]) -> Iterator[Images]:
    """Every page of a stack, or frame of an animation. Raises UserError that names the file."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pages = getattr(picture, "n_frames", 1)
            if picture.format == _WITH_EXTRAS and pages > 1:
                left_out.append(LeftOut(shown(path.name), "pictures behind a photo", path))
                pages = 1
            for number, page in enumerate(ImageSequence.Iterator(picture), 1):
                if number > pages:
                    break
                if alpha != "channel" and _shows_ground(page):
                    left_out.append(LeftOut(shown(path.name), "transparency, which is white now", path))
                yield picture_array(page, shown(path) + (f" page {number}" if pages > 1 else ""), alpha)
    except UnidentifiedImageError as error:
        raise UserError(f"{shown(path)} is not a picture; take it out of path") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{shown(path)} cannot be read ({first_line(error)}); save it again or take it out of path"
        ) from error


def _shows_ground(picture: Image.Image) -> bool:
    return picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] != 255


def picture_array(picture: Image.Image, where: str, alpha: Alpha | None) -> Images:
    """One picture as uint8 (height, width[, 3 or 4]), turned as its EXIF tag says.

    Transparent pixels are white, or with `alpha` "channel" the picture is RGBA. More than 8 bits a pixel are numbers,
    of which holds what holds for arrays: UserError that begins with `where` if they are no pixels.
    """
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "F" or upright.mode.startswith("I"):
        grey: Images = pixels(np.asarray(upright), where)
        return grey if alpha != "channel" else np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=-1)
    if alpha == "channel":
        mode = "RGBA"
    elif upright.has_transparency_data:
        mode = "LA" if upright.mode in ("L", "LA", "La") else "RGBA"
    else:
        mode = "L" if upright.mode in ("1", "L") else "RGB"
    made: Images = np.asarray(upright.convert(mode), dtype=np.uint8)
    return over_white(made[None])[0] if alpha != "channel" and mode.endswith("A") else made
