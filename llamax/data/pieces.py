"""Pieces of sources and the documents in them. Imports no config: worker processes start in half the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llamax.data import rows


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

    @property
    def told(self) -> tuple[str | int, ...]:
        """All fields in order, for keys. dataclasses.astuple copies deeply: 30 times as slow, a tenth of a build."""
        return (self.kind, self.name, self.path, self.size, self.stamp, self.start, self.stop, self.column)


@dataclass(frozen=True)
class Skip:
    """Something that was passed over, and why: `empty`, `binary`, `not UTF-8` or `unreadable`."""

    name: str
    reason: str


@dataclass(frozen=True)
class Document:
    name: str
    text: str


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
