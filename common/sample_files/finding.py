"""From the paths that an owner names to the files that are read. What happens to a file depends on the file alone, so a
folder, a glob and the paths of the same files give the same samples."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.sample_files.decoding import readable
from common.sample_files.kinds import SUFFIXES, Kind, SampleFile, kind_of, refusal, suffix_of
from common.sample_files.refusals import LeftOut, Refusals, left_out_line, shown

#: Folders and files that programs leave beside somebody's data, by name, and whose they are.
_FOLDERS = {
    "__MACOSX": "left by macOS",
    ".ipynb_checkpoints": "left by Jupyter",
    "__pycache__": "left by Python",
    "$RECYCLE.BIN": "left by Windows",
    "System Volume Information": "left by Windows",
    "@eaDir": "left by a file server",
}
_FILES = {
    ".DS_Store": "left by macOS",
    "Icon\r": "left by macOS",
    "Thumbs.db": "left by Windows",
    "desktop.ini": "left by Windows",
}
_BEGINNINGS = {"._": "left by macOS", "~$": "left by an office program"}
_ENDINGS = {
    "backup copies": ("~", ".bak", ".orig", ".rej"),
    "unfinished copies": (".swp", ".tmp", ".part", ".partial", ".crdownload"),
}
HIDDEN = "hidden"


@dataclass(frozen=True)
class Found:
    """The files to read, in order, and what lies among them and is no sample."""

    files: tuple[SampleFile, ...]
    left_out: tuple[LeftOut, ...]


def kinds_in_words(files: Iterable[SampleFile]) -> tuple[tuple[str, int], ...]:
    """How many files of each kind there are, in words ("plain text files (2 .txt, 1 .log)", 3), most first."""
    found: dict[Kind, Counter[str]] = {}
    for file in files:
        found.setdefault(file.kind, Counter())[suffix_of(file.path) or "without a suffix"] += 1
    words = []
    for kind, suffixes in sorted(found.items(), key=lambda item: -item[1].total()):
        name = kind.many if suffixes.total() > 1 else kind.one.partition(" ")[2]
        several = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        words.append((f"{name} ({several})" if len(suffixes) > 1 else name, suffixes.total()))
    return tuple(words)


def find_files(patterns: Sequence[str], encoder_type: str, base: Path, refusals: Refusals) -> Found:
    """The files of all patterns, sorted within each; a file that is named twice, or by a link too, is one.

    A pattern is a path, a folder (all below it, links followed), or a glob. Hidden files and folders below what is
    written out are left out, and so is what programs leave behind (`__MACOSX`, `Thumbs.db`, …) and what is of another
    encoder type. Gathered in `refusals` are a pattern without a match, files that may hold samples of the type in a
    kind that is not read, what is no file, and that nothing is left of all patterns together.
    """
    found: dict[str, SampleFile] = {}
    left_out: dict[Path, LeftOut] = {}
    named = len(refusals.lines)
    for pattern in patterns:
        with refusals.gathering():
            for path, root in _matches(pattern, base, refusals):
                if (reason := _leftover(path, root)) is not None:
                    left_out[reason.path] = reason
                    continue
                with refusals.gathering():
                    kind = _kind(path, encoder_type)
                    if kind.read_as == encoder_type:
                        found.setdefault(os.path.realpath(path), SampleFile(path, kind))
                    elif encoder_type in kind.refused_for:
                        raise UserError(refusal(path, kind))
                    else:
                        left_out[path] = LeftOut(shown(path.name), kind.many, path)
    if not found and len(refusals.lines) == named:
        refusals.add(_nothing(patterns, encoder_type, left_out.values()))
    return Found(tuple(found.values()), tuple(left_out.values()))


def _nothing(patterns: Sequence[str], encoder_type: str, left_out: Iterable[LeftOut]) -> str:
    there = left_out_line(left_out)
    return (
        f"{' '.join(map(shown, patterns))} holds no samples of type {encoder_type}"
        + (f", but what is left out: {there}" if there else "")
        + f"; they come in {' '.join(sorted(SUFFIXES[encoder_type]))}: correct path or type"
    )


def _kind(path: Path, encoder_type: str) -> Kind:
    if path.is_symlink() and not path.exists():
        raise UserError(f"{shown(path)} is a link to nothing; mend it, or take it out of path")
    with readable(path):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"{shown(path)} is a pipe or a device, which can be read only once; put a file there")
    return kind_of(path, encoder_type)


def _matches(pattern: str, base: Path, refusals: Refusals) -> list[tuple[Path, Path]]:
    """Every file that the pattern names or that lies below what it names, sorted, with the folder that is written out:
    what is hidden below it is hidden from the owner too. Raises UserError where nothing is there."""
    whole = base / _expanded(pattern)
    if os.path.lexists(whole):
        # a path that exists is meant literally, whatever brackets its name has
        is_folder = os.path.isdir(whole)
        root = whole if is_folder else whole.parent
        paths = list(_below(root, root, ("**",), {0}, refusals)) if is_folder else [whole]
    else:
        written = next((i for i, part in enumerate(whole.parts) if glob.has_magic(part)), len(whole.parts))
        root, parts = Path(*whole.parts[:written]), whole.parts[written:]
        paths = list(_below(root, root, parts, {0}, refusals)) if parts and os.path.isdir(root) else []
        if not paths:
            raise UserError(
                f"{shown(pattern)}: no such file and no match (looked in {base.absolute()}); correct the path"
            )
    return [(path, root) for path in sorted(paths, key=lambda path: path.parts)]


def _expanded(pattern: str) -> Path:
    try:
        return Path(pattern).expanduser()
    except RuntimeError:  # no home of that name: the sign is meant
        return Path(pattern)


def _below(
    folder: Path,
    root: Path,
    parts: tuple[str, ...],
    places: set[int],
    refusals: Refusals,
    above: frozenset[str] = frozenset(),
) -> Iterator[Path]:
    """Every file below a folder that the glob `parts` names, or a folder of it does; and the folders that are left out.

    `places` are those in the glob that the folder's own name has led to. Links are followed, but not back upwards: that
    is why this is no `glob.glob`, which goes around such a circle for forty levels.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        inside = sorted(os.listdir(folder))
    except OSError as error:
        refusals.add(f"{shown(folder)} cannot be read ({error.strerror}); correct its permissions")
        return
    for name in inside:
        path, reached = folder / name, _reached(name, parts, places)
        if not os.path.isdir(path):
            if len(parts) in reached:
                yield path
        elif reached and _leftover(path, root) is not None:
            yield path
        elif reached:
            yield from _below(path, root, parts, reached, refusals, above | {real})


