"""Products of rows that lie sorted by group, each group with a matrix of its own, whatever the groups' sizes.

The kernels are Pallas's for Hopper GPUs (jax.experimental.pallas.ops.gpu): they lose nothing to groups of unequal size,
where batched products need slots for the largest. `kernel=False` is the reference, `jax.lax.ragged_dot`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KERNEL = "ragged"  # its name in kernels.py
TILE = 128  # rows and columns of a block
# From eight that were tried on an H200; with these a mixture's products run at 640 TFLOP/s (benchmarks/README.md).
BLOCKS: dict[str, Any] = {"block_m": TILE, "block_n": TILE, "block_k": 64, "max_concurrent_steps": 4}


def covers(rows: int, groups: int, widths: tuple[int, ...], compute: str) -> bool:
    """Whether the kernels compute products of this many rows, [inputs, outputs] wide, in `compute`, and are worth it:
    a group has at least a block of rows, on average."""
    return compute == "bfloat16" and rows >= groups * TILE and not any(width % TILE for width in widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def ragged(
    x: Float[Array, "rows inputs"],
    w: Float[Array, "groups inputs outputs"],
    sizes: Int[Array, " groups"],
    compute: str,
    kernel: bool,
) -> Float[Array, "rows outputs"]:
    """x w by group in x's dtype: the first sizes[0] rows with w[0], the next with w[1]. All rows have a group.

    Operands are in `compute`, sums in float32, in the backward pass too. The kernel rounds the gradient of w to
    `compute`, the reference to w's dtype.
    """
    return _rows(x, w, sizes, compute, kernel, turned=False)


def _rows(x: Array, w: Array, sizes: Array, compute: str, kernel: bool, turned: bool) -> Array:
    """Rows times their groups' matrices, or those transposed."""
    a, b = x.astype(compute), w.astype(compute)
    if kernel:
        return _pallas_rows(a, b, sizes, turned).astype(x.dtype)
    b = b.swapaxes(1, 2) if turned else b
    return jax.lax.ragged_dot(a, b, sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def _pallas_rows(a: Array, b: Array, sizes: Array, turned: bool) -> Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    @jax.custom_batching.sequential_vmap  # members of a population one after another: the kernel has no such axis
    def run(a: Array, b: Array, sizes: Array) -> Array:
        columns = _side_by_side(b.shape[1 if turned else 2])
        return ragged_dot(a, b, group_sizes=sizes, transpose_rhs=turned, grid_block_n=columns, **BLOCKS)

    return run(a, b, sizes)


def _pallas_groups(a: Array, b: Array, sizes: Array) -> Array:
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    @jax.custom_batching.sequential_vmap
    def run(a: Array, b: Array, sizes: Array) -> Array:
        return transposed_ragged_dot(a, b, group_sizes=sizes, grid_block_n=_side_by_side(b.shape[1]), **BLOCKS)

    return run(a, b, sizes)


def _side_by_side(columns: int) -> int:
    """How many blocks of columns are done side by side, so that they share rows in the cache: 4 where that divides."""
    return next(count for count in (4, 2, 1) if columns // TILE % count == 0)


# What a group's rows contract to: rows x inputs with rows x outputs, over the rows of each group.
_BY_GROUP = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def _backward(compute: str, kernel: bool, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, w, sizes = saved
    dx = _rows(g, w, sizes, compute, kernel, turned=True).astype(x.dtype)
    a, b = x.astype(compute), g.astype(compute)
    if kernel:
        return dx, _pallas_groups(a, b, sizes).astype(w.dtype), None
    dw = jax.lax.ragged_dot_general(a, b, sizes, _BY_GROUP, preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype), None


ragged.defvjp(lambda x, w, sizes, compute, kernel: (ragged(x, w, sizes, compute, kernel), (x, w, sizes)), _backward)
