"""What a model remembers of the tokens it has read, each attention kind in the form it deserves.

A layer without a window keeps `capacity` slots (block-sparse attention too: what one head skips another sees), one with
a window or chunks only as many as the window or chunk is long, written round and round. Latent attention keeps one
latent and one rotary key a token in place of keys and values, sparse attention its index keys too. Which position a
slot holds follows from how many tokens the row has, so nothing but the values is stored, and rows may have different
lengths.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from llamax.config.components import Attention, LatentAttention
from llamax.config.model import ModelConfig
from llamax.errors import UserError
from llamax.model.position import PositionTables, position_tables

EMPTY = 2**30  # the position of a slot that holds nothing: after every query's, so that none sees it


class KeyValues(NamedTuple):
    """Keys, rotated, and values of grouped-query attention: a head's slots side by side, as products read them."""

    key: Float[Array, "*layers batch kv_heads slots head_dim"]
    value: Float[Array, "*layers batch kv_heads slots head_dim"]


class Latents(NamedTuple):
    """Of latent attention [normed latent | rotated shared key], and the indexer's keys where there is one."""

    latent: Float[Array, "*layers batch slots width"]
    index_key: Float[Array, "*layers batch slots head_dim"] | None


LayerCache = KeyValues | Latents
Kind = TypeVar("Kind", KeyValues, Latents)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths", "tables", "layers"], meta_fields=["capacity"]
)
@dataclass(frozen=True)
class Cache:
    """A batch of rows, `lengths` tokens in each so far, at most `capacity`.

    `layers` has one entry a stack and a member of its unit, each array with a leading layers axis.
    """

    lengths: Any  # Int[Array, " batch"], unchecked: JAX also makes caches of shapes, shardings and argument records
    tables: PositionTables
    layers: tuple[tuple[LayerCache, ...], ...]
    capacity: int


class Step(NamedTuple):
    """One call of a model with a cache: row b had before[b] tokens and reads counts[b] of the columns it is given."""

    before: Int[Array, " batch"]
    counts: Int[Array, " batch"]
    positions: Int[Array, "batch seq"]
    capacity: int


