"""Where documents come from. A source lists its pieces, cheaply; a worker reads a piece into documents."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llamax.config import run as config
from llamax.data import rows
from llamax.errors import UserError

IGNORED_FOLDERS = ("__pycache__", "site-packages", "dist-packages", "node_modules")


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read in one go: a file, a byte range of one, a row group.

    `size` is in bytes (an estimate for some kinds); `stamp` changes when the content does.
    """

    kind: str
    name: str
    path: str
    size: int
    stamp: int = 0
    start: int = 0
    stop: int = 0
    column: str = ""


@dataclass(frozen=True)
class Skip:
    """Something that was passed over, and why: `empty`, `binary`, `not UTF-8` or `unreadable`."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """A source's pieces in order, and what lay beside them: `other` counts files that are not text by their name."""

    name: str
    pieces: tuple[Piece, ...]
    other: Counter[str] = field(default_factory=Counter)
    unlisted: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Document:
    name: str
    text: str


# ---------------------------------------------------------------- listing
def list_source(source: config.Source, where: str) -> Listing:
    """What `source` holds, ordered by relative path whatever the file system's order.

    Symbolic links inside a folder are not followed, so a walk neither leaves the folder nor loops; hidden folders are
    passed over. A path given by name is taken whatever it is.

    Raises:
        UserError: a path that does not exist, a missing extra, a file that is not what its source says.
    """
    if isinstance(source, config.PythonSource):
        return _python(source)
    if isinstance(source, config.HuggingFaceDataset):
        return Listing(f"datasets {source.path}", tuple(_pieces("datasets", rows.dataset_parts(source), source.field)))
    if isinstance(source, config.TextFiles):
        return _files(source.paths, source.suffixes, where)
    suffixes = (".jsonl", ".jsonl.gz", ".ndjson") if isinstance(source, config.Jsonl) else (".parquet",)
    files = _files(source.paths, suffixes, where)
    split = rows.jsonl_parts if isinstance(source, config.Jsonl) else rows.parquet_parts
    pieces = [
        piece
        for file in files.pieces
        for piece in _pieces(source.kind, split(file.path, source.field), source.field, file)
    ]
    return Listing(files.name, tuple(pieces), files.other, files.unlisted)


def _pieces(kind: str, parts: list[rows.Part], column: str, file: Piece | None = None) -> Iterator[Piece]:
    for part in parts:
        name, stamp = (file.name, file.stamp) if file else (part.path, part.stamp)
        yield Piece(
            kind,
            f"{name}@{part.start}" if part.start else name,
            part.path,
            part.size,
            stamp,
            part.start,
            part.stop,
            column,
        )


def _python(source: config.PythonSource) -> Listing:
    """The interpreter's own source tree(s). Test files with deliberate encoding errors are skipped like any other."""
    keys = {"stdlib": "stdlib", **({"purelib": "packages", "platlib": "packages"} if source.packages else {})}
    folders: dict[str, str] = {}
    for key, label in keys.items():
        path = sysconfig.get_path(key)
        if path and os.path.isdir(path):
            folders.setdefault(os.path.realpath(path), label)
    pieces: list[Piece] = []
    other: Counter[str] = Counter()
    skips: list[Skip] = []
    for folder, label in folders.items():
        pieces += _walk(folder, label, (".py",), other, skips)
    return Listing("python packages" if source.packages else "python", tuple(pieces), other, tuple(skips))


def _files(paths: tuple[str, ...], suffixes: tuple[str, ...], where: str) -> Listing:
    pieces: list[Piece] = []
    other: Counter[str] = Counter()
    skips: list[Skip] = []
    for i, text in enumerate(paths):
        path = Path(text).expanduser().absolute()
        try:
            info = path.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{where}.paths.{i} = {text!r}: {reason} (looked at {path}); give a file or folder that exists"
            ) from None
        if stat.S_ISDIR(info.st_mode):
            pieces += _walk(str(path), text, suffixes, other, skips)
        else:
            pieces.append(Piece("file", text, str(path), info.st_size, info.st_mtime_ns))
    return Listing(" ".join(paths[:3]) + (" ..." if len(paths) > 3 else ""), tuple(pieces), other, tuple(skips))


def _walk(folder: str, label: str, suffixes: tuple[str, ...], other: Counter[str], skips: list[Skip]) -> list[Piece]:
    """The regular files under `folder` that end in one of `suffixes`, sorted by relative path."""
    found: list[tuple[str, str, os.stat_result]] = []

    def enter(path: str, relative: str) -> None:
        try:
            entries = list(os.scandir(path))
        except OSError:
            skips.append(Skip(f"{label}/{relative}", "unreadable"))
            return
        for entry in entries:
            below = f"{relative}{entry.name}"
            if entry.is_symlink():
                other["symbolic link"] += 1
            elif entry.is_dir(follow_symlinks=False):
                if entry.name not in IGNORED_FOLDERS and not entry.name.startswith("."):
                    enter(entry.path, below + "/")
            elif entry.is_file(follow_symlinks=False) and entry.name.lower().endswith(suffixes):
                found.append((below, entry.path, entry.stat(follow_symlinks=False)))
            else:
                other[os.path.splitext(entry.name)[1] or "without suffix"] += 1

    enter(folder, "")
    found.sort(key=lambda item: os.fsencode(item[0]))
    return [
        Piece("file", f"{label}/{relative}", path, info.st_size, info.st_mtime_ns) for relative, path, info in found
    ]


# ---------------------------------------------------------------- reading
def read_piece(piece: Piece) -> Iterator[Document | Skip]:
    """The documents of one piece, in order, with a `Skip` for each thing that is no text.

    Text is UTF-8 (a byte-order mark is dropped); line ends stay as they are.

    Raises:
        UserError: a row that is not what its file says (bad JSON, a missing field), with file and line.
    """
    if piece.kind == "file":
        yield _read_file(piece)
        return
    read = {"jsonl": rows.read_jsonl, "parquet": rows.read_parquet, "datasets": rows.read_dataset}[piece.kind]
    for number, text in read(rows.Part(piece.path, piece.start, piece.stop, piece.size, piece.stamp), piece.column):
        yield _checked(f"{piece.name}:{number}", text or "")


def _read_file(piece: Piece) -> Document | Skip:
    try:
        with open(piece.path, "rb") as file:
            data = file.read()
    except OSError:
        return Skip(piece.name, "unreadable")
    if b"\0" in data:
        return Skip(piece.name, "binary")
    try:
        return _checked(piece.name, data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Skip(piece.name, "not UTF-8")


def _checked(name: str, text: str) -> Document | Skip:
    if not text:
        return Skip(name, "empty")
    if "\0" in text:
        return Skip(name, "binary")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which a JSON escape can spell
        return Skip(name, "not UTF-8")
    return Document(name, text)
