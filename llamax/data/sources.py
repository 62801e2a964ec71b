"""Where documents come from: a source lists its pieces, cheaply (pieces.py reads them)."""

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
from llamax.data.pieces import Piece, Skip
from llamax.errors import UserError

IGNORED_FOLDERS = ("__pycache__", "site-packages", "dist-packages", "node_modules")


@dataclass(frozen=True)
class Listing:
    """A source's pieces in order, and what lay beside them: `other` counts files that are not text by their name."""

    name: str
    pieces: tuple[Piece, ...]
    other: Counter[str] = field(default_factory=Counter)
    unlisted: tuple[Skip, ...] = ()


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
        parts = rows.dataset_parts(source.path, source.name, source.split, source.field)
        return Listing(f"datasets {source.path}", tuple(_pieces("datasets", parts, source.field)))
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
