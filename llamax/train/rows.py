"""Rows of metrics.jsonl and evals.jsonl: appended whole, repaired after a crash, read back.

A number that is not finite (a diverged loss) is written as JSON `null`, so that every line is JSON for every reader;
reading gives NaN for `null`, in the place of NaN and of the infinities alike.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax.errors import UserError
from llamax.storage.files import write_atomic
from llamax.train.files import writing


def plain(value: Any) -> Any:
    """`value` as JSON data: arrays and array scalars as numbers, numbers that are not finite as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append one line a row with a single write, so that a crash cuts the last line at most.

    Raises:
        UserError: the disk refused, such as for lack of space.
    """
    data = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows).encode()
    with writing(path), open(path, "ab", buffering=0) as file:
        written = file.write(data)
        while written is not None and written < len(data):  # a signal or a full disk can cut a write short
            written += file.write(data[written:]) or 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file in order; a last line that a crash cut short is left out; no file is no rows.

    Raises:
        UserError: a complete line that is not a JSON object.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    whole, _, tail = data.rpartition(b"\n")
    rows = [_row(line, path, number) for number, line in enumerate(whole.split(b"\n"), 1)] if whole else []
    last = _parse(tail)
    return [*rows, last] if last is not None else rows


def repair_tail(path: Path) -> None:
    """Drop a last line that a crash cut short; end it properly if only its line end is missing. Raises UserError."""
    if not path.is_file():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return
    with writing(path), open(path, "r+b") as file:
        if _parse(data[end:]) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(end)


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows whose `step` is at most `step`, as they are. Raises UserError for a line that is not a row."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    keep = [line for number, line in enumerate(lines, 1) if _row(line, path, number)["step"] <= step]
    if len(keep) < len(lines):
        with writing(path):
            write_atomic(path, b"".join(keep).decode())


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    row = _parse(line)
    if row is None or "step" not in row:
        raise UserError(
            f"{path}, line {number}: not a row of JSON with a step: {line[:60]!r}; correct or delete that line"
        )
    return row


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return {key: math.nan if value is None else value for key, value in row.items()} if isinstance(row, dict) else None
