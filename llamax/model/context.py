"""Attention over sequences that are cut over devices (the mesh axis `context`): queries stay where they are, keys and
values are gathered, as Llama 3 does it (arXiv:2407.21783, section 3.3.2).

A device holds two chunks of every sequence, one from either end (`Context.order`). Queries and keys are taken in
blocks, and only pairs of blocks in which some query sees some key are computed: causal attention is then half the work
of all pairs, and the same on every device. Softmax is accumulated over pairs (arXiv:2205.14135), so that the scores of
one pair exist at a time; the backward pass gathers keys and values again and sums their gradients where they live.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llamax.model.execution import Context
from llamax.model.scores import Logits, Sight, in_groups, over_keys, over_outputs, over_queries, product, scored, whole

AXIS = "context"
BLOCK = 512  # tokens of a block, at most where a chunk divides into blocks of this or up to four times less
START = -1e29  # a running maximum above every unseen logit (scores.UNSEEN), which so weighs exactly nothing


class Pair(NamedTuple):
    """A block of queries against a block of keys: which of the device's own queries and of the gathered keys they are,
    and which of the sequence; `live` is 0 for what only fills up a device's list."""

    own: Array
    query: Array
    gathered: Array
    key: Array
    live: Array


def block_size(chunk: int) -> int:
    """Tokens of a block: the largest divisor of a chunk from BLOCK / 4 to BLOCK, or the whole chunk."""
    return max((size for size in range(BLOCK // 4, BLOCK + 1) if chunk % size == 0), default=chunk)


def pairs_of(seq: int, context: Context, logits: Logits) -> Int[np.ndarray, "ways pairs 5"]:
    """Every device's list of pairs (the fields of `Pair`) that have something to see, filled up to equal lengths."""
    size = block_size(seq // (2 * context.ways))
    order = context.order(seq // size)  # of blocks: a chunk is a whole number of them
    lists = []
    for mine in order.reshape(context.ways, -1):
        lists.append(
            [
                (own, query, gathered, key, 1)
                for own, query in enumerate(mine.tolist())
                for gathered, key in enumerate(order.tolist())
                if _sees(query * size, key * size, size, logits)
            ]
        )
    most = max(len(pairs) for pairs in lists)
    return np.array([pairs + [(*pairs[0][:4], 0)] * (most - len(pairs)) for pairs in lists], np.int32)


def _sees(query: int, key: int, size: int, logits: Logits) -> bool:
    """Whether some query of the block that starts at `query` may see a key of the one at `key`, documents apart."""
    newest = key + size - 1
    near = logits.window is None or query - newest < logits.window
    together = logits.chunk is None or query // logits.chunk <= newest // logits.chunk
    return key <= query and near and together


def attend_cut(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads value_dim"],
    segments: Int[Array, "batch seq"] | None,
    logits: Logits,
    compute: str,
    context: Context,
) -> Float[Array, "batch seq heads value_dim"]:
    """`attention.attend` for queries, keys and values in the order of `context`, each cut over its axis."""
    spec = PartitionSpec(None, AXIS)
    return jax.shard_map(
        lambda q, k, v, segments: _attend(q, k, v, segments, logits, compute, context),
        mesh=context.mesh,
        in_specs=(spec, spec, spec, None if segments is None else spec),
        out_specs=spec,
        axis_names={AXIS},
        check_vma=False,
    )(q, k, v, segments)


class _Blocks(NamedTuple):
    """One device's operands by block, [blocks, batch, size, ...], and its pairs."""

    q: Array
    k: Array
    v: Array
    segments: tuple[Array, Array] | None
    pairs: Array
    size: int


def _blocks(
    q: Array, k: Array, v: Array, segments: Array | None, logits: Logits, compute: str, context: Context
) -> _Blocks:
    """Gathers keys and values, in the narrower of their own type and that of products, which would round them anyway.
    Scaled queries are [blocks, batch, size, kv_heads, group, head_dim]."""
    seq = q.shape[1] * context.ways
    size = block_size(seq // (2 * context.ways))
    k, v = (_gather(x.astype(min(x.dtype, jnp.dtype(compute), key=lambda dtype: dtype.itemsize))) for x in (k, v))
    ids = None if segments is None else (_cut(segments, size), _cut(_gather(segments), size))
    table = jnp.asarray(pairs_of(seq, context, logits))[jax.lax.axis_index(AXIS)]
    return _Blocks(_cut(in_groups(q, k) * logits.scale, size), _cut(k, size), _cut(v, size), ids, table, size)


def _gather(x: Array) -> Array:
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def _cut(x: Array, size: int) -> Array:
    """[batch, seq, ...] as [blocks, batch, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _joined(x: Array) -> Array:
    """The inverse of `_cut`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _scored(blocks: _Blocks, pair: Pair, logits: Logits, compute: str) -> tuple[Array, Array | None]:
    """`scores.scored` of one pair."""
    inside = jnp.arange(blocks.size)
    sight = Sight((pair.query * blocks.size + inside)[None], (pair.key * blocks.size + inside)[None])
    if blocks.segments is not None:
        of_queries, of_keys = blocks.segments
        sight = sight._replace(segments=of_queries[pair.own], key_segments=of_keys[pair.gathered])
    span = whole(blocks.size, blocks.size)
    return scored(blocks.q[pair.own], blocks.k[pair.gathered], span, sight, logits, compute)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(
    q: Array, k: Array, v: Array, segments: Array | None, logits: Logits, compute: str, context: Context
) -> Array:
    return _forward(q, k, v, segments, logits, compute, context)[0]


def _forward(q, k, v, segments, logits, compute, context):  # type: ignore[no-untyped-def]
    blocks = _blocks(q, k, v, segments, logits, compute, context)
    count, batch, size, kv_heads, group, _ = blocks.q.shape
    rows = (count, batch, kv_heads, size, group)

    def step(carry: tuple[Array, Array, Array], row: Array) -> tuple[Any, None]:
        sums, tops, totals = carry
        pair = Pair(*row)
        scores, _ = _scored(blocks, pair, logits, compute)
        before = tops[pair.own]
        top = jnp.maximum(before, jnp.where(pair.live, scores.max(-1), before))
        p = jnp.where(pair.live, jnp.exp(scores - top[..., None]), 0.0)
        shrink = jnp.exp(before - top)
        part = over_keys(p, blocks.v[pair.gathered], compute)
        sums = sums.at[pair.own].set(sums[pair.own] * _by_query(shrink) + part)
        totals = totals.at[pair.own].set(totals[pair.own] * shrink + p.sum(-1))
        return (sums, tops.at[pair.own].set(top), totals), None

    width = (count, batch, size, kv_heads, group, v.shape[-1])
    start = (jnp.zeros(width, jnp.float32), jnp.full(rows, START, jnp.float32), jnp.zeros(rows, jnp.float32))
    (sums, tops, totals), _ = jax.lax.scan(step, start, blocks.pairs)
    out = _joined(sums / jax.vmap(_by_query)(totals)).reshape(*q.shape[:3], -1).astype(q.dtype)
    return out, (q, k, v, segments, out, tops + jnp.log(totals))


def _by_query(x: Array) -> Array:
    """[batch, kv_heads, queries, group] beside [batch, queries, kv_heads, group, width]."""
    return x.swapaxes(1, 2)[..., None]


def _backward(logits, compute, context, saved, g):  # type: ignore[no-untyped-def]
    q, k, v, segments, out, log_total = saved
    blocks = _blocks(q, k, v, segments, logits, compute, context)
    g_blocks, out_blocks = _cut(in_groups(g, k), blocks.size), _cut(in_groups(out, k), blocks.size)
    mean_dp = jax.vmap(lambda g, out: over_outputs(g, out, compute))(g_blocks, out_blocks)

    def step(carry: tuple[Array, Array, Array], row: Array) -> tuple[Any, None]:
        dq, dk, dv = carry
        pair = Pair(*row)
        scores, slope = _scored(blocks, pair, logits, compute)
        p = jnp.where(pair.live, jnp.exp(scores - log_total[pair.own][..., None]), 0.0)
        g_own = g_blocks[pair.own]
        dp = product("btjgd,bsjd->bjtgs", g_own, blocks.v[pair.gathered], compute)
        ds = p * (dp - mean_dp[pair.own])
        ds = ds if slope is None else ds * slope
        dq = dq.at[pair.own].add(over_keys(ds, blocks.k[pair.gathered], compute))
        dk = dk.at[pair.gathered].add(over_queries(ds, blocks.q[pair.own], compute))
        dv = dv.at[pair.gathered].add(over_queries(p, g_own, compute))
        return (dq, dk, dv), None

    zero_q, zero_k, zero_v = (jnp.zeros(x.shape, jnp.float32) for x in (blocks.q, blocks.k, blocks.v))
    (dq, dk, dv), _ = jax.lax.scan(step, (zero_q, zero_k, zero_v), blocks.pairs)
    dk, dv = (jax.lax.psum_scatter(_joined(x), AXIS, scatter_dimension=1, tiled=True) for x in (dk, dv))
    dq = _joined(dq).reshape(q.shape) * logits.scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
