"""A folder of safetensors files as one set of named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from llamax.errors import UserError
from llamax.hub.safetensors import DTYPES, Entry, SafeFile, strict_json

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F64", "F32", "F16", "BF16")
_SCALE = "_scale_inv"  # beside an fp8 weight: one factor a block
_CONVERT = (
    "a pickle runs code when it is opened, so llamax never does; convert it where you trust it: "
    'AutoModelForCausalLM.from_pretrained(DIR, dtype="auto").save_pretrained(OUT)'
)


class Checkpoint:
    """The tensors of a folder by name, as `rename` gives it (None: leave the tensor out). Nothing is read yet.

    `spare` rows at the end of a tensor, by its new name, do not count.

    fp8 weights with a scale a block count as tensors of `fp8_dtype`, the scales as part of them.
    """

    def __init__(
        self,
        folder: Path,
        rename: Callable[[str], str | None] = lambda name: name,
        spare: Mapping[str, int] = MappingProxyType({}),
        fp8_block: tuple[int, int] = (128, 128),
        fp8_dtype: np.dtype = np.dtype(ml_dtypes.bfloat16),
    ) -> None:
        self.folder, self._spare, self._block, self._fp8 = folder, spare, fp8_block, fp8_dtype
        self.left_out = 0
        self._at: dict[str, tuple[SafeFile, str]] = {}
        for file, name in _tensors(folder):
            new = rename(name)
            if new is None:
                self.left_out += 1
            elif new in self._at:
                raise UserError(f"{folder}: tensor {new} is there twice, in {self._at[new][0].path.name} and "
                                f"{file.path.name}; remove one")  # fmt: skip
            else:
                self._at[new] = file, name
        self.names = {name for name in self._at if not self._is_scale(name)}
        for name in self.names:
            self._check_scale(name)

    def entry(self, name: str) -> Entry:
        """Type, shape (with the rows that count) and place of a tensor on the disk."""
        file, there = self._at[name]
        entry = file.entries[there]
        if name in self._spare and entry.shape:
            entry = entry._replace(shape=(max(entry.shape[0] - self._spare[name], 0), *entry.shape[1:]))
        return entry

    def dtype(self, name: str) -> np.dtype:
        """The float type its numbers arrive in. Raises UserError for a tensor of integers."""
        code = self.entry(name).dtype
        if code in FLOATS:
            return DTYPES[code]
        if name + _SCALE in self._at:
            return self._fp8
        raise UserError(
            f"{self.folder}: tensor {name} is {code} without a scale; only float weights and fp8 with "
            f"{_SCALE[1:]} are read: convert it to bfloat16"
        )

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor as it arrives."""
        sizes = (math.prod(self.entry(name).shape) * self.dtype(name).itemsize for name in self.names)
        return max(sizes, default=0)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop - 1 of a tensor as floats; a view to be used before `forget`."""
        file, there = self._at[name]
        raw = file.rows(there, start, stop)
        if file.entries[there].dtype in FLOATS:
            return raw
        scale_file, scale_name = self._at[name + _SCALE]
        high, wide = self._block
        first = start // high
        scale = scale_file.rows(scale_name, first, -(-stop // high)).astype(np.float32)
        factor = scale[(np.arange(start, stop) // high) - first]  # [rows, blocks across]
        factor = np.repeat(factor, wide, axis=1)[:, : raw.shape[1]]
        return (raw.astype(np.float32) * factor).astype(self._fp8)

    def forget(self, name: str) -> None:
        """Drop what was read of the file that holds `name` from memory."""
        self._at[name][0].forget()

    def _is_scale(self, name: str) -> bool:
        return name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._at

    def _check_scale(self, name: str) -> None:
        if name + _SCALE not in self._at:
            return
        weight, scale = self.entry(name), self.entry(name + _SCALE)
        blocks = tuple(-(-size // block) for size, block in zip(weight.shape, self._block, strict=False))
        if len(weight.shape) != 2 or scale.shape != blocks or scale.dtype not in FLOATS:
            raise UserError(
                f"{self.folder}: {name}{_SCALE} is {scale.dtype} {list(scale.shape)}; blocks of {list(self._block)} "
                f"of a weight {list(weight.shape)} need floats {list(blocks)}: check quantization_config"
            )


def _tensors(folder: Path) -> Iterator[tuple[SafeFile, str]]:
    """Every (file, tensor name) of a folder, in the order of its index or of its files."""
    index = folder / INDEX
    if index.is_file():
        weight_map = _weight_map(index)
        files = {name: SafeFile(folder / name) for name in dict.fromkeys(weight_map.values())}
        for tensor, name in weight_map.items():
            if tensor not in files[name].entries:
                raise UserError(f"{index}: tensor {tensor} is not in {name}; download both files again")
        for name, file in files.items():
            for tensor in file.entries:
                if weight_map.get(tensor) != name:
                    raise UserError(f"{folder / name}: tensor {tensor} is not in {INDEX}; download both files again")
                yield file, tensor
        return
    plain = folder / "model.safetensors"
    found = [plain] if plain.is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        refuse_pickles(folder)
        raise UserError(f"{folder}: no model.safetensors and no {INDEX}; give the folder of a Hugging Face model")
    for path in found:
        file = SafeFile(path)
        for tensor in file.entries:
            yield file, tensor


def refuse_pickles(path: Path) -> None:
    """Raises UserError where `path` is a pickled checkpoint, or a folder that holds one."""
    found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    for item in found:
        if item.suffix in PICKLES:
            raise UserError(f"{item}: {_CONVERT}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        data: Any = strict_json(index.read_bytes(), str(index))
    except OSError as error:
        raise UserError(f"{index}: {error.strerror or error}; make it readable") from None
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index}: no weight_map; download the index again")
    for tensor, name in found.items():
        if not isinstance(name, str) or name in ("", ".", "..") or PurePath(name).name != name or "\\" in name:
            raise UserError(f"{index}: tensor {tensor[:120]!r} is said to be in {str(name)[:120]!r}, which is no file "
                            "name inside this folder; repair the index")  # fmt: skip
        if Path(name).suffix in PICKLES:
            raise UserError(f"{index.parent / name}: {_CONVERT}")
        if Path(name).suffix != ".safetensors" or not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: the index names it and it is no safetensors file here; "
                            "download it")  # fmt: skip
    return found
