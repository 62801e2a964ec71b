"""Causal softmax attention: the one place where it is computed, and the layer around it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llamax.config.components import BlockSparse, GroupedQueryAttention, Init, Position, Rope
from llamax.model.cache import KeyValues, Slot, Step, extend
from llamax.model.execution import Execution
from llamax.model.flash import COVERS, by_device, covering
from llamax.model.linear import contract, parameter, weight
from llamax.model.norm import Normalize
from llamax.model.position import alibi_slopes, logit_scale, query_temperature, rotate
from llamax.model.statistics import Statistics


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
    query's); `segments` are document ids where queries and keys are the same tokens; `selected` keeps some of the keys
    that are visible otherwise (sparse attention).
    """

    queries: Int[Array, "batch queries"] | None = None
    keys: Int[Array, "batch keys"] | None = None
    segments: Int[Array, "batch seq"] | None = None
    selected: Bool[Array, "batch queries keys"] | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads value_dim"],
    sight: Sight,
    logits: Logits,
    compute: str,
) -> Float[Array, "batch queries heads value_dim"]:
    """softmax(mask(cap(scale q k^T) + alibi)) v, the softmax in float32.

    A query at position t sees keys at s with 0 <= t - s < window, in its own chunk of positions, in the blocks of
    positions that its head sees, and what `sight` leaves of them. kv head j serves query heads j g .. (j + 1) g - 1.
    The backward rule is explicit: it multiplies in `compute` with float32 accumulation and avoids the masks and
    reductions autodiff leaves behind.
    """
    return _attend(q, k, v, sight, logits, compute)[0]


def _attend(
    q: Array, k: Array, v: Array, sight: Sight, logits: Logits, compute: str
) -> tuple[Array, tuple[list[Array], ...]]:
    grouped = _grouped(q, k) * logits.scale  # smaller than the scores
    outs, saved, slopes = [], [], []
    for span in spans(q.shape[1], k.shape[1], sight, logits):
        scores = _einsum("btjgd,bsjd->bjtgs", grouped[:, span.queries], k[:, span.keys], compute)
        if logits.softcap is not None:
            tanh = jnp.tanh(scores / logits.softcap)
            scores = logits.softcap * tanh
            slopes.append(1 - tanh * tanh)
        p = jax.nn.softmax(_masked(scores, span, q.shape[2], sight, logits), axis=-1)
        outs.append(_over_keys(p, v[:, span.keys], compute))
        saved.append(p.astype(jnp.dtype(compute)))
    out = jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]
    return out.reshape(*q.shape[:3], -1).astype(q.dtype), (saved, slopes)


class Span(NamedTuple):
    """Some queries, and the keys that contain all they can see: slices of the call's own."""

    queries: slice
    keys: slice


def whole(queries: int, keys: int) -> Span:
    """All queries and all keys."""
    return Span(slice(0, queries), slice(0, keys))


MOST_SPANS = 8  # of one call: half of all scores are never seen, and 8 spans compute 1/16 of all for nothing


