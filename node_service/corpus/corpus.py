"""The node's private corpus: from what its owner configured to training and held-out samples. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from common.errors import UserError
from common.sample_files.finding import Found, find_files, kinds_in_words
from common.sample_files.kinds import SUFFIXES
from common.sample_files.refusals import LeftOut, Refusals
from common.sample_files.texts import read_texts
from node_service.corpus.arrays import Alpha
from node_service.corpus.entry_point import call_entry_point, given_samples
from node_service.corpus.image_files import ImageOptions, read_images

#: Rows of the validation part at most, and training rows that there must be for one.
MOST_VALIDATION, FEWEST_FOR_VALIDATION = 2000, 40
_VALIDATION_SEED = 0

_Labelled = tuple[Sequence[Any], list[str] | None]


class CorpusConfig(BaseModel):
    """One corpus as its owner describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str = Field("text", description="encoder type that the samples are for")
    path: tuple[str, ...] = Field((), description="files, folders or globs (** for all levels)")
    test_path: tuple[str, ...] = Field(
        (), description="held-out samples of their own; else a part of `path` is held out"
    )
    entry_point: str | None = Field(
        None,
        description='"module:function" that gives the samples; beside the configuration file or in the current folder',
    )
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the samples that is never trained on")
    validation: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of the rest by whose loss training is steered: measured, and never trained on",
    )
    limit: int | None = Field(None, ge=1, description="at most this many samples, spread over the corpus")
    field: str | None = Field(None, description="text field of a table (text), array of .npz (x_train, x, …)")
    label: str | None = Field(None, description="label field or array, for probes only; by default label, y_train, …")
    only: tuple[str, ...] = Field((), description="of the samples, those with one of these labels alone")
    documents: Literal["auto", "file", "paragraph", "line"] = Field(
        "auto",
        description="what one sample of a plain text file is; auto: the file if ten or more match, else the paragraph",
    )
    image_size: int | None = Field(None, ge=1, description="pixels a side that pictures are scaled to")
    alpha: Alpha | None = Field(
        None,
        description='transparent pixels: "white" ground (pictures, by default), or a "channel" of their own; arrays of '
        "two or four channels must say which",
    )

    @field_validator("path", "test_path", "only", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _one_source(self) -> CorpusConfig:
        if bool(self.path) == (self.entry_point is not None):
            raise ValueError("give either path or entry_point")
        if self.test_path and not self.path:
            raise ValueError("test_path needs path; an entry point splits by held_out")
        return self


@dataclass(frozen=True)
class Sources:
    """Where samples came from: kinds of files with their numbers ("CSV tables", 2), and what was left out and why."""

    kinds: tuple[tuple[str, int], ...] = ()
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Samples of one encoder type; labels, for probes only, are there for every sample or not at all.

    `train` and `test` are lists of str for text, uint8 arrays (n, height, width[, channels]) for images, and for other
    types the list or array that an entry point gave. `test` may be empty (`held_out` 0), and so may `validation`.
    By `test` nothing is chosen: what is chosen while training goes on is chosen by `validation`.
    """

    type: str
    train: Sequence[Any]
    train_labels: list[str] | None
    test: Sequence[Any]
    test_labels: list[str] | None
    validation: Sequence[Any] = ()
    sources: Sources = Sources()


def select_corpus(configs: Sequence[CorpusConfig], encoder_type: str) -> CorpusConfig:
    """The first corpus of this type. Raises UserError, the node's refusal of an instruction, if there is none."""
    for config in configs:
        if config.type == encoder_type:
            return config
    have = ", ".join(sorted({config.type for config in configs})) or "nothing"
    raise UserError(
        f"no samples of type {encoder_type}: this node's configuration names {have}; "
        f'add a corpus with type = "{encoder_type}" to it'
    )


def load_corpus(config: CorpusConfig, base: Path | None = None, *, beside: Path | None = None) -> Corpus:
    """Read and split a corpus; relative paths start at `base` (default: the current folder).

    The module of an entry point is looked for in `beside`, the folder of the configuration file, first.

    The held-out part follows from the samples' content alone: it is the same on every run and whatever is added, and
    equal samples are on one side. Raises FilesRefused, which names all files that cannot be read right, UserError for
    what else is wrong, and OwnersCodeError for what the function of an entry point raises.
    """
    if config.entry_point is not None:
        (samples, labels), test = call_entry_point(config.entry_point, config.type, beside, config.alpha), None
        sources = Sources((("entry point", 1),))
    else:
        (samples, labels), test, sources = _from_files(config, base or Path())
    samples, labels = _only(samples, labels, config)
    test = None if test is None else _only(*test, config)
    kept = _limited(samples, config.limit)
    samples, labels = _take(samples, labels, kept)
    train = list(range(len(samples)))
    if test is None:
        train, held_out = _split(samples, config.held_out, config)
        test = _take(samples, labels, held_out)
    train, validation = _without_validation([samples[i] for i in train], train, config.validation)
    return Corpus(config.type, *_take(samples, labels, train), *test, _take(samples, None, validation)[0], sources)


def corpus_of(samples: Any, whose: str, encoder_type: str = "text") -> Corpus:
    """Samples that are in memory: texts in any iterable, images as `as_images` takes them. Split by their content, as
    `load_corpus` splits by default. `whose` begins what errors say. Raises UserError for samples that are none."""
    given, shares = given_samples(whose, encoder_type, samples), CorpusConfig.model_fields
    try:
        train, test = split_by_content(given, shares["held_out"].default)
    except ValueError:
        raise UserError(f"{whose} has no two samples that differ; a part is held out, so give more of them") from None
    train, validation = _without_validation([given[i] for i in train], train, shares["validation"].default)
    return Corpus(encoder_type, taken(given, train), None, taken(given, test), None, taken(given, validation))


def _from_files(config: CorpusConfig, base: Path) -> tuple[_Labelled, _Labelled | None, Sources]:
    """The samples, the held-out ones where they come from files of their own, and where all came from."""
    if config.type not in SUFFIXES:
        raise UserError(f"samples of type {config.type} are not read from files; set entry_point instead of path")
    refusals = Refusals()
    found = find_files(config.path, config.type, base, refusals)
    samples, set_aside, left_out = _read(config, found, refusals)
    files = found.files
    if config.test_path:
        others = find_files(config.test_path, config.type, base, refusals)
        set_aside, _, more = _read(config, others, refusals, test=True)
        files, left_out = (*files, *others.files), (*left_out, *more)
    refusals.check()
    return samples, set_aside, Sources(kinds_in_words(files), left_out)


def _read(
    config: CorpusConfig, found: Found, refusals: Refusals, *, test: bool = False
) -> tuple[_Labelled, _Labelled | None, tuple[LeftOut, ...]]:
    """The samples of the files, those that a file sets aside, and all that was left out."""
    if config.type == "image":
        wanted = ImageOptions(config.field, config.label, config.image_size, config.alpha)
        images, set_aside, left_out = read_images(found.files, wanted, refusals, test)
        return images, set_aside, (*found.left_out, *left_out)
    texts = read_texts(found.files, config.field or "text", config.label, config.documents, refusals)
    return (texts.texts, texts.labels), None, (*found.left_out, *texts.left_out)


def _digest(sample: Any) -> tuple[float, int]:
    """Two numbers that follow from the sample's content: one in [0, 1) for the split, one for the order of a limit."""
    if isinstance(sample, str):
        raw = sample.encode("utf-8", "surrogatepass")
    else:
        raw = sample.tobytes() if isinstance(sample, np.ndarray) else repr(sample).encode()
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    return int.from_bytes(digest[:7], "big") / 2**56, int.from_bytes(digest[8:], "big")


def _limited(samples: Sequence[Any], limit: int | None) -> list[int]:
    """Which samples a limit keeps, in their order: chosen by content, because files are often sorted by label."""
    if limit is None or limit >= len(samples):
        return list(range(len(samples)))
    by_content = sorted(range(len(samples)), key=lambda i: (_digest(samples[i])[1], i))
    return sorted(by_content[:limit])


def _split(samples: Sequence[Any], held_out: float, config: CorpusConfig) -> tuple[list[int], list[int]]:
    """Indices for training and held out; neither is empty unless `held_out` is 0."""
    if not held_out:
        return list(range(len(samples))), []
    try:
        return split_by_content(samples, held_out)
    except ValueError:
        source = config.entry_point or " ".join(config.path)
        what = "one sample" if len(samples) == 1 else f"{len(samples)} equal samples"
        as_text = 'set documents = "paragraph" or "line", or test_path'
        mend = "give others" if not config.path else as_text if config.type == "text" else "set test_path"
        raise UserError(
            f"{source}: {what} cannot be split for the held-out part; {mend}, or set held_out = 0"
        ) from None


def taken(samples: Sequence[Any], rows: Iterable[int]) -> Any:
    """These rows of a list or an array."""
    return samples[list(rows)] if isinstance(samples, np.ndarray) else [samples[row] for row in rows]


def split_by_content(samples: Sequence[Any], held_out: float) -> tuple[list[int], list[int]]:
    """Indices of about 1 − `held_out` of the samples, and of the others; neither is empty, and equal samples are on one
    side, always the same. Raises ValueError where all samples are equal, or there are none."""
    everything = list(range(len(samples)))
    places = [_digest(sample)[0] for sample in samples]
    if len(set(places)) < 2:
        raise ValueError("samples that are all the same cannot be split")
    lowest, highest = min(places), max(places)
    below = {i for i in everything if places[i] == lowest or (places[i] < held_out and places[i] != highest)}
    return [i for i in everything if i not in below], sorted(below)


def _without_validation(rows: Sequence[Any], indices: list[int], share: float) -> tuple[list[int], list[int]]:
    """The indices that stay in training, and those of the validation part; `rows` are the samples at `indices`.

    Whole documents are drawn, by a fixed seed from their order: equal samples go together. The part is as large as
    `share` of the rows says or smaller, and empty for few rows.
    """
    most = min(MOST_VALIDATION, max(1, round(share * len(rows)))) if share > 0 else 0
    if len(rows) < FEWEST_FOR_VALIDATION or most == 0:
        return indices, []
    equal: dict[tuple[float, int], list[int]] = {}
    for index, row in zip(indices, rows, strict=True):
        equal.setdefault(_digest(row), []).append(index)
    documents, drawn = list(equal.values()), set[int]()
    for place in np.random.default_rng(_VALIDATION_SEED).permutation(len(documents)):
        if len(drawn) + len(documents[place]) <= most:
            drawn.update(documents[place])
        if len(drawn) == most:
            break
    return [i for i in indices if i not in drawn], sorted(drawn)


def _only(samples: Sequence[Any], labels: list[str] | None, config: CorpusConfig) -> _Labelled:
    """The samples with one of the wanted labels; all where none is named. Raises UserError if none has one."""
    if not config.only:
        return samples, labels
    wanted = set(config.only)
    chosen = [i for i, label in enumerate(labels or ()) if label in wanted]
    if not chosen:
        there = ", ".join(sorted(set(labels or ()))[:10]) or "none"
        raise UserError(f"no sample has a label of only = {', '.join(config.only)}; labels there: {there}")
    return _take(samples, labels, chosen)


def _take(samples: Sequence[Any], labels: list[str] | None, indices: list[int]) -> _Labelled:
    return taken(samples, indices), None if labels is None else [labels[i] for i in indices]
