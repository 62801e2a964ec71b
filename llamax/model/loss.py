"""Next-token cross-entropy that need not hold the logits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llamax.model.execution import Execution
from llamax.model.statistics import LayerStatistics, add_module
from llamax.model.transformer import Transformer


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10))
def cross_entropy(
    x: Float[Array, "batch seq d_model"],
    w: Float[Array, "d_model vocab"],
    bias: Float[Array, " vocab"] | None,
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    z_loss: Float[Array, ""],
    softcap: float | None,
    chunk: int,
    compute: str,
    scale: float | None = None,
    ways: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weighted -log p, sum of weighted z_loss x log(Z)^2), in nats, `chunk` positions of logits at a time.

    Logits are (x w + bias) scale, capped at softcap tanh(logit / softcap). A chunk has equal parts of each of `ways`
    parts of a sequence: where these are on several devices, each has its share of every chunk.

    z-loss is PaLM's (arXiv:2204.02311). Differentiated, the gradients of x, w and bias are formed in the same pass over
    the chunks, so logits are computed once and never stored: differentiate the sum of the two, never one alone.
    """
    sums, _ = _scan(x, w, bias, targets, weights, z_loss, softcap, chunk, compute, scale, ways, gradients=False)
    return sums


def _scan(x, w, bias, targets, weights, z_loss, softcap, chunk, compute, scale, ways, gradients):  # type: ignore[no-untyped-def]
    batch, seq, d = x.shape
    parts = seq // chunk

    def split(a: Array) -> Array:
        pieces = a.reshape(batch, ways, parts, chunk // ways, *a.shape[2:])
        return jnp.moveaxis(pieces, 2, 0).reshape(parts, batch, chunk, *a.shape[2:])

    dtype = jnp.dtype(compute)
    w = w.astype(dtype)

    def body(carry, part):  # type: ignore[no-untyped-def]
        (nll, z), dw, db = carry
        x_c, t_c, m_c = part
        logits = jnp.einsum("bsd,dv->bsv", x_c.astype(dtype), w, preferred_element_type=jnp.float32)
        logits = logits if bias is None else logits + bias
        logits = logits if scale is None else logits * scale
        tanh = None if softcap is None else jnp.tanh(logits / softcap)
        logits = logits if tanh is None else softcap * tanh
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        e = jnp.exp(logits - top)
        total = e.sum(-1, keepdims=True)
        log_z = (jnp.log(total) + top)[..., 0]
        hit = jax.nn.one_hot(t_c, logits.shape[-1], dtype=jnp.bool_)
        picked = jnp.take_along_axis(logits, t_c[..., None], -1, mode="clip")[..., 0]
        sums = (nll + jnp.sum(m_c * (log_z - picked)), z + z_loss * jnp.sum(m_c * jnp.square(log_z)))
        if not gradients:
            return (sums, dw, db), None
        g = (e / total) * (m_c * (1.0 + 2.0 * z_loss * log_z))[..., None] - jnp.where(hit, m_c[..., None], 0.0)
        g = g if tanh is None else g * (1.0 - tanh * tanh)
        g = g if scale is None else g * scale
        db = db if db is None else db + g.sum((0, 1))
        g = g.astype(dtype)
        dw = dw + jnp.einsum("bsd,bsv->dv", x_c.astype(dtype), g, preferred_element_type=jnp.float32)
        dx = jnp.einsum("bsv,dv->bsd", g, w, preferred_element_type=jnp.float32)
        return (sums, dw, db), dx.astype(x.dtype)

    zero = jnp.float32(0.0)
    dw = jnp.zeros(w.shape, jnp.float32) if gradients else None
    db = jnp.zeros(bias.shape, jnp.float32) if gradients and bias is not None else None
    parts_of = (split(x), split(targets), split(weights))
    if parts == 1:
        (sums, dw, db), dx = body(((zero, zero), dw, db), jax.tree.map(lambda a: a[0], parts_of))
        dx = None if dx is None else dx[None]
    else:
        (sums, dw, db), dx = jax.lax.scan(body, ((zero, zero), dw, db), parts_of)
    if gradients:
        pieces = dx.reshape(parts, batch, ways, chunk // ways, d)
        dx = jnp.moveaxis(pieces, 0, 2).reshape(batch, seq, d)
    return sums, (dx, dw, db)


def _forward(x, w, bias, targets, weights, z_loss, softcap, chunk, compute, scale, ways):  # type: ignore[no-untyped-def]
    return _scan(x, w, bias, targets, weights, z_loss, softcap, chunk, compute, scale, ways, gradients=True)


def _backward(softcap, chunk, compute, scale, ways, saved, g):  # type: ignore[no-untyped-def]
    # The saved gradients are of nll + z together: the two sums are always added with equal weight.
    dx, dw, db = saved
    return ((dx * g[0]).astype(dx.dtype), dw * g[0], None if db is None else db * g[0], None, None, None)


cross_entropy.defvjp(_forward, _backward)


def chunk_length(seq: int, batch: int, loss_chunk: int | None, ways: int = 1) -> int:
    """The largest divisor of `seq` whose positions over `batch` rows hold at most `loss_chunk` tokens, a multiple of
    `ways` (and at least that)."""
    if loss_chunk is None:
        return seq
    return max((c for c in range(ways, seq + 1, ways) if seq % c == 0 and c * batch <= loss_chunk), default=ways)


def next_token_loss(
    model: Transformer,
    tokens: Int[Array, "batch seq_plus_1"],
    segments: Int[Array, "batch seq_plus_1"] | None,
    weights: Float[Array, "batch seq"] | None,
    z_loss: Float[Array, ""],
    loss_chunk: int | None,
    execution: Execution,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """Sums over predicted positions: (nats, z-loss, their weights), and the router statistics [moe layers].

    With `segments`, the first token of a document is not predicted from the document before it.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    if segments is not None:
        mask = mask * (segments[:, 1:] == segments[:, :-1])
        segments = segments[:, :-1]
    inputs, targets, mask, segments = jax.tree.map(execution.held, (inputs, targets, mask, segments))
    x, statistics = model.features(inputs, segments, execution)
    nats, z = head_loss(model, x, targets, mask, z_loss, loss_chunk, execution)
    return nats, z, mask.sum(), statistics


class Losses(NamedTuple):
    """Sums over predicted positions of one batch, in nats: next tokens, their z-loss, one entry a prediction module;
    and what the layers and the modules' blocks report."""

    nats: Float[Array, ""]
    z: Float[Array, ""]
    modules: tuple[Float[Array, ""], ...]
    statistics: LayerStatistics


def training_losses(
    model: Transformer,
    tokens: Int[Array, "batch seq_plus_1"],
    segments: Int[Array, "batch seq_plus_1"] | None,
    z_loss: Float[Array, ""],
    loss_chunk: int | None,
    execution: Execution,
) -> Losses:
    """Next-token loss and that of every multi-token prediction module (arXiv:2412.19437, eq. 21-25).

    Module k (from 1) at position t reads the embedding of token t + k and predicts token t + 1 + k. Sequences keep
    their length; the last k positions, which have no target, count nothing, and no position before sees them.
    """
    inside = None if segments is None else execution.held(segments[:, :-1])

    def loss(x: Array, k: int, z_loss: Array) -> tuple[Array, Array]:
        targets, weights = _ahead(tokens, k + 1), target_weights(tokens, segments, k)
        return head_loss(model, x, execution.held(targets), execution.held(weights), z_loss, loss_chunk, execution)

    x, statistics = model.features(execution.held(tokens[:, :-1]), inside, execution)
    nats, z = loss(x, 0, z_loss)
    modules = []
    for k in range(1, model.config.mtp + 1):
        further = execution.checkpoint(lambda m, x, t, k=k: m.further(k - 1, x, t, inside, execution))
        x, report = further(model, x, execution.held(_ahead(tokens, k)))
        statistics = add_module(statistics, f"mtp.{k - 1}.block", report)
        modules.append(loss(x, k, jnp.float32(0.0))[0])
    return Losses(nats, z, tuple(modules), statistics)


def target_weights(
    tokens: Int[Array, "batch seq_plus_1"], segments: Int[Array, "batch seq_plus_1"] | None, k: int
) -> Float[Array, "batch seq"]:
    """1 at every position t whose target, token t + 1 + k, is in the sequence and in the same document, else 0."""
    seq = tokens.shape[1] - 1
    inside = jnp.broadcast_to(jnp.arange(seq) + 1 + k <= seq, (tokens.shape[0], seq))
    if segments is not None:
        inside = inside & (segments[:, :-1] == _ahead(segments, k + 1))
    return inside.astype(jnp.float32)


def _ahead(tokens: Int[Array, "batch seq_plus_1"], k: int) -> Int[Array, "batch seq"]:
    """Token t + k at position t, zeros past the end."""
    seq = tokens.shape[1] - 1
    return jnp.pad(tokens[:, k:], ((0, 0), (0, k)))[:, :seq]


def head_loss(
    model: Transformer,
    x: Float[Array, "batch seq d_model"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    z_loss: Float[Array, ""],
    loss_chunk: int | None,
    execution: Execution,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy` of the model's head on a normed stream x."""
    head = model.config.head
    bias = model.head_bias[...] if head.bias else None
    ways = 1 if execution.context is None else execution.context.ways
    chunk = chunk_length(x.shape[1], x.shape[0], loss_chunk, ways)
    x = execution.to_head(x)
    return cross_entropy(
        x, model.head_weight, bias, targets, weights, z_loss, head.softcap, chunk, execution.plain, head.scale, ways
    )
