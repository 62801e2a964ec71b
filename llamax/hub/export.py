"""A model as a Hugging Face folder: config.json and safetensors, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamax.config.model import ModelConfig
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.hub.checkpoint import INDEX
from llamax.hub.dialects import write_config
from llamax.hub.plan import Piece, plan
from llamax.hub.safetensors import Pending, shards, write_file
from llamax.model.transformer import Transformer
from llamax.storage.files import beside, sync_folder
from llamax.text.open import FILES
from llamax.train.files import writing

SHARD = 5 << 30  # bytes a file, as transformers cuts them
Parts = list[tuple[str, Piece]]  # (path of our array, the piece of it) in the order the tensor holds them


def export_hf(
    model: Transformer,
    config: RunConfig | ModelConfig,
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = SHARD,
) -> Path:
    """Write `model` as a folder that transformers, and `load_hf`, take. Returns the folder.

    The dialect is `config.model.dialect`, or the first that expresses the model; arrays keep their types. The
    tokenizer's files are copied from the folder `tokenizer`, or from where the config's tokenizer lies.

    Raises:
        UserError: no dialect expresses the model, the folder exists and is not empty, or the disk refuses.
    """
    inner = config.model if isinstance(config, RunConfig) else config
    folder = Path(path)
    data, dialect = write_config(inner, "export")
    arrays = {
        jax.tree_util.keystr(key, simple=True, separator=".").removesuffix(".value"): leaf
        for key, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }
    tensors: dict[str, Parts] = {}
    for target in plan(inner, dialect):
        for piece in target.pieces:
            tensors.setdefault(piece.hub, []).append((target.path, piece))
    for parts in tensors.values():
        parts.sort(key=lambda part: part[1].offset)
    pending = {
        name: Pending(np.dtype(arrays[parts[0][0]].dtype), parts[0][1].hub_shape) for name, parts in tensors.items()
    }
    kinds = [str(item.dtype) for item in pending.values()]
    data["torch_dtype"] = max(set(kinds), key=kinds.count)
    source = Path(tokenizer) if tokenizer is not None else _tokenizer_folder(config)
    with fresh_folder(folder) as work:
        _write_tensors(work, pending, tensors, arrays, max_shard_bytes)
        (work / "config.json").write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if source is not None:
            copy_tokenizer(source, work)
    return folder


def _write_tensors(
    work: Path, pending: dict[str, Pending], tensors: dict[str, Parts], arrays: dict[str, Any], max_bytes: int
) -> None:
    files = list(shards(pending, max_bytes))
    weight_map: dict[str, str] = {}
    for i, part in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        write_file(work / name, part, ((tensor, _tensor(tensors[tensor], arrays)) for tensor in part))
        weight_map |= dict.fromkeys(part, name)
    if len(files) > 1:
        total = sum(item.nbytes for item in pending.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensor(parts: Parts, arrays: dict[str, Any]) -> np.ndarray:
    """One hub tensor from the arrays that hold its parts; only those slices leave the devices."""
    found = [piece.layout.to_hub(np.asarray(arrays[path][piece.at]), piece.inputs) for path, piece in parts]
    piece = parts[0][1]
    if piece.rounds > 1:
        turns = [array.reshape(piece.rounds, -1, *array.shape[1:]) for array in found]
        return np.concatenate(turns, axis=1).reshape(piece.hub_shape)
    return found[0] if len(found) == 1 else np.concatenate(found, axis=piece.layout.fuse)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what `source` holds of a tokenizer: vocabulary, special tokens, chat template, generation defaults."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _tokenizer_folder(config: RunConfig | ModelConfig) -> Path | None:
    """Where the tokenizer of a run config lies, None where it has no file of its own."""
    path = getattr(config.data.tokenizer, "path", None) if isinstance(config, RunConfig) else None
    return Path(path).expanduser().parent if path else None


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when all is written, and vanishes otherwise.

    Raises:
        UserError: `folder` is there and not empty, or the disk refuses.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there; give a new folder, or remove it first")
    work = beside(folder)
    try:
        with writing(folder):
            work.mkdir(parents=True)
            yield work
            if folder.is_dir():
                folder.rmdir()
            os.replace(work, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
