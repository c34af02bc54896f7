"""Pictures as their owner sees them, and the same answer for the same data in pictures, arrays and from a function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from common.errors import UserError
from node_service.corpus.arrays import as_images, over_white
from node_service.corpus.corpus import Corpus, CorpusConfig, load_corpus

RGB = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
GREY = RGB[..., 0]
OTHER = 255 - RGB
HOLES = np.dstack([RGB, np.where(np.arange(8)[:, None] < 4, 0, 255).astype(np.uint8).repeat(6, axis=1)])
ON_WHITE = np.where(HOLES[..., 3:] > 0, RGB, np.uint8(255))

_modules = itertools.count()


def load(path: Path | str, **settings: Any) -> Corpus:
    return load_corpus(CorpusConfig(type="image", path=str(path), held_out=0, validation=0, **settings))


def of_function(folder: Path, samples: Sequence[Any], **settings: Any) -> Corpus:
    """The corpus of an entry point that gives these samples."""
    module = f"owners_pictures_{next(_modules)}"
    (folder / f"{module}.py").write_text("SAMPLES = []\n\ndef load():\n    return SAMPLES\n")
    import sys

    sys.path.insert(0, str(folder))
    try:
        __import__(module).SAMPLES.extend(samples)
        config = CorpusConfig(type="image", entry_point=f"{module}:load", held_out=0, validation=0, **settings)
        return load_corpus(config)
    finally:
        sys.path.remove(str(folder))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_picture_is_read_as_its_tag_says_that_it_is_seen(tmp_path: Path, suffix: str) -> None:
    lossless = {"lossless": True} if suffix == "webp" else {}
    for orientation, seen in [(1, RGB), (3, np.rot90(RGB, 2)), (6, np.rot90(RGB, -1)), (2, RGB[:, ::-1])]:
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(RGB).save(path, exif=turned(orientation), **lossless)
        assert np.array_equal(load(path).train, seen[None]), orientation


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_every_page_of_a_stack_and_every_frame_is_a_sample(tmp_path: Path, suffix: str) -> None:
    flat = [np.full((8, 6), value, np.uint8) for value in (0, 120, 250)]
    first, *rest = map(Image.fromarray, flat)
    lossless = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"stack.{suffix}", save_all=True, append_images=rest, **lossless)
    train = load(tmp_path).train
    assert [int(page.max()) for page in train] == [int(page.min()) for page in train] == [0, 120, 250]


def test_the_picture_behind_a_photo_is_left_out_and_said(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.fromarray(OTHER)])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    corpus = load(tmp_path)
    assert len(corpus.train) == 1 and [left.why for left in corpus.sources.left_out] == ["pictures behind a photo"]


def _saved(array: np.ndarray, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(array).save(path, **options)


def _palette(path: Path) -> None:
    palette = Image.fromarray(HOLES).quantize(64, method=Image.Quantize.FASTOCTREE)
    palette.save(path)


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        (_saved(HOLES), ON_WHITE),
        (_saved(np.dstack([RGB, np.full((8, 6), 255, np.uint8)])), RGB),
        (_saved(np.dstack([GREY, HOLES[..., 3]])), np.where(HOLES[..., 3] > 0, GREY, np.uint8(255))),
        (_saved(np.full((8, 6), 7, np.uint8), transparency=7), np.full((8, 6), 255, np.uint8)),
    ],
    ids=["colours", "nothing transparent", "grey", "one grey that is transparent"],
)
def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path: Path, save: Any, expected: Any) -> None:
    save(tmp_path / "a.png")
    corpus = load(tmp_path)
    assert np.array_equal(corpus.train, expected[None])
    said = [left.why for left in corpus.sources.left_out]
    assert said == ([] if np.array_equal(expected, RGB) else ["transparency, which is white now"])


def test_a_palette_is_its_colours_and_its_transparent_ones_are_white(tmp_path: Path) -> None:
    _palette(tmp_path / "a.png")
    [read] = load(tmp_path).train
    assert read.shape == (8, 6, 3) and (read[:4] == 255).all() and not (read[4:] == 255).all()


@pytest.mark.parametrize("alpha", [None, "white", "channel"])
def test_the_same_data_have_the_same_answer_in_pictures_arrays_and_from_a_function(
    tmp_path: Path, alpha: str | None
) -> None:
    """What a picture says of itself (it has transparency) an array cannot say, so there it must be set."""
    stack = np.stack([HOLES, HOLES[::-1]])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, each in enumerate(stack):
        Image.fromarray(each).save(pictures / f"{i}.png")
    np.save(tmp_path / "a.npy", stack)
    np.savez(tmp_path / "a.npz", x=stack)
    expected = stack if alpha == "channel" else np.stack([ON_WHITE, ON_WHITE[::-1]])
    options = {"alpha": alpha}
    assert np.array_equal(load(pictures, **options).train, expected)
    opened = [Image.open(path) for path in sorted(pictures.iterdir())]
    assert np.array_equal(of_function(tmp_path, opened, **options).train, expected)
    arrays: list[Callable[[], Corpus]] = [
        lambda: load(tmp_path / "a.npy", **options),
        lambda: load(tmp_path / "a.npz", **options),
        lambda: of_function(tmp_path, list(stack), **options),
    ]
    for read in arrays:
        if alpha is None:
            with pytest.raises(UserError, match='4 channels, of which the last may be transparency; set alpha = "whit'):
                read()
        else:
            assert np.array_equal(read().train, expected)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (GREY.astype(np.uint16), None),
        (GREY.astype(np.uint16) * 257, "holds uint16 values from"),
        (GREY.astype(np.int32), None),
        (GREY.astype(np.float32) / 255, None),
        (GREY.astype(np.float32), "holds float32 values from"),
        (np.full((8, 6), np.nan, np.float32), "holds float32 values from nan to nan"),
    ],
    ids=["16 bits of 8", "16 bits", "whole numbers", "fractions", "floats", "NaN"],
)
def test_more_than_eight_bits_are_numbers_in_pictures_as_in_arrays(tmp_path: Path, page: Any, said: str | None) -> None:
    Image.fromarray(page).save(tmp_path / "a.tif")
    np.save(tmp_path / "a.npy", page[None])
    for name in ("a.tif", "a.npy"):
        if said is None:
            assert np.array_equal(load(tmp_path / name).train, GREY[None]), name
        else:
            with pytest.raises(UserError, match=said) as caught:
                load(tmp_path / name)
            assert name in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((5, 3, 32, 32), r"channels seem to stand before .*; turn it: numpy.moveaxis\(x, 1, -1\)"),
        ((5, 1, 28, 28), "channels seem to stand before"),
        ((5, 13, 64, 64), "channels seem to stand before"),
        ((5, 3, 20, 30), "channels seem to stand before"),
        ((32, 32, 3), "seems to be one picture with 3 channels"),
        ((5, 32, 32, 3), None),
        ((5, 20, 30, 1), None),
        ((5, 64, 64, 13), None),
        ((5, 8, 8, 13), None),
        ((5, 4, 4), None),
        ((5, 28, 28), None),
    ],
)
def test_channels_that_stand_first_are_refused_with_what_turns_them(
    tmp_path: Path, shape: tuple[int, ...], said: str | None
) -> None:
    array = np.zeros(shape, np.uint8)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array)
    reads: list[Callable[[], Corpus]] = [lambda: load(tmp_path / "a.npy"), lambda: load(tmp_path / "a.npz")]
    if len(shape) == 4:
        reads.append(lambda: of_function(tmp_path, list(array)))
    for read in reads:
        if said is None:
            assert np.shape(read().train) == shape
        else:
            with pytest.raises(UserError, match=said):
                read()


@settings(max_examples=50, deadline=None)
@given(images=st_numpy.arrays(np.uint8, st.tuples(*[st.integers(1, 4)] * 3, st.sampled_from([2, 4]))))
def test_on_white_no_hidden_colour_is_left_and_none_that_covers_is_changed(images: np.ndarray) -> None:
    made = over_white(images)
    colours = made[..., None] if images.shape[-1] == 2 else made
    cover = images[..., -1:]
    exact = (images[..., :-1].astype(float) * cover + 255.0 * (255 - cover)) / 255
    assert np.abs(colours - exact).max() <= 0.5
    assert (colours[(cover == 0)[..., 0]] == 255).all()
    covered = (cover == 255)[..., 0]
    assert np.array_equal(colours[covered], images[..., :-1][covered])


def test_pictures_that_differ_in_size_are_all_named(tmp_path: Path) -> None:
    for i, width in enumerate((6, 6, 7, 8)):
        Image.new("L", (width, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert "2.png is 7x8 and" in str(caught.value) and "3.png is 8x8 and" in str(caught.value)
    assert np.shape(load(tmp_path, image_size=4).train) == (4, 4, 4)


def test_as_images_leaves_bytes_as_they_are() -> None:
    images = np.stack([RGB, OTHER])
    assert as_images(images, "x") is images
