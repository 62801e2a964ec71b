"""A Hugging Face folder as a model: tensors stream one at a time into arrays that already are where they belong."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array

from llamax.config.load import run_from_data, validate
from llamax.config.mesh import load_rules
from llamax.config.model import ModelConfig
from llamax.config.run import RunConfig
from llamax.errors import UserError
from llamax.hub.checkpoint import Checkpoint, refuse_pickles
from llamax.hub.dialects import Dialect, ignored, read_config
from llamax.hub.plan import Piece, Target, compare, hub_shapes, plan
from llamax.hub.safetensors import strict_json
from llamax.hub.tokenizer import tokenizer_data
from llamax.mesh.rules import shardings
from llamax.model.transformer import Transformer

CONFIG = "config.json"
CHUNK = 64 << 20  # bytes of one update of an array that is larger than any tensor
Box = tuple[tuple[int, int], ...]


def is_hub_folder(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face model."""
    return (path / CONFIG).is_file()


def load_hf(
    path: str | Path, mesh: Mesh | None = None, *, rules: str = "default", dtype: str | None = None
) -> tuple[Transformer, RunConfig]:
    """The model of a Hugging Face folder and its config. `model(tokens)` gives float32 logits [batch, seq, vocab].

    Arrays are sharded over `mesh` by `rules` as they load, on the first device without one, and keep the types of the
    file. The config's data and train sections are defaults with the folder's tokenizer.

    To train further, load with `dtype="float32"`, the type optimizers update, and put the model in a fresh state:
    `dataclasses.replace(init_state(config, steps, abstract_state(config, rules, mesh)), model=model)`; the moments of
    every optimizer start from zero whatever the weights are.

    Raises:
        UserError: whatever is wrong with the folder; nothing is left half-loaded.
    """
    folder = Path(path)
    source = open_folder(folder)
    shapes = jax.eval_shape(lambda key: Transformer(source.config, key=key), jax.random.key(0))
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    paths = [jax.tree_util.keystr(key, simple=True, separator=".").removesuffix(".value") for key, _ in flat]
    if mesh is None:
        places: list[Any] = [SingleDeviceSharding(jax.devices()[0])] * len(flat)
    else:
        places = jax.tree.leaves(shardings(shapes, shapes, load_rules(rules), mesh))
    targets = {target.path: target for target in source.targets}
    if {name: tuple(leaf.shape) for name, (_, leaf) in zip(paths, flat, strict=True)} != {
        name: target.shape for name, target in targets.items()
    }:
        differ = sorted({*paths} ^ {*targets}) or ["shapes"]
        raise AssertionError(f"the model and accounting.leaves disagree: {differ[:4]}")  # ours, not the user's
    largest = source.checkpoint.largest
    arrays = [
        _array(targets[name], source.checkpoint, place, largest, dtype)
        for name, place in zip(paths, places, strict=True)
    ]
    return jax.tree_util.tree_unflatten(tree, arrays), run_config(source.config, folder)


class Source(NamedTuple):
    """A folder that is known to hold exactly the tensors of `config`; none is read yet."""

    config: ModelConfig
    dialect: Dialect
    checkpoint: Checkpoint
    targets: list[Target]


def open_folder(folder: Path) -> Source:
    """Read the config and every header of a folder, and check them against each other.

    Raises:
        UserError: what is wrong, in one message.
    """
    if folder.is_file():
        refuse_pickles(folder)
    if not is_hub_folder(folder):
        refuse_pickles(folder)
        raise UserError(f"{folder}: no {CONFIG}; give a run directory or the folder of a Hugging Face model")
    where = str(folder / CONFIG)
    data = strict_json((folder / CONFIG).read_bytes(), where)
    config, dialect, part = read_config(data, where)
    tied = config.head.tied

    rename = part.rename if part else lambda name: name
    spare = part.spare if part else {}
    checkpoint = Checkpoint(folder, rename, spare, _fp8_block(data, where), _float_type(data))
    if part and checkpoint.left_out:
        warnings.warn(
            f"{folder}: {checkpoint.left_out} tensors outside the text model are left out; images are not read",
            stacklevel=3,
        )
    if config.mtp and not any(_layer(name) >= len(config.layers) for name in checkpoint.names):
        # config.json counts the module, and most files come without it
        config = validate(ModelConfig, config.as_dict() | {"mtp": 0}, where)
    targets = plan(config, dialect)
    wanted = hub_shapes(targets)
    there = {
        name: checkpoint.entry(name).shape
        for name in checkpoint.names
        if name in wanted or not ignored(dialect, name, tied)
    }
    compare(wanted, dict(sorted(there.items())), str(folder))
    return Source(config, dialect, checkpoint, targets)


def _layer(name: str) -> int:
    found = re.search(r"layers\.(\d{1,6})\.", name)
    return int(found[1]) if found else -1


def _fp8_block(data: dict[str, Any], where: str) -> tuple[int, int]:
    size = (data.get("quantization_config") or {}).get("weight_block_size", [128, 128])
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise UserError(f"{where}: quantization_config.weight_block_size = {size!r}: give two positive integers")
    return size[0], size[1]


def _float_type(data: dict[str, Any]) -> np.dtype:
    """What fp8 weights become: the type the config names, bfloat16 without one."""
    inner = data.get("text_config") if isinstance(data.get("text_config"), dict) else {}
    name = next((d[key] for d in (data, inner or {}) for key in ("dtype", "torch_dtype") if d.get(key)), "bfloat16")
    known = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    return np.dtype(known.get(str(name), ml_dtypes.bfloat16))


