"""The model's parts again in plain float64 numpy, with loops, and gradients by central differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def numeric_gradient(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """df/dx of a scalar function by central differences, one entry at a time."""
    x = np.array(x, np.float64)
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + step
        above = f(x)
        x[index] = kept - step
        out[index] = (above - f(x)) / (2 * step)
        x[index] = kept
    return out


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    blocks: tuple[int, int, int, int] | None = None,
    slopes: tuple[float, ...] | None = None,
    segments: np.ndarray | None = None,
    selected: np.ndarray | None = None,
) -> np.ndarray:
    """Causal attention, one query at a time over the list of keys it may see.

    `blocks` are (size, local, stride, step): head h sees of the older blocks those whose number, from 1, is a multiple
    of the stride less h steps.
    """
    batch, seq, heads, _ = q.shape
    share = heads // k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[-1]), np.float64)
    for b in range(batch):
        for t in range(seq):
            keys = [s for s in range(t + 1) if window is None or t - s <= window - 1]
            if chunk is not None:
                keys = [s for s in keys if s // chunk == t // chunk]
            if selected is not None:
                keys = [s for s in keys if selected[b, t, s]]
            if segments is not None:
                keys = [s for s in keys if segments[b, s] == segments[b, t]]
            visible = keys
            for h in range(heads):
                if blocks is not None:
                    size, local, stride, step = blocks
                    keys = [
                        s for s in visible if t // size - s // size < local or (s // size + 1 + h * step) % stride == 0
                    ]
                scores = k[b, keys, h // share] @ q[b, t, h] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                if slopes is not None:
                    scores = scores - slopes[h] * (t - np.array(keys))
                p = np.exp(scores - scores.max())
                out[b, t, h] = (p / p.sum()) @ v[b, keys, h // share]
    return out


def erf_free_gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU (arXiv:1606.08415, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    targets: np.ndarray,
    weights: np.ndarray,
    z_loss: float,
    softcap: float | None,
) -> tuple[float, float]:
    """(sum of weighted -log p, sum of weighted z_loss log(Z)^2)."""
    logits = x.astype(np.float64) @ w
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return float((weights * (log_z - picked)).sum()), float((weights * z_loss * log_z**2).sum())


def mixture(
    x: np.ndarray, router: np.ndarray, gate: np.ndarray | None, up: np.ndarray, down: np.ndarray, top_k: int
) -> np.ndarray:
    """Every token [tokens, d_model] through its top_k experts, one token and one expert at a time."""
    out = np.zeros_like(x, np.float64)
    for t, row in enumerate(x.astype(np.float64)):
        logits = row @ router
        chosen = np.argsort(-logits)[:top_k]
        for weight, e in zip(softmax(logits[chosen]), chosen, strict=True):
            hidden = row @ up[e]
            hidden = silu(hidden) if gate is None else silu(row @ gate[e]) * hidden
            out[t] += weight * (hidden @ down[e])
    return out