def spans(queries: int, keys: int, sight: Sight, logits: Logits) -> list[Span]:
    """Queries in blocks, each with the keys from its window's or chunk's first to the last it may see.

    One span of everything where positions are data, as in decoding.
    """
    if sight.queries is not None or sight.keys is not None:
        return [whole(queries, keys)]
    size = max(64, min(128, queries // 2), -(-queries // MOST_SPANS))
    found = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        first = 0 if logits.window is None else max(0, start - logits.window + 1)
        first = first if logits.chunk is None else max(first, start // logits.chunk * logits.chunk)
        found.append(Span(slice(start, end), slice(first, min(end, keys))))
    return found


def _grouped(x: Array, k: Array) -> Array:
    """[batch, queries, heads, width] as [batch, queries, kv_heads, heads a kv head, width]."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])


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
        keep = keep & (sight.segments[:, span.queries, None] == sight.segments[:, None, span.keys])
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
    return jnp.where(seen, scores, -1e30)


def _einsum(spec: str, a: Array, b: Array, compute: str) -> Array:
    dtype = jnp.dtype(compute)
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _attend_forward(q, k, v, sight, logits, compute):  # type: ignore[no-untyped-def]
    out, saved = _attend(q, k, v, sight, logits, compute)
    return out, (q, k, v, sight, saved)


def _attend_backward(logits, compute, kept, g):  # type: ignore[no-untyped-def]
    q, k, v, sight, (saved, slopes) = kept
    q5, g5 = _grouped(q, k) * logits.scale, _grouped(g, k)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for i, span in enumerate(spans(q.shape[1], k.shape[1], sight, logits)):
        p, q_i, g_i = saved[i], q5[:, span.queries], g5[:, span.queries]
        dp = _einsum("btjgd,bsjd->bjtgs", g_i, v[:, span.keys], compute)
        wide = p.astype(jnp.float32)
        ds = wide * (dp - jnp.sum(wide * dp, axis=-1, keepdims=True))
        ds = ds * slopes[i] if slopes else ds
        dq.append(_over_keys(ds, k[:, span.keys], compute))
        dk = dk.at[:, span.keys].add(_over_queries(ds, q_i, compute))
        dv = dv.at[:, span.keys].add(_over_queries(p, g_i, compute))
    dq = (jnp.concatenate(dq, axis=1) if len(dq) > 1 else dq[0]).reshape(q.shape) * logits.scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _over_keys(weights: Array, x: Array, compute: str) -> Array:
    """sum over keys: weights [b, j, t, g, s] x [b, s, j, d] -> [b, t, j, g, d], rows of weights as they lie."""
    b, j, t, g, s = weights.shape
    rows = weights.reshape(b, j, t * g, s)
    out = _einsum("bjms,bsjd->bjmd", rows, x, compute)
    return out.reshape(b, j, t, g, -1).transpose(0, 2, 1, 3, 4)


def _over_queries(weights: Array, x: Array, compute: str) -> Array:
    """sum over queries and heads of a group: weights [b, j, t, g, s] x [b, t, j, g, d] -> [b, s, j, d].

    As a product of [d, t g] and [t g, s]: contracting the rows of both would be slow on a CPU, and it is the small
    operand that is turned.
    """
    b, j, t, g, s = weights.shape
    turned = x.transpose(0, 2, 4, 1, 3).reshape(b, j, -1, t * g)
    return _einsum("bjdm,bjms->bjds", turned, weights.reshape(b, j, t * g, s), compute).transpose(0, 3, 1, 2)


attend.defvjp(_attend_forward, _attend_backward)


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads value_dim"],
    sight: Sight,
    logits: Logits,
    execution: Execution,
) -> Float[Array, "batch queries heads value_dim"]:
    """`attend` by a kernel of `execution.kernels` where one covers the call, else by the rules above."""
    asked = {name: value for part in (logits, sight) for name, value in part._asdict().items() if value is not None}
    scale = asked.pop("scale")
    kernel = covering(execution.kernels, set(asked), execution.plain, q.shape, k.shape, v.shape)
    if kernel is None:
        return attend(q, k, v, sight, logits, execution.plain)
    run = by_device(COVERS[kernel], execution.residual)
    return run(q, k, v, scale=scale, dtype=execution.plain, **asked)


class SelfAttention(nnx.Module):
    """Grouped-query attention with its projections (arXiv:1706.03762, 2305.13245); the config says the rest."""

    def __init__(
        self,
        config: GroupedQueryAttention,
        position: Position,
        d_model: int,
        init: Init,
        gain: Float[Array, ""],
        *,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, 4)
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        self.config, self.position = config, position
        self.query = weight(keys[0], (d_model, heads, dim), ("embed", "heads", "head_dim"), init)
        self.key = weight(keys[1], (d_model, kv_heads, dim), ("embed", "kv_heads", "head_dim"), init)
        self.value = weight(keys[2], (d_model, kv_heads, dim), ("embed", "kv_heads", "head_dim"), init)
        self.out = weight(keys[3], (heads, dim, d_model), ("heads", "head_dim", "embed"), init, inputs=2, gain=gain)
        if config.qkv_bias:
            self.query_bias = parameter(jnp.zeros((heads, dim)), ("heads", "head_dim"), "bias")
            self.key_bias = parameter(jnp.zeros((kv_heads, dim)), ("kv_heads", "head_dim"), "bias")
            self.value_bias = parameter(jnp.zeros((kv_heads, dim)), ("kv_heads", "head_dim"), "bias")
        if config.out_bias:
            self.out_bias = parameter(jnp.zeros(d_model), ("embed",), "bias")
        if config.qk_norm is not None and config.qk_norm_weights == "shared":
            self.query_norm = Normalize(config.qk_norm, dim, ("head_dim",))
            self.key_norm = Normalize(config.qk_norm, dim, ("head_dim",))
        elif config.qk_norm is not None:
            self.query_norm = Normalize(config.qk_norm, (heads, dim), ("heads", "head_dim"))
            self.key_norm = Normalize(config.qk_norm, (kv_heads, dim), ("kv_heads", "head_dim"))

    @property
    def logits(self) -> Logits:
        """How this layer forms its logits."""
        config = self.config
        slopes = tuple(alibi_slopes(config.heads).tolist()) if self.position.kind == "alibi" else None
        scale = config.scale if config.scale is not None else logit_scale(self.position, config.head_dim)
        return Logits(scale, config.softcap, config.window, slopes, config.chunk, config.block_sparse)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        table: Float[Array, "2 seq half"] | None,
        segments: Int[Array, "batch seq"] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], Statistics]:
        """(attention output before it joins the residual stream, no statistics); `table`: the rotary table or None."""
        q, k, v = self._project(x, table, jnp.arange(x.shape[1]), execution)
        return self._out(attention(q, k, v, Sight(segments=segments), self.logits, execution), execution), {}

    def decode(
        self,
        x: Float[Array, "batch seq d_model"],
        table: Float[Array, "2 batch seq half"] | None,
        step: Step,
        cache: Slot,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], KeyValues]:
        """(attention output for tokens that follow those in the cache, the stacked cache with them written)."""
        q, k, v = self._project(x, table, step.positions, execution)
        written, seen, positions = extend(cache, KeyValues(k, v), step)
        sight = Sight(step.positions, positions)
        return self._out(attend(q, seen.key, seen.value, sight, self.logits, execution.plain), execution), written

    def _project(
        self, x: Array, table: Array | None, positions: Array, execution: Execution
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values of x, ready to attend; `positions` [seq] or [batch, seq]."""
        config = self.config
        q, k, v = (contract(x, w[...], 1, execution.compute) for w in (self.query, self.key, self.value))
        if config.qkv_bias:
            q, k, v = (
                y + b.astype(y.dtype) for y, b in ((q, self.query_bias), (k, self.key_bias), (v, self.value_bias))
            )
        if config.clip is not None:
            q, k, v = (jnp.clip(y, -config.clip, config.clip) for y in (q, k, v))
        if config.qk_norm is not None and config.qk_norm_place == "before":
            q, k = self.query_norm(q), self.key_norm(k)
        if isinstance(self.position, Rope) and table is not None:
            q, k = rotate(q, table, self.position.layout), rotate(k, table, self.position.layout)
        if config.qk_norm is not None and config.qk_norm_place == "after":
            q, k = self.query_norm(q), self.key_norm(k)
        if config.temperature is not None:
            q = q * query_temperature(config.temperature, positions)[..., None, None].astype(q.dtype)
        return q, k, v

    def _out(self, y: Array, execution: Execution) -> Array:
        out = contract(y, self.out[...], 2, execution.compute)
        return out + self.out_bias.astype(out.dtype) if self.config.out_bias else out
