"""What a file is, by its content and its name together. What is not read is refused by its name, never guessed at.

The table of docs/corpora.md is this one, and a test holds the two together.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.sample_files.decoding import is_text, opened, readable
from common.sample_files.refusals import shown

#: Bytes at the beginning of a file that say what it is.
_HEAD = 4096


@dataclass(frozen=True)
class Kind:
    """A kind of file: `one` has its article, `many` none. `read_as` is the encoder type that it is read for.

    What is not read has `refused_for`, the encoder types whose samples it may hold: for these it is refused, with its
    `mend`; for others it is left out.
    """

    one: str
    many: str
    suffixes: frozenset[str] = frozenset()
    read_as: str = ""
    refused_for: tuple[str, ...] = ()
    mend: str = ""


@dataclass(frozen=True)
class SampleFile:
    """A file that is read, and as what."""

    path: Path
    kind: Kind


def _read(encoder_type: str, one: str, many: str, suffixes: str) -> Kind:
    return Kind(one, many, frozenset(suffixes.split()), encoder_type)


def _refused(one: str, many: str, suffixes: str, refused_for: str, mend: str) -> Kind:
    return Kind(one, many, frozenset(suffixes.split()), "", tuple(refused_for.split()), mend)


PLAIN = _read("text", "a plain text file", "plain text files", ".txt .md .rst .py")
JSON_LINES = _read("text", "a JSON lines file", "JSON lines files", ".jsonl .ndjson")
JSON = _read("text", "a JSON file", "JSON files", ".json")
CSV = _read("text", "a CSV table", "CSV tables", ".csv")
TABS = _read("text", "a table with tabs", "tables with tabs", ".tsv")
PARQUET = _read("text", "a Parquet table", "Parquet tables", ".parquet")
PICTURE = _read("image", "a picture", "pictures", ".png .jpg .jpeg .bmp .gif .webp .tif .tiff .pgm .ppm")
NPY = _read("image", "a NumPy array", "NumPy arrays", ".npy")
NPZ = _read("image", "a NumPy archive", "NumPy archives", ".npz")

PDF = _refused(
    "a PDF document", "PDF documents", ".pdf", "text image", "save its text as .txt, or its pages as pictures"
)
OFFICE = _refused(
    "a word processor's document",
    "word processors' documents",
    ".doc .docx .odt .rtf .pages .ppt .pptx .odp .epub",
    "text",
    "save its text as .txt",
)
SHEET = _refused("a spreadsheet", "spreadsheets", ".xls .xlsx .xlsb .ods", "text", "save it as .csv")
MARKUP = _refused(
    "an HTML or XML document",
    "HTML or XML documents",
    ".html .htm .xhtml .xml",
    "text",
    "save its text without the tags",
)
NOTEBOOK = _refused("a notebook", "notebooks", ".ipynb", "text", "save its cells as .py or .txt")
COLUMNS = _refused(
    "a table in another format",
    "tables in other formats",
    ".feather .arrow .orc .avro .dta .sav",
    "text",
    "write it as .parquet, .jsonl or .csv",
)
OTHER_PICTURE = _refused(
    "a picture in another format",
    "pictures in other formats",
    ".heic .heif .avif .jp2 .j2k .psd .svg .ico .dng .cr2 .nef .arw .dcm .nii .exr .hdr .tga",
    "image",
    "save it as .png or .jpg",
)
VIDEO = _refused(
    "a video", "videos", ".mp4 .mov .m4v .avi .mkv .webm .mpg .mpeg", "image", "save its frames as pictures"
)
AUDIO = _refused("a sound file", "sound files", ".wav .mp3 .flac .ogg .m4a .aac", "", "give it through an entry_point")
ARCHIVE = _refused("an archive", "archives", ".zip .tar .tgz .7z .rar", "text image", "unpack it")
COMPRESSED = _refused(
    "a compressed file",
    "compressed files",
    ".bz2 .xz .zst .lz4 .z .lzma",
    "text image",
    "unpack it; text, JSON, CSV and TSV may be gzipped and called .gz",
)
GZIP = _refused("a gzip file", "gzip files", "", "text image", "add .gz to its name, or unpack it")
PICKLE = _refused(
    "a pickle",
    "pickles",
    ".pkl .pickle .pt .pth .joblib",
    "text image",
    "a pickle can run code and is never opened here: write .npz, .jsonl or .parquet",
)
DATABASE = _refused(
    "a database",
    "databases",
    ".h5 .hdf5 .mat .db .sqlite .sqlite3 .mdb .lmdb .tfrecord",
    "text image",
    "write what you mean as .npz, .jsonl or .parquet, or give it through an entry_point",
)
PROGRAM = _refused("a program", "programs", ".so .dll .dylib .exe .o .a .class .jar .whl .pyc .pyd .wasm", "", "")
UNKNOWN = _refused(
    "a file that is neither UTF-8 text nor of a kind that is known",
    "files of no kind that is known",
    "",
    "text image",
    "convert it",
)

KINDS = (
    PLAIN,
    JSON_LINES,
    JSON,
    CSV,
    TABS,
    PARQUET,
    PICTURE,
    NPY,
    NPZ,
    PDF,
    OFFICE,
    SHEET,
    MARKUP,
    NOTEBOOK,
    COLUMNS,
    OTHER_PICTURE,
    VIDEO,
    AUDIO,
    ARCHIVE,
    COMPRESSED,
    GZIP,
    PICKLE,
    DATABASE,
    PROGRAM,
    UNKNOWN,
)

#: The file suffixes of the types that are read from files; other types come through an entry point.
SUFFIXES = {
    encoder_type: frozenset(suffix for kind in KINDS if kind.read_as == encoder_type for suffix in kind.suffixes)
    for encoder_type in ("text", "image")
}

_BY_SUFFIX = {suffix: kind for kind in KINDS for suffix in kind.suffixes}

#: Kinds that may be gzipped, if they are called so.
_GZIPPED = (PLAIN, JSON_LINES, JSON, CSV, TABS)
#: Kinds that are zip archives inside.
_ZIPPED = (NPZ, OFFICE, SHEET, ARCHIVE, PICKLE, PROGRAM)

#: First bytes, at their place, and the kind that has them. Only those that no text begins with.
_MAGIC: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"%PDF-", PDF),
    (0, b"PAR1", PARQUET),
    (0, b"\x93NUMPY", NPY),
    (0, b"\x89PNG\r\n\x1a\n", PICTURE),
    (0, b"\xff\xd8\xff", PICTURE),
    (0, b"GIF87a", PICTURE),
    (0, b"GIF89a", PICTURE),
    (0, b"II*\0", PICTURE),
    (0, b"MM\0*", PICTURE),
    (8, b"WEBPVP8", PICTURE),
    (0, b"{\\rtf", OFFICE),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", OFFICE),
    (0, b"ARROW1\0", COLUMNS),
    (0, b"Obj\x01", COLUMNS),
    (4, b"ftypheic", OTHER_PICTURE),
    (4, b"ftypheix", OTHER_PICTURE),
    (4, b"ftypmif1", OTHER_PICTURE),
    (4, b"ftypavif", OTHER_PICTURE),
    (0, b"8BPS\0\x01", OTHER_PICTURE),
    (128, b"DICM", OTHER_PICTURE),
    (4, b"ftyp", VIDEO),
    (0, b"\x1aE\xdf\xa3", VIDEO),
    (257, b"ustar", ARCHIVE),
    (0, b"PK\x03\x04", ARCHIVE),
    (0, b"7z\xbc\xaf\x27\x1c", ARCHIVE),
    (0, b"Rar!\x1a\x07", ARCHIVE),
    (0, b"\x1f\x8b\x08", GZIP),
    (0, b"BZh91AY&SY", COMPRESSED),
    (0, b"\xfd7zXZ\0", COMPRESSED),
    (0, b"\x28\xb5\x2f\xfd", COMPRESSED),
    (0, b"SQLite format 3\0", DATABASE),
    (0, b"\x89HDF\r\n\x1a\n", DATABASE),
    (0, b"\x7fELF", PROGRAM),
)

_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html[\s>]|\?xml\s|svg[\s>])", re.IGNORECASE)
_ROW = re.compile(rb'(?:\xef\xbb\xbf)?\s*\[?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')


def suffix_of(path: Path) -> str:
    """The suffix that says how to read a file, in lower case, without a `.gz` behind it."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def kind_of(path: Path, encoder_type: str) -> Kind:
    """What the file is. Text of an unknown suffix is plain text, whether it is met in a folder or named.

    Raises UserError for a file that is one thing by its content and another by its name, if it may hold samples of
    `encoder_type`, and for one that cannot be read.
    """
    by_name = _BY_SUFFIX.get(suffix_of(path))
    with readable(path):
        by_content, plain = _by_content(path)
    if by_name is None:
        # the name says nothing, so the content decides; but rows of JSON are no plain text
        by_name = PLAIN if by_content is JSON_LINES else by_content or (PLAIN if plain else UNKNOWN)
    if path.suffix.lower() == ".gz" and by_name.read_as and by_name not in _GZIPPED:
        return COMPRESSED
    if by_content is not None and not _agree(by_name, by_content):
        _refuse_contradiction(path, by_name, by_content, encoder_type)
    return by_name


