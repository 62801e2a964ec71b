"""The safetensors format: a strict reader of headers, tensors through a memory map, a writer that streams.

    8 bytes   length N of the header, little-endian
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
    the rest  the tensors, row-major, in the order of their offsets, without a hole or an overlap

The reader is our own because everything in the header is checked before one byte of data is believed, each failure
with its own message; the writer because the library's wants every tensor in memory at once.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llamax.errors import UserError

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file; `begin` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refusing a key given twice: Python would keep the last one silently."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        found[key] = value
    return found


def strict_json(text: bytes, where: str) -> Any:
    """JSON data from UTF-8 bytes. Raises UserError: not UTF-8, not JSON, a key given twice, NaN, nested too deeply."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique_pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({str(error)[:200]}); download or write the file again") from None


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, checked against the file's size.

    Raises:
        UserError: truncated or oversized header, bad JSON or duplicate key, unknown dtype, wrong size, offsets that
            overlap, leave a hole or leave the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise UserError(
                    f"{path}: the header wants {length} bytes after the first 8 and the file has {size}: "
                    "it is truncated or no safetensors file; download it again"
                )
            if length > MAX_HEADER:
                raise UserError(f"{path}: a header of {length} bytes exceeds the format's {MAX_HEADER}; rewrite it")
            header = strict_json(file.read(length), f"{path}: header")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a readable safetensors file") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header is a {type(header).__name__}, not an object; rewrite the file")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
    _check_tiling(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, item: Any, start: int) -> Entry:
    where = f"{path}: tensor {name[:120]!r}"
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: expected dtype, shape and data_offsets; rewrite the file")
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{where}: dtype {str(code)[:40]!r} is not one of {', '.join(DTYPES)}; convert the tensor")
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
            raise UserError(f"{where}: {what} {str(value)[:80]} is not a list of sizes; rewrite the file")
    if len(offsets) != 2 or len(shape) > 32:
        raise UserError(f"{where}: data_offsets has {len(offsets)} and shape {len(shape)} entries; rewrite the file")
    wanted = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise UserError(
            f"{where}: {code} {shape} takes {wanted} bytes, its offsets {offsets} hold {offsets[1] - offsets[0]}; "
            "rewrite the file"
        )
    return Entry(code, tuple(shape), start + offsets[0], start + offsets[1])


def _check_tiling(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors fill the data from its first byte to the end of the file, side by side."""
    end, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.end > size:
            raise UserError(
                f"{path}: tensor {name[:120]!r} ends at byte {entry.end} and the file at {size}: it is truncated, "
                "or the offsets leave the file; download it again"
            )
        if entry.begin != end:
            what = "overlaps" if entry.begin < end else f"leaves {entry.begin - end} unused bytes after"
            raise UserError(f"{path}: tensor {name[:120]!r} {what} {before[:120]}; rewrite the file")
        end, before = entry.end, repr(name)
    if end != size:
        raise UserError(f"{path}: {size - end} bytes after the last tensor belong to none; rewrite the file")


class SafeFile:
    """One file: its checked `entries`, and tensors as views of a memory map that is dropped again after use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_header(path)
        self._map: mmap.mmap | None = None

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop - 1 of a tensor (a scalar has one), a read-only view valid until `forget`."""
        entry = self.entries[name]
        if self._map is None and entry.end > entry.begin:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        shape = entry.shape or (1,)
        row = math.prod(shape[1:])
        dtype = DTYPES[entry.dtype]
        if self._map is None or not row or stop <= start:
            view = np.zeros((stop - start) * row, dtype)
        else:
            view = np.frombuffer(self._map, dtype, (stop - start) * row, entry.begin + start * row * dtype.itemsize)
        return view.reshape(entry.shape and (stop - start, *shape[1:]))

    def forget(self) -> None:
        """Give the pages read so far back: they are a copy of the disk, and count as this process's memory."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


# ---------------------------------------------------------------- writing
class Pending(NamedTuple):
    """A tensor to be written: its numpy dtype and shape; its bytes come when the writer gets to it."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, pending: Mapping[str, Pending], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write one safetensors file, tensor by tensor in the order of `pending`, which `tensors` follows.

    Raises:
        OSError: the disk's.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for name, item in pending.items():
        code = _CODES[item.dtype]
        header[name] = {"dtype": code, "shape": list(item.shape), "data_offsets": [offset, offset + item.nbytes]}
        offset += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts on a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, array), (wanted, item) in zip(tensors, pending.items(), strict=True):
            if name != wanted or array.shape != item.shape or array.dtype != item.dtype:
                raise ValueError(f"{name} {array.dtype} {array.shape} came where {wanted} {item} was announced")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def shards(pending: Mapping[str, Pending], max_bytes: int) -> Iterator[dict[str, Pending]]:
    """`pending` cut, in order, into files of at most `max_bytes` (a larger tensor has a file of its own)."""
    part: dict[str, Pending] = {}
    for name, item in pending.items():
        if part and sum(other.nbytes for other in part.values()) + item.nbytes > max_bytes:
            yield part
            part = {}
        part[name] = item
    if part:
        yield part
