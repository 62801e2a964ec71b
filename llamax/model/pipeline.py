"""Layers cut over devices (the mesh axis `stage`): the microbatches of a batch follow each other through the stages, as
in GPipe (arXiv:1811.06965).

All stages work at once, each on another microbatch: the stages are an axis of one vmapped program, cut over the mesh,
and what moves on to the next stage is that axis shifted by one, which is a send between neighbours (the form of GSPMD,
arXiv:2105.04663, section 3.3). Differentiating it gives the backward pipeline. With S stages and M microbatches there
are M + S - 1 turns, in S - 1 of which a stage has nothing of use to do (accounting/pipeline.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llamax.model.execution import Stages
from llamax.model.statistics import LOAD, Statistics

AXIS = "stage"
Layers = Callable[[Array, Any, Array | None], tuple[Array, list[Statistics]]]


def through_stages(
    layers: Layers,
    x: Float[Array, "batch seq d_model"],
    blocks: Any,
    segments: Int[Array, "batch seq"] | None,
    stages: Stages,
) -> tuple[Float[Array, "batch seq d_model"], list[Statistics]]:
    """`layers(x, blocks, segments)` for `blocks` stacked [repeat, ...], of which stage i has the i-th contiguous part.

    Row r of the batch belongs to microbatch r modulo `stages.microbatches` (see `interleaved`), so that every device
    of the batch's mesh axes has rows of each. Statistics are [microbatch, repeat]; loads are summed over microbatches.
    """
    count, parts, mesh = stages.stages, stages.microbatches, stages.held.mesh
    micro, ids = jax.tree.map(lambda a: _split(a, parts), (x, segments))

    def of_stages(a: Array) -> Array:
        a = a.reshape(count, a.shape[0] // count, *a.shape[1:])
        free = [PartitionSpec.UNCONSTRAINED] * (a.ndim - 1)
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(AXIS, *free)))

    mine = jax.tree.map(of_stages, blocks)

    def turn(held: Array, t: Array) -> tuple[Array, tuple[Array, list[Statistics]]]:
        entering = jax.lax.dynamic_index_in_dim(micro, jnp.minimum(t, parts - 1), 0)
        held = jax.lax.with_sharding_constraint(jnp.concatenate([entering, held[:-1]]), stages.held)
        now = jnp.clip(t - jnp.arange(count), 0, parts - 1)  # the microbatch each stage has
        out, statistics = jax.vmap(layers)(held, mine, None if ids is None else ids[now])
        out = jax.lax.with_sharding_constraint(out, stages.held)
        return out, (out[-1], statistics)

    # Before its first microbatch a stage works on a copy of one, which nothing reads: numbers as usual as any.
    start = jnp.broadcast_to(jax.lax.stop_gradient(micro[:1]), (count, *micro.shape[1:]))
    _, (outs, statistics) = jax.lax.scan(turn, start, jnp.arange(parts + count - 1))
    return _joined(outs[count - 1 :]), [_of_microbatches(found, parts, count) for found in statistics]


def interleaved(a: Array, parts: int) -> Array:
    """[batch, ...] whose `parts` equal contiguous parts are dealt out row by row, as `through_stages` takes them."""
    return _joined(a.reshape(parts, a.shape[0] // parts, *a.shape[1:]))


def _split(a: Array, parts: int) -> Array:
    return a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)


def _joined(a: Array) -> Array:
    """The inverse of `_split`."""
    return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])


def _of_microbatches(found: Statistics, parts: int, count: int) -> Statistics:
    """[turn, stage, layers of a stage, ...] as [microbatch, layers, ...]: stage s has microbatch m in turn m + s."""
    turns = jnp.arange(parts)[:, None] + jnp.arange(count)

    def one(path: Any, a: Array) -> Array:
        a = a[turns, jnp.arange(count)]
        a = a.reshape(parts, -1, *a.shape[3:])
        return a.sum(0) if path[-1].key == LOAD else a

    return jax.tree_util.tree_map_with_path(one, found)
