"""The rows of a batch that this process holds: read by nobody else, unless their devices hold the same ones."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int64

Rows = Int64[np.ndarray, " rows"]


def rows_of(place: NamedSharding, shape: tuple[int, ...], axis: int) -> Rows:
    """The indices along `axis` of an array of `shape` that lie on this process's devices under `place`, ascending.

    They follow from the sharding and not from the number of processes: processes that share a data shard, such as the
    halves of a tensor axis, need the same rows.
    """
    held = place.addressable_devices_indices_map(shape).values()
    parts = {index[axis].indices(shape[axis]) for index in held if index is not None}
    return np.unique(np.concatenate([np.arange(*part, dtype=np.int64) for part in parts]))


def on_mesh(place: NamedSharding, local: np.ndarray, rows: Rows, size: int, axis: int) -> jax.Array:
    """The array that has `size` entries along `axis`, of which `local` holds those at `rows`: every process gives the
    rows that `rows_of` names for it."""
    if place.is_fully_addressable:
        return jax.make_array_from_process_local_data(place, local)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, last, _ = index[axis].indices(size)
        at = int(np.searchsorted(rows, first))
        return local[(*index[:axis], slice(at, at + last - first), *index[axis + 1 :])]

    return jax.make_array_from_callback((*local.shape[:axis], size, *local.shape[axis + 1 :]), place, part)
