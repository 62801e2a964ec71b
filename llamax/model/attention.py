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
) -> tuple[Array, tuple[Array, ...]]:
    batch, queries, heads, dim = q.shape
    grouped = q.reshape(batch, queries, k.shape[2], heads // k.shape[2], dim) * logits.scale  # smaller than the scores
    scores = _einsum("btjgd,bsjd->bjgts", grouped, k, compute)
    slope: tuple[Array, ...] = ()
    if logits.softcap is not None:
        tanh = jnp.tanh(scores / logits.softcap)
        scores, slope = logits.softcap * tanh, (1 - tanh * tanh,)
    p = jax.nn.softmax(scores + _bias(queries, k, heads, sight, logits), axis=-1)
    out = _einsum("bjgts,bsjd->btjgd", p, v, compute).reshape(batch, queries, heads, -1).astype(q.dtype)
    return out, (p.astype(jnp.dtype(compute)), *slope)


def visible(
    queries: int, keys: int, sight: Sight, window: int | None = None, chunk: int | None = None
) -> tuple[Bool[Array, "#rows queries keys"], Int[Array, "#rows queries keys"]]:
    """(whether each of `queries` sees each of `keys`, how far back the key is); one row where all rows are alike."""
    t, s = _positions(queries, keys, sight)
    distance = t[:, :, None] - s[:, None, :]
    keep = distance >= 0
    if window is not None:
        keep = keep & (distance < window)
    if chunk is not None:
        keep = keep & (t[:, :, None] // chunk == s[:, None, :] // chunk)
    if sight.segments is not None:
        keep = keep & (sight.segments[:, :, None] == sight.segments[:, None, :])
    if sight.selected is not None:
        keep = keep & sight.selected
    return keep, distance


def _positions(queries: int, keys: int, sight: Sight) -> tuple[Array, Array]:
    # Positions that are not given are constants, so that the mask of training is one too.
    t = jnp.arange(queries)[None] if sight.queries is None else sight.queries
    s = jnp.arange(keys)[None] if sight.keys is None else sight.keys
    return t, s


def in_blocks(
    pattern: BlockSparse, heads: int, t: Int[Array, "#rows queries"], s: Int[Array, "#rows keys"]
) -> Bool[Array, "#rows {heads} queries keys"]:
    """Whether the key at each position s is in a block that the query at t sees, by head; the causal mask is apart."""
    query_block, key_block = t // pattern.size, s // pattern.size
    near = query_block[:, :, None] - key_block[:, None, :] < pattern.local
    far = key_block[:, None] % pattern.stride == jnp.asarray(pattern.remainders(heads))[:, None]
    return near[:, None] | far[:, :, None]


def _bias(queries: int, k: Array, heads: int, sight: Sight, logits: Logits) -> Array:
    """ALiBi and the mask, [1 or batch, kv_heads or 1, group or 1, queries, keys]; masked entries very negative."""
    keep, distance = (x[:, None, None] for x in visible(queries, k.shape[1], sight, logits.window, logits.chunk))
    if logits.block_sparse is not None:
        blocks = in_blocks(logits.block_sparse, heads, *_positions(queries, k.shape[1], sight))
        keep = keep & blocks.reshape(len(blocks), k.shape[2], -1, *blocks.shape[2:])
    bias = jnp.where(keep, 0.0, -1e30)
    if logits.slopes is not None:
        slopes = jnp.asarray(logits.slopes, jnp.float32).reshape(1, k.shape[2], -1, 1, 1)
        bias = bias - slopes * distance
    return bias


def _einsum(spec: str, a: Array, b: Array, compute: str) -> Array:
    dtype = jnp.dtype(compute)
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _attend_forward(q, k, v, sight, logits, compute):  # type: ignore[no-untyped-def]
    out, saved = _attend(q, k, v, sight, logits, compute)
    return out, (q, k, v, *saved)


def _attend_backward(logits, compute, saved, g):  # type: ignore[no-untyped-def]
    q, k, v, p, *slope = saved
    batch, queries, heads, _ = q.shape
    grouped = (batch, queries, k.shape[2], heads // k.shape[2], -1)
    q5, g5 = q.reshape(grouped), g.reshape(grouped)
    dv = _einsum("bjgts,btjgd->bsjd", p, g5, compute)
    dp = _einsum("btjgd,bsjd->bjgts", g5, v, compute)
    wide = p.astype(jnp.float32)
    ds = wide * (dp - jnp.sum(wide * dp, axis=-1, keepdims=True))
    if slope:
        ds = ds * slope[0]
    dq = _einsum("bjgts,bsjd->btjgd", ds, k, compute).reshape(q.shape) * logits.scale
    dk = _einsum("bjgts,btjgd->bsjd", ds, q5 * logits.scale, compute)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_attend_forward, _attend_backward)


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
        return self._out(attend(q, k, v, Sight(segments=segments), self.logits, execution.compute), execution), {}

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
        return self._out(attend(q, seen.key, seen.value, sight, self.logits, execution.compute), execution), written

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
