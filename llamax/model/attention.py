"""Causal softmax attention: the one place where it is computed, and the layer around it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.components import GroupedQueryAttention, Init, Position, Rope
from llamax.model.cache import KeyValues, Slot, Step, extend
from llamax.model.context import attend_cut
from llamax.model.execution import Execution
from llamax.model.flash import COVERS, by_device, covering
from llamax.model.linear import contract, parameter, weight
from llamax.model.norm import Normalize
from llamax.model.position import alibi_slopes, logit_scale, query_temperature, rotate
from llamax.model.scores import (
    Logits,
    Sight,
    Span,
    in_groups,
    over_keys,
    over_outputs,
    over_queries,
    product,
    scored,
    whole,
)
from llamax.model.statistics import Statistics


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
    return _attend(q, k, v, sight, logits, compute)[0].astype(q.dtype)


def _attend(
    q: Array, k: Array, v: Array, sight: Sight, logits: Logits, compute: str
) -> tuple[Array, tuple[list[Array], ...]]:
    groups = in_groups(q, k) * logits.scale  # smaller than the scores
    outs, saved, slopes = [], [], []
    for span in spans(q.shape[1], k.shape[1], sight, logits):
        scores, slope = scored(groups[:, span.queries], k[:, span.keys], span, sight, logits, compute)
        slopes += [] if slope is None else [slope]
        p = jax.nn.softmax(scores, axis=-1)
        outs.append(over_keys(p, v[:, span.keys], compute))
        saved.append(p.astype(jnp.dtype(compute)))
    out = jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]
    return out.reshape(*q.shape[:3], -1), (saved, slopes)


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


def _attend_forward(q, k, v, sight, logits, compute):  # type: ignore[no-untyped-def]
    out, saved = _attend(q, k, v, sight, logits, compute)
    return out.astype(q.dtype), (q, k, v, sight, out, saved)


def _attend_backward(logits, compute, kept, g):  # type: ignore[no-untyped-def]
    q, k, v, sight, out, (saved, slopes) = kept
    q5, g5 = in_groups(q, k) * logits.scale, in_groups(g, k)
    mean_dp = over_outputs(g5, in_groups(out, k), compute)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for i, span in enumerate(spans(q.shape[1], k.shape[1], sight, logits)):
        p, q_i, g_i = saved[i], q5[:, span.queries], g5[:, span.queries]
        dp = product("btjgd,bsjd->bjtgs", g_i, v[:, span.keys], compute)
        ds = p.astype(jnp.float32) * (dp - mean_dp[:, :, span.queries])
        ds = ds * slopes[i] if slopes else ds
        dq.append(over_keys(ds, k[:, span.keys], compute))
        dk = dk.at[:, span.keys].add(over_queries(ds, q_i, compute))
        dv = dv.at[:, span.keys].add(over_queries(p, g_i, compute))
    dq = (jnp.concatenate(dq, axis=1) if len(dq) > 1 else dq[0]).reshape(q.shape) * logits.scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_attend_forward, _attend_backward)


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads value_dim"],
    sight: Sight,
    logits: Logits,
    execution: Execution,
) -> Float[Array, "batch queries heads value_dim"]:
    """`attend` over cut sequences where `execution` cuts them, else by a kernel of `execution.kernels` where one covers
    the call, else by the rules above."""
    if execution.context is not None and sight.selected is None:  # chosen keys come gathered, see mla.py
        return attend_cut(q, k, v, sight.segments, logits, execution.plain, execution.context)
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
        q, k, v = self._project(x, table, execution.positions(x.shape[1]), execution)
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
        written, seen, positions = extend(cache, KeyValues(k.swapaxes(1, 2), v.swapaxes(1, 2)), step)
        key, value = seen.key.swapaxes(1, 2), seen.value.swapaxes(1, 2)
        sight = Sight(step.positions, positions)
        return self._out(attend(q, key, value, sight, self.logits, execution.plain), execution), written

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
