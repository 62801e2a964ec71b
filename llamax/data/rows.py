"""Files of rows: JSON lines, Parquet and `datasets`, cut into parts that can be read side by side."""

from __future__ import annotations

import functools
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from llamax.errors import UserError

PART_BYTES = 8 << 20
PART_ROWS = 20_000

Row = tuple[int, str | None]


class Part(NamedTuple):
    """A range [start, stop) of a file: bytes of JSON lines, row groups of Parquet, rows of a dataset."""

    path: str
    start: int
    stop: int
    size: int
    stamp: int = 0


# ---------------------------------------------------------------- JSON lines
def jsonl_parts(path: str, field: str) -> list[Part]:
    """Byte ranges; a line belongs to the range its first byte lies in. A .gz file is one part."""
    size = os.path.getsize(path)
    if path.endswith(".gz"):
        return [Part(path, 0, -1, size)]
    return [
        Part(path, a, min(a + PART_BYTES, size), min(PART_BYTES, size - a)) for a in range(0, max(size, 1), PART_BYTES)
    ]


def read_jsonl(part: Part, field: str) -> Iterator[Row]:
    """(line number in the part, text) for each line; null text is None, a blank line is nothing.

    Raises:
        UserError: a line that is not a JSON object with text under `field`: naming file and line, since a damaged
            line means a damaged file.
    """
    try:
        with _open(part.path) as file:
            yield from _lines(file, part, field)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{part.path}: not a whole gzip file ({error}); fetch or compress it again") from None
    except OSError as error:
        raise UserError(f"{part.path}: {error.strerror or error}; give a readable file") from None


def _open(path: str) -> Any:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _lines(file: Any, part: Part, field: str) -> Iterator[Row]:
    position = part.start
    if position:
        file.seek(position - 1)
        position += len(file.readline()) - 1
    for number, line in enumerate(file, 1):
        if part.stop >= 0 and position >= part.stop:
            return
        if line.strip():
            yield number, _text(line, part.path, position, field)
        position += len(line)


def _text(line: bytes, path: str, position: int, field: str) -> str | None:
    def wrong(what: str) -> UserError:
        return UserError(f"{path}, line {_line_number(path, position)}: {what}")

    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise wrong("not UTF-8; save the file as UTF-8") from None
    except ValueError as error:
        raise wrong(f"not JSON ({error}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise wrong(f"expected an object, found {type(row).__name__}; write one {{...}} a line") from None
    if field not in row:
        raise wrong(f"no field {field!r} among {', '.join(list(row)[:8]) or 'none'}; set the source's `field`")
    if not isinstance(row[field], str | None):
        raise wrong(f"field {field!r} is {type(row[field]).__name__}, not text; set the source's `field`")
    return row[field]


def _line_number(path: str, position: int) -> int:
    with _open(path) as file:
        return file.read(position).count(b"\n") + 1


# ---------------------------------------------------------------- Parquet
def _parquet(path: str, field: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("source.kind=parquet needs the pyarrow package; pip install 'llamax[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error)[:120]}); write it again") from None
    schema = file.schema_arrow
    if field not in schema.names:
        raise UserError(f"{path}: no column {field!r} among {', '.join(schema.names[:8])}; set the source's `field`")
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {field!r} is {kind}, not text; set the source's `field`")
    return file


def parquet_parts(path: str, field: str) -> list[Part]:
    """One part a row group. Raises UserError: not Parquet, no such column, a column that is not text."""
    meta = _parquet(path, field).metadata
    return [Part(path, i, i + 1, meta.row_group(i).total_byte_size) for i in range(meta.num_row_groups)]


def read_parquet(part: Part, field: str) -> Iterator[Row]:
    """(row number in the part, text) of one row group."""
    import pyarrow

    file, number = _parquet(part.path, field), 0
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=[part.start], columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield number, text
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{part.path}: row group {part.start} is damaged ({str(error)[:120]}); write the file again"
        ) from None


# ---------------------------------------------------------------- datasets
@functools.lru_cache(maxsize=4)
def _dataset(path: str, name: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("source.kind=datasets needs the datasets package; pip install 'llamax[datasets]'") from None
    try:
        return datasets.load_dataset(path, name, split=split)
    except Exception as error:  # the library raises many kinds; each means these three words are wrong
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(
            f"source.path={path!r}, name={name!r}, split={split!r}: datasets cannot load it ({reason}); check the three"
        ) from None


def dataset_parts(path: str, name: str | None, split: str, field: str) -> list[Part]:
    """Ranges of rows; the path of a part carries the three words that load the dataset."""
    data = _dataset(path, name, split)
    if field not in data.column_names:
        raise UserError(
            f"{path}: no column {field!r} among {', '.join(data.column_names[:8])}; set the source's `field`"
        )
    rows, key = len(data), json.dumps([path, name, split])
    stamp = int(str(getattr(data, "_fingerprint", "0"))[:15], 16)
    row_bytes = max(1, int(data.dataset_size or 1000 * rows) // max(rows, 1))
    return [
        Part(key, a, min(a + PART_ROWS, rows), row_bytes * (min(a + PART_ROWS, rows) - a), stamp)
        for a in range(0, rows, PART_ROWS)
    ]


def read_dataset(part: Part, field: str) -> Iterator[Row]:
    """(row number, text) of a range of rows."""
    path, name, split = json.loads(part.path)
    data = _dataset(path, name, split).select_columns([field])
    for row in range(part.start, part.stop):
        text = data[row][field]
        if not isinstance(text, str | None):
            raise UserError(
                f"{path}, row {row}: field {field!r} is {type(text).__name__}, not text; set the source's `field`"
            )
        yield row, text
