"""What an owner is told of a corpus before a node trains on it: a line at every start, a page from `corpus check`.

The page quotes samples, so it is for the owner's own screen; the line quotes none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from common.sample_files.refusals import in_one_line, left_out_line, shown
from node_service.corpus.corpus import Corpus

#: Characters of a sample that are shown, names of labels, and things that were left out.
_CHARACTERS, _LABELS, _LEFT_OUT = 100, 5, 10
_EXAMPLES = 3


def first_line(corpus: Corpus) -> str:
    """How many samples of which kind there are, from what, and what was left out."""
    kinds = ", ".join(f"{count} {name}" for name, count in corpus.sources.kinds)
    left_out = left_out_line(corpus.sources.left_out)
    samples = _all(corpus)
    return (
        f"{corpus.type}: {len(samples):,} sample{'' if len(samples) == 1 else 's'}"
        + (f" from {kinds}" if kinds else "")
        + (f"; {size}" if (size := _size(samples)) else "")
        + (f"; left out: {left_out}" if left_out else "")
    )


def page(corpus: Corpus) -> list[tuple[str, str]]:
    """All that there is to see, as pairs of a heading and a line; the first is `first_line`."""
    rows = [("corpus", first_line(corpus)), ("parts", _parts(corpus))]
    labels = Counter([*(corpus.train_labels or ()), *(corpus.test_labels or ())])
    if labels:
        most = ", ".join(f"{_short(label)} ({count:,})" for label, count in labels.most_common(_LABELS))
        rest = len(labels) - _LABELS
        rows.append(("labels", f"{len(labels)}: {most}" + (f" and {rest} more" if rest > 0 else "")))
    rows += [("look at", line) for line in (*_odd(_all(corpus)), *_leaks(corpus))]
    train = corpus.train
    places = sorted({0, len(train) // 2, len(train) - 1})[:_EXAMPLES] if len(train) else []
    for place in places:
        label = f"  [{_short(corpus.train_labels[place])}]" if corpus.train_labels else ""
        rows.append(("example", _example(train[place]) + label))
    left_out = corpus.sources.left_out
    # the path says more than the name, except where the name counts rows
    rows += [("left out", f"{shown(each.path)}: {_reason(each.name, each.why)}") for each in left_out[:_LEFT_OUT]]
    if len(left_out) > _LEFT_OUT:
        rows.append(("left out", f"and {len(left_out) - _LEFT_OUT} more"))
    return rows


def _reason(name: str, why: str) -> str:
    count = name.partition(" in ")[0]
    return f"{count} {why}" if count.isdigit() else why


def _parts(corpus: Corpus) -> str:
    sizes = (len(corpus.train), len(corpus.validation), len(corpus.test))
    return "{:,} to train on, {:,} by which training is steered, {:,} held out".format(*sizes)


def _all(corpus: Corpus) -> list[Any]:
    return [*corpus.train, *corpus.validation, *corpus.test]


def _size(samples: Sequence[Any]) -> str:
    """Lengths of texts, shape and values of arrays; nothing for what neither is."""
    if not samples:
        return ""
    if all(isinstance(sample, str) for sample in samples):
        lengths = sorted(map(len, samples))
        return f"{lengths[0]:,} to {lengths[-1]:,} characters, {lengths[len(lengths) // 2]:,} in the middle"
    if all(isinstance(sample, np.ndarray) and sample.size and sample.dtype.kind in "biuf" for sample in samples):
        shapes = {sample.shape for sample in samples}
        shape = " x ".join(map(str, samples[0].shape)) if len(shapes) == 1 else f"{len(shapes)} shapes"
        lowest, highest = min(sample.min() for sample in samples), max(sample.max() for sample in samples)
        return f"{shape or 'numbers'}, values from {lowest:g} to {highest:g}"
    return ""


def _odd(samples: Sequence[Any]) -> Iterator[str]:
    """What may be meant, and often is a mistake: one line each."""
    texts = [sample for sample in samples if isinstance(sample, str)]
    for what, found in [
        ("a NUL, which no text needs", sum("\0" in text for text in texts)),
        ("the sign � of a conversion that went wrong", sum("\ufffd" in text for text in texts)),
    ]:
        if found:
            yield f"{what}: in {found:,} of {len(texts):,}"
    arrays = [sample for sample in samples if isinstance(sample, np.ndarray) and sample.dtype == np.uint8]
    if arrays and len(arrays) == len(samples):
        if max(int(array.max()) for array in arrays) <= 1:
            yield "no pixel is above 1 of 255: numbers from 0 to 1 are scaled if they are saved as float or bool"
        flat = sum(int(array.min()) == int(array.max()) for array in arrays)
        if flat:
            yield f"one value all over: {flat:,} of {len(arrays):,}"
    if len(texts) + len(arrays) == len(samples) and samples:
        different = len({_content(sample) for sample in samples})
        if different < len(samples):
            yield f"equal to another one: {len(samples) - different:,} of {len(samples):,}"


def _leaks(corpus: Corpus) -> Iterator[str]:
    """Held-out samples that are trained on too: what is measured on them says nothing."""
    trained = {_content(sample) for sample in corpus.train}
    leaked = sum(_content(sample) in trained for sample in corpus.test)
    if leaked:
        yield f"held out, and trained on too: {leaked:,} of {len(corpus.test):,}; correct path and test_path"


def _content(sample: Any) -> Any:
    return sample if isinstance(sample, str) else sample.tobytes() if isinstance(sample, np.ndarray) else repr(sample)


def _example(sample: Any) -> str:
    if isinstance(sample, str):
        return f"{len(sample):,} characters: {_short(sample)}"
    if isinstance(sample, np.ndarray) and sample.size and sample.dtype.kind in "biuf":
        shape = " x ".join(map(str, sample.shape))
        return f"{shape}, values from {sample.min():g} to {sample.max():g}, {sample.mean():.4g} in the mean"
    return _short(repr(sample))


def _short(text: str) -> str:
    """The beginning of a text, in one line for any terminal."""
    return in_one_line(text[:_CHARACTERS]) + (" …" if len(text) > _CHARACTERS else "")