def _reached(name: str, parts: tuple[str, ...], places: set[int]) -> set[int]:
    """The places in a glob that a name leads to from `places`; the end is one of them if it fits."""
    reached = set()
    for at in _skipping(places, parts):
        if at == len(parts) or parts[at] == "**":
            reached.add(at)  # what is in a folder that fits, and any name
        elif fnmatch.fnmatch(name, parts[at]):
            reached.add(at + 1)
    return _skipping(reached, parts)


def _skipping(places: set[int], parts: tuple[str, ...]) -> set[int]:
    """These places and those behind a ** at them, which may stand for no folder at all."""
    found = set(places)
    for place in places:
        while place < len(parts) and parts[place] == "**":
            place += 1
            found.add(place)
    return found


def _leftover(path: Path, root: Path) -> LeftOut | None:
    """Why the path is no sample, if its name or that of a folder above says so; of the uppermost that does."""
    last = len(path.parts) - 1
    for index, part in enumerate(path.parts):
        is_file = index == last and not os.path.isdir(path)
        why = _FOLDERS.get(part) or (_of_file(part) if is_file else None)
        if why is None and index >= len(root.parts) and part.startswith("."):
            why = HIDDEN
        if why is not None:
            return LeftOut(shown(part), why, Path(*path.parts[: index + 1]))
    return None


def _of_file(name: str) -> str | None:
    if name in _FILES:
        return _FILES[name]
    by_beginning = (why for beginning, why in _BEGINNINGS.items() if name.startswith(beginning))
    by_ending = (why for why, endings in _ENDINGS.items() if name.lower().endswith(endings))
    return next(by_beginning, None) or next(by_ending, None)