def run_config(config: ModelConfig, folder: Path | None = None) -> RunConfig:
    """A run config around a model that was not trained here."""
    data = {"tokenizer": tokenizer_data(folder, config.vocab_size)} if folder is not None else {}
    train = {"steps": 1, "batch_size": 8, "seq_len": min(config.max_seq_len, 1024)}
    return run_from_data({"model": config.as_dict(), "data": data, "train": train}, where=str(folder or "model"))


# ---------------------------------------------------------------- arrays
def _array(target: Target, checkpoint: Checkpoint, place: Any, largest: int, dtype: str | None) -> Array:
    """One array of the model, each of its shards filled from the parts of the tensors that belong there."""
    kinds = {checkpoint.dtype(piece.hub) for piece in target.pieces}
    kind = np.dtype(jnp.dtype(dtype)) if dtype else np.dtype(functools.reduce(jnp.promote_types, kinds))
    by_box: dict[Box, list[jax.Device]] = {}
    for device, index in place.addressable_devices_indices_map(target.shape).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index or (), target.shape, strict=False))
        box += tuple((0, size) for size in target.shape[len(box) :])
        by_box.setdefault(box, []).append(device)
    shards: list[Array] = []
    for box, devices in by_box.items():
        shards += _shard(target.pieces, checkpoint, box, devices, kind, largest)
    return jax.make_array_from_single_device_arrays(target.shape, place, shards)


def _shard(
    pieces: Sequence[Piece], checkpoint: Checkpoint, box: Box, devices: list[jax.Device], kind: np.dtype, largest: int
) -> list[Array]:
    """One part of an array on the devices that hold it. It is gathered on the host where it is no larger than the
    largest tensor, else filled in place on the device."""
    shape = tuple(stop - start for start, stop in box)
    if np.prod(shape, dtype=np.int64) * kind.itemsize <= largest:
        whole = np.empty(shape, kind)
        for start, part in _parts(pieces, checkpoint, box, largest):
            whole[tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))] = part
        return [jax.device_put(whole, device) for device in devices]
    arrays = [jnp.zeros(shape, kind, device=device) for device in devices]
    # Small chunks: the runtime frees them late, about seven at once by resident memory.
    for start, part in _parts(pieces, checkpoint, box, min(CHUNK, largest // 16)):
        whole = np.ascontiguousarray(part.astype(kind, copy=False))
        at = np.asarray(start, np.int32)
        arrays = [
            _update(array, jax.device_put(whole, device), at) for array, device in zip(arrays, devices, strict=True)
        ]
        jax.block_until_ready(arrays)  # else chunks queue up
    return arrays


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice(array, part, [start[axis] for axis in range(array.ndim)])


def _parts(
    pieces: Sequence[Piece], checkpoint: Checkpoint, box: Box, limit: int
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(where it starts inside `box`, a view with the array's axes) for all the numbers in `box`, in chunks that take at
    most about `limit` bytes of the file."""
    for piece in pieces:
        lead = len(piece.at)
        if any(not box[axis][0] <= i < box[axis][1] for axis, i in enumerate(piece.at)):
            continue
        inner = box[lead:]
        axis, step = piece.layout.leading(piece.shape, piece.inputs)
        fuse, first = piece.layout.fuse, piece.offset if piece.layout.fuse == 0 else 0
        width = piece.layout.hub_shape(piece.shape, piece.inputs)[fuse]
        row = int(np.prod(piece.hub_shape[1:], dtype=np.int64)) * checkpoint.dtype(piece.hub).itemsize
        if piece.rounds > 1:  # the rows of those it takes turns with come along
            row *= piece.hub_shape[0] // (piece.shape[axis] * step)
        chunk = max(1, limit // max(1, row * step))
        (low, high), at = inner[axis], tuple(i - box[k][0] for k, i in enumerate(piece.at))
        for a in range(low, high, chunk):
            b = min(a + chunk, high)
            if piece.rounds > 1:
                raw = _dealt(piece, checkpoint, a * step, b * step)
            else:
                raw = checkpoint.rows(piece.hub, first + a * step, first + b * step)
            if fuse:
                raw = raw[(slice(None),) * fuse + (slice(piece.offset, piece.offset + width),)]
            shape = tuple(b - a if k == axis else size for k, size in enumerate(piece.shape))
            ours = piece.layout.to_ours(raw, shape, piece.inputs)
            cut = tuple(slice(None) if k == axis else slice(*bounds) for k, bounds in enumerate(inner))
            start = at + tuple(a - low if k == axis else 0 for k in range(len(piece.shape)))
            yield start, ours[cut][(None,) * lead]
            checkpoint.forget(piece.hub)


def _dealt(piece: Piece, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of the rows that are this piece's, of a tensor in which the pieces take turns."""
    turn = piece.hub_shape[0] // piece.rounds
    own = piece.layout.hub_shape(piece.shape, piece.inputs)[0] // piece.rounds
    low, high = start // own, -(-stop // own)
    raw = checkpoint.rows(piece.hub, low * turn, high * turn)
    raw = raw.reshape(high - low, turn, *raw.shape[1:])[:, piece.offset : piece.offset + own]
    return raw.reshape(-1, *raw.shape[2:])[start - low * own : stop - low * own]