class Slot(NamedTuple):
    """One layer's place in the stacked arrays of its kind."""

    arrays: Any  # KeyValues or Latents, with the layers axis
    layer: Int[Array, ""]


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: str = "float32", planned: int | None = None
) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` tokens, prompt and continuation.

    `planned` is how long rows are meant to become (default: capacity): LongRoPE turns by other angles in long rows.
    Under `jax.jit` with the shardings `map_cache` helps to make, it is made where it belongs.

    Raises:
        UserError: more tokens than learned positions.
    """
    if config.position.kind == "learned" and capacity > config.max_seq_len:
        raise UserError(
            f"{capacity} tokens exceed the learned positions, model.max_seq_len={config.max_seq_len}; shorten them"
        )
    layers = tuple(
        tuple(
            jax.tree.map(
                lambda shape: jnp.zeros(shape, dtype),
                _shapes(block.attention, (repeat, batch), capacity),
                is_leaf=lambda leaf: type(leaf) is tuple,
            )
            for block in unit
        )
        for repeat, unit in config.blocks
    )
    return Cache(jnp.zeros(batch, jnp.int32), position_tables(config, capacity, planned), layers, capacity)


def _shapes(attention: Attention, lead: tuple[int, int], capacity: int) -> LayerCache:
    if isinstance(attention, LatentAttention):
        index = None if attention.indexer is None else (*lead, capacity, attention.indexer.head_dim)
        return Latents((*lead, capacity, attention.kv_rank + attention.rope_dim), index)  # type: ignore[arg-type]
    slots = min(capacity, attention.window or attention.chunk or capacity)
    shape = (*lead, attention.kv_heads, slots, attention.head_dim)
    return KeyValues(shape, shape)  # type: ignore[arg-type]


def map_cache(cache: Cache, function: Callable[[tuple[str, ...], Array], Any]) -> Cache:
    """function(logical axes, array) of every array, abstract or not, in the cache's own structure.

    The axes are those of the mesh rules; a stacked array has one more leading dimension, as parameters do.
    """
    heads, flat = ("batch", "kv_heads", "position", "head_dim"), ("batch", "position", "latent")
    rotary = tuple(function(("pair", "position", "head_dim"), table) for table in cache.tables.rotary)
    added = None if cache.tables.added is None else function(("position", "embed"), cache.tables.added)
    layers = tuple(
        tuple(
            jax.tree.map(functools.partial(function, heads if isinstance(layer, KeyValues) else flat), layer)
            for layer in stack
        )
        for stack in cache.layers
    )
    return Cache(function(("batch",), cache.lengths), PositionTables(rotary, added), layers, cache.capacity)


def in_order(cache: Cache) -> Cache:
    """The cache with its arrays pinned as they are written, row by row. Of a loop the compiler of a GPU would choose
    another order, that of the new token's kernel, and turn every layer's part twice a step. For one device: XLA gathers
    what a pin is put on."""

    def pinned(array: Array) -> Array:
        return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))

    return dataclasses.replace(cache, layers=jax.tree.map(pinned, cache.layers))


def extend(slot: Slot, new: Kind, step: Step) -> tuple[Any, Kind, Int[Array, "batch keys"]]:
    """Adds the tokens of one call, `new` without the layers axis: (the stacked arrays, what this call's queries see in
    the same form, the positions of what they see)."""
    slots = slot.arrays[0].shape[-2]
    new = jax.tree.map(lambda a, stack: a.astype(stack.dtype), new, slot.arrays)
    written = jax.tree.map(lambda stack, a: _write(stack, slot.layer, a, step), slot.arrays, new)
    if step.positions.shape[1] == 1 or slots == step.capacity:
        # What a single token overwrites is out of its own sight, and a slot for every position overwrites nothing.
        seen = jax.tree.map(lambda stack: stack[slot.layer], written)
        return written, seen, slot_positions(slots, step.before + step.counts)
    seen = jax.tree.map(lambda stack, a: jnp.concatenate([stack[slot.layer], a], axis=-2), slot.arrays, new)
    real = jnp.arange(step.positions.shape[1]) < step.counts[:, None]
    fresh = jnp.where(real, step.positions, EMPTY)
    return written, seen, jnp.concatenate([slot_positions(slots, step.before), fresh], axis=1)


def _write(
    stack: Float[Array, "layers batch *heads slots width"],
    layer: Int[Array, ""],
    new: Float[Array, "batch *heads columns width"],
    step: Step,
) -> Float[Array, "layers batch *heads slots width"]:
    if new.shape[0] == new.shape[-2] == 1:
        return _write_one(stack, layer, new, step)
    slots, columns = stack.shape[-2], jnp.arange(new.shape[-2])
    # Of more tokens than slots only the last ones are kept; the others are sent out of the array and dropped.
    kept = (columns < step.counts[:, None]) & (columns >= step.counts[:, None] - slots)
    place = jnp.where(kept, step.positions % slots, slots)
    rows = jnp.arange(new.shape[0])[:, None]
    # Rows and places are indexed together, so their axes come first.
    return stack.at[layer, rows, ..., place, :].set(jnp.moveaxis(new, -2, 1), mode="drop")


def _write_one(stack: Array, layer: Array, new: Array, step: Step) -> Array:
    """One token of one row: a slice in place, where the compiler of a GPU would turn the whole stack for a scatter."""
    place = step.positions[0, 0] % stack.shape[-2]
    start = (layer, *[jnp.int32(0)] * (new.ndim - 2), place, jnp.int32(0))
    old = jax.lax.dynamic_slice(stack, start, (1, *new.shape))
    return jax.lax.dynamic_update_slice(stack, jnp.where(step.counts[0] > 0, new[None], old), start)


def slot_positions(slots: int, lengths: Int[Array, " batch"]) -> Int[Array, "batch slots"]:
    """The position each slot holds in rows of `lengths` tokens: the last one that is the slot's number modulo `slots`,
    or EMPTY."""
    last = lengths[:, None] - 1
    position = last - (last - jnp.arange(slots)) % slots
    return jnp.where(position < 0, EMPTY, position)