def refusal(path: Path, kind: Kind) -> str:
    """The line for a file that is not read although it may hold samples."""
    return f"{shown(path)} is {kind.one}, which is not read; {kind.mend}, or take it out of path"


def _by_content(path: Path) -> tuple[Kind | None, bool]:
    """The kind that the content shows beyond doubt, if it does, and whether the beginning is text."""
    try:
        with opened(path) as file:
            head = file.read(_HEAD)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return None, True  # whoever reads it says what is wrong
    plain = is_text(head)
    for place, magic, kind in _MAGIC:
        # a text may have any word at any place but its first
        if head[place : place + len(magic)] == magic and not (place and plain):
            return kind, False
    if _MARKUP.match(head):
        return MARKUP, True
    if _ROW.match(head):
        return JSON_LINES, True
    return None, plain


def _agree(by_name: Kind, by_content: Kind) -> bool:
    if by_name is by_content or not by_name.read_as:
        return True  # what is not read is left alone by its name
    if by_content is ARCHIVE:
        return by_name in _ZIPPED
    # Python may begin with a dictionary, and a table's own reader says more of what is wrong in it
    return by_content is JSON_LINES and by_name is not PLAIN


def _refuse_contradiction(path: Path, by_name: Kind, by_content: Kind, encoder_type: str) -> None:
    if encoder_type not in (by_name.read_as, by_content.read_as):
        return
    if by_content is JSON_LINES:
        if path.suffix.lower() == ".py":
            return
        mend = "call it .jsonl (a row a line) or .json (a list of rows), or keys and braces would be trained on"
        raise UserError(f"{shown(path)} begins with a JSON object and is no plain text; {mend}")
    both = f"{by_content.one} by its content and {by_name.one} by its name"
    known = encoder_type in by_content.refused_for
    mend = by_content.mend if known else "give it the name of what it is"
    raise UserError(f"{shown(path)} is {both}; {mend}, or take it out of path")
