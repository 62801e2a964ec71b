"""The parts that every computation of attention is made of: how logits are formed, which query sees which key, and the
products of scores with keys, values and queries."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llamax.config.components import BlockSparse


class Logits(NamedTuple):
    """How attention logits are formed: scale, cap, then ALiBi, then the mask. Static."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    slopes: tuple[float, ...] | None = None
    chunk: int | None = None
    block_sparse: BlockSparse | None = None


class Sight(NamedTuple):
    """What decides which query sees which key. All None: one document a row, queries and keys at positions 0, 1, ...

    `queries` and `keys` are positions (a key that must not be seen, such as an empty cache slot, has one after every
    query's); `segments` are the queries' document ids, and the keys' too where `key_segments` is None; `selected` keeps
    some of the keys that are visible otherwise (sparse attention).
    """

    queries: Int[Array, "batch queries"] | None = None
    keys: Int[Array, "batch keys"] | None = None
    segments: Int[Array, "batch queries"] | None = None
    selected: Bool[Array, "batch queries keys"] | None = None
    key_segments: Int[Array, "batch keys"] | None = None


class Span(NamedTuple):
    """Some queries, and the keys that contain all they can see: slices of the call's own."""

    queries: slice
    keys: slice


def whole(queries: int, keys: int) -> Span:
    """All queries and all keys."""
    return Span(slice(0, queries), slice(0, keys))


def visible(
    span: Span, sight: Sight, window: int | None = None, chunk: int | None = None
) -> tuple[Bool[Array, "#rows queries keys"], Int[Array, "#rows queries keys"]]:
    """(whether each of a span's queries sees each of its keys, how far back that is); one row where all are alike."""
    t, s = _positions(span, sight)
    distance = t[:, :, None] - s[:, None, :]
    keep = distance >= 0
    if window is not None:
        keep = keep & (distance < window)
    if chunk is not None:
        keep = keep & (t[:, :, None] // chunk == s[:, None, :] // chunk)
    if sight.segments is not None:
        of_keys = sight.segments if sight.key_segments is None else sight.key_segments
        keep = keep & (sight.segments[:, span.queries, None] == of_keys[:, None, span.keys])
    if sight.selected is not None:
        keep = keep & sight.selected[:, span.queries, span.keys]
    return keep, distance


def _positions(span: Span, sight: Sight) -> tuple[Array, Array]:
    # Positions that are not given are constants, so that the mask of training is one too.
    def of(given: Array | None, part: slice) -> Array:
        return jnp.arange(part.start, part.stop)[None] if given is None else given[:, part]

    return of(sight.queries, span.queries), of(sight.keys, span.keys)


def in_blocks(
    pattern: BlockSparse, heads: int, t: Int[Array, "#rows queries"], s: Int[Array, "#rows keys"]
) -> Bool[Array, "#rows {heads} queries keys"]:
    """Whether the key at each position s is in a block that the query at t sees, by head; the causal mask is apart."""
    query_block, key_block = t // pattern.size, s // pattern.size
    near = query_block[:, :, None] - key_block[:, None, :] < pattern.local
    far = key_block[:, None] % pattern.stride == jnp.asarray(pattern.remainders(heads))[:, None]
    return near[:, None] | far[:, :, None]


def scored(
    q: Float[Array, "batch queries kv_heads group head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    span: Span,
    sight: Sight,
    logits: Logits,
    compute: str,
) -> tuple[Float[Array, "batch kv_heads queries group keys"], Array | None]:
    """(the logits of a span from its scaled queries and its keys, unseen ones very negative; d logits / d q k^T where
    there is a cap)."""
    scores, slope = product("btjgd,bsjd->bjtgs", q, k, compute), None
    if logits.softcap is not None:
        tanh = jnp.tanh(scores / logits.softcap)
        scores, slope = logits.softcap * tanh, 1 - tanh * tanh
    return _masked(scores, span, q.shape[2] * q.shape[3], sight, logits), slope


UNSEEN = -1e30  # the logit of a key that is not seen: finite, so that a softmax over such keys alone has no NaN


def _masked(scores: Array, span: Span, heads: int, sight: Sight, logits: Logits) -> Array:
    """Scores [batch, kv_heads, queries, group, keys] with ALiBi, those of keys that are not seen very negative."""
    kv_heads = scores.shape[1]
    keep, distance = visible(span, sight, logits.window, logits.chunk)
    seen = keep[:, None, :, None]
    if logits.block_sparse is not None:
        blocks = in_blocks(logits.block_sparse, heads, *_positions(span, sight))
        seen = seen & blocks.reshape(len(blocks), kv_heads, -1, *blocks.shape[2:]).swapaxes(2, 3)
    if logits.slopes is not None:
        slopes = jnp.asarray(logits.slopes, jnp.float32).reshape(1, kv_heads, 1, -1, 1)
        scores = scores - slopes * distance[:, None, :, None]
    return jnp.where(seen, scores, UNSEEN)


def product(spec: str, a: Array, b: Array, compute: str) -> Array:
    """An einsum of operands in `compute`, summed in float32."""
    dtype = jnp.dtype(compute)
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def in_groups(x: Array, k: Array) -> Array:
    """[batch, queries, heads, width] as [batch, queries, kv_heads, heads a kv head, width]."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])


def over_keys(weights: Array, x: Array, compute: str) -> Array:
    """sum over keys: weights [b, j, t, g, s] x [b, s, j, d] -> [b, t, j, g, d], rows of weights as they lie."""
    b, j, t, g, s = weights.shape
    rows = weights.reshape(b, j, t * g, s)
    out = product("bjms,bsjd->bjmd", rows, x, compute)
    return out.reshape(b, j, t, g, -1).transpose(0, 2, 1, 3, 4)


def over_queries(weights: Array, x: Array, compute: str) -> Array:
    """sum over queries and heads of a group: weights [b, j, t, g, s] x [b, t, j, g, d] -> [b, s, j, d].

    As a product of [d, t g] and [t g, s]: contracting the rows of both would be slow on a CPU, and it is the small
    operand that is turned.
    """
    b, j, t, g, s = weights.shape
    turned = x.transpose(0, 2, 4, 1, 3).reshape(b, j, -1, t * g)
    return product("bjdm,bjms->bjds", turned, weights.reshape(b, j, t * g, s), compute).transpose(0, 3, 1, 2)


def over_outputs(
    g: Float[Array, "batch queries kv_heads group width"],
    out: Float[Array, "batch queries kv_heads group width"],
    compute: str,
) -> Float[Array, "batch kv_heads queries group 1"]:
    """Each query's mean of d p over its keys, weighted by p, from the gradient g of its output (arXiv:2205.14135,
    appendix B.2): sum_s p_s (g . v_s) = g . sum_s p_s v_s = g . out. g is rounded as the product that gives d p does.

    XLA's CPU library takes up sums of products and is ten times slower at them than at sums; it leaves the select.
    """
    rounded = jnp.finfo(compute)
    g = jax.lax.reduce_precision(g.astype(jnp.float32), rounded.nexp, rounded.nmant)
    products = jnp.where(jnp.isfinite(g), g * out, jnp.nan)
    return products.sum(-1, keepdims=True).transpose(0, 2, 1, 3, 4)
