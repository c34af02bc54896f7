"""From the paths that an owner names to the files that are read. What happens to a file depends on the file alone, so a
folder, a glob and the paths of the same files give the same samples."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.sample_files.kinds import SUFFIXES, Kind, SampleFile, kind_of, refusal
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
    """How many files of each kind there are, in words ("CSV tables", 2), most first."""
    counts = Counter(file.kind for file in files).most_common()
    return tuple((kind.many if count > 1 else kind.one.partition(" ")[2], count) for kind, count in counts)


def find_files(patterns: Sequence[str], encoder_type: str, base: Path, refusals: Refusals) -> Found:
    """The files of all patterns, sorted within each; a file that is named twice, or by a link too, is one.

    A pattern is a path, a folder (all below it, links followed), or a glob. Hidden files and folders below what is
    written out are left out, and so is what programs leave behind (`__MACOSX`, `Thumbs.db`, …) and what is of another
    encoder type. Gathered in `refusals` are a pattern without a match, files that may hold samples of the type in a
    kind that is not read, files that are no files, and patterns in which nothing is left.
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
                        raise UserError(refusal(path, kind, encoder_type))
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
    if path.is_file():
        return kind_of(path, encoder_type)
    what = "a link to nothing" if path.is_symlink() else "no file but a pipe or a device, which is read only once"
    raise UserError(f"{shown(path)} is {what}; put a file there, or take it out of path")


def _matches(pattern: str, base: Path, refusals: Refusals) -> list[tuple[Path, Path]]:
    """Every file below what the pattern names, sorted, with the folder that is written out: what is hidden below it is
    hidden from the owner too. Raises UserError where nothing is there."""
    whole = base / _expanded(pattern)
    if os.path.lexists(whole):
        # a path that exists is meant literally, whatever brackets its name has
        tops, root = [whole], whole if whole.is_dir() else whole.parent
    else:
        tops = [Path(match) for match in glob.glob(str(whole), recursive=True, include_hidden=True)]
        written = next(i for i, part in enumerate((*whole.parts, "*")) if glob.has_magic(part))
        root = Path(*whole.parts[:written])
    if not tops:
        raise UserError(f"{shown(pattern)}: no such file and no match (looked in {base.absolute()}); correct the path")
    paths = [inside for top in tops for inside in (_below(top, root, refusals) if top.is_dir() else (top,))]
    nearest: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path.parts)):
        nearest.setdefault(os.path.realpath(path), path)
    return [(path, root) for path in sorted(nearest.values(), key=lambda path: path.parts)]


def _expanded(pattern: str) -> Path:
    try:
        return Path(pattern).expanduser()
    except RuntimeError:  # no home of that name: the sign is meant
        return Path(pattern)


def _below(folder: Path, root: Path, refusals: Refusals, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Every file below a folder, and the folders that are left out. Links are followed, but not back upwards."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        inside = list(os.scandir(folder))
    except OSError as error:
        refusals.add(f"{shown(folder)} cannot be read ({error.strerror}); correct its permissions")
        return
    for entry in inside:
        path = folder / entry.name
        if entry.is_dir() and _leftover(path, root) is None:
            yield from _below(path, root, refusals, above | {real})
        else:
            yield path


def _leftover(path: Path, root: Path) -> LeftOut | None:
    """Why the path is no sample, if its name or that of a folder above says so; of the uppermost that does."""
    last = len(path.parts) - 1
    for index, part in enumerate(path.parts):
        is_file = index == last and not path.is_dir()
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
