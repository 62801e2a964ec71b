"""Latent attention and the indexer against loops in float64 numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import Init, LatentAttention, Rope
from llamax.config.rotary import RopeYarn
from llamax.model.execution import Execution
from llamax.model.indexer import choose, divergence, selection
from llamax.model.mla import MultiHeadLatentAttention
from llamax.model.position import rotary_table

from . import reference
from .modules import randomized

D, SEQ, HEADS, RANK, NOPE, ROPE, VALUE = 8, 7, 3, 6, 5, 4, 2
YARN = RopeYarn(factor=4.0, original_max_len=64, mscale=0.7, mscale_all_dim=0.7)
INDEXER = {"heads": 2, "head_dim": 6, "top_k": 3}
X = np.random.default_rng(1).standard_normal((2, SEQ, D)).astype(np.float32)
SEGMENTS = np.array([[0] * SEQ, [1, 1, 1, 2, 2, 2, 2]])


def layer_of(rope: Rope, **fields: Any) -> MultiHeadLatentAttention:
    shape = {"heads": HEADS, "kv_rank": RANK, "nope_dim": NOPE, "rope_dim": ROPE, "value_dim": VALUE}
    config = LatentAttention.model_validate({**shape, **fields})
    return randomized(lambda key: MultiHeadLatentAttention(config, rope, D, Init(), jnp.float32(1.0), key=key))


def weights_of(layer: Any) -> dict[str, np.ndarray]:
    """Every parameter of a layer by dotted name, float64."""
    leaves = jax.tree_util.tree_leaves_with_path(layer)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    return {name: np.asarray(leaf, np.float64) for name, (_, leaf) in zip(names, leaves, strict=True)}


def turned(x: np.ndarray, rope: Rope, t: int, layout: str) -> np.ndarray:
    """The whole of the vector x turned to position t, as complex numbers."""
    table = rotary_table(rope, len(x), SEQ).astype(np.float64)[:, t]
    turn = table[0] + 1j * table[1]
    if layout == "interleaved":
        z = (x[0::2] + 1j * x[1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(-1)
    z = (x[: len(x) // 2] + 1j * x[len(x) // 2 :]) * turn
    return np.concatenate([z.real, z.imag])


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def index_by_hand(w: dict[str, np.ndarray], x: np.ndarray, rope: Rope, layout: str) -> np.ndarray:
    """DeepSeek-V3.2's index score of one row, key by key: [rope | nope] heads, layer-normed keys."""
    out = np.zeros((SEQ, SEQ))

    def place(v: np.ndarray, t: int) -> np.ndarray:
        return np.concatenate([turned(v[:ROPE], rope, t, layout), v[ROPE:]])

    for t in range(SEQ):
        q = np.einsum("r,rhd->hd", rms(x[t] @ w["q_down"], w["q_norm.scale"]), w["indexer.query"])
        head_weights = x[t] @ w["indexer.weights"] / np.sqrt(INDEXER["heads"])
        for s in range(SEQ):
            k = x[s] @ w["indexer.key"]
            k = (k - k.mean()) / np.sqrt(k.var() + 1e-6) * w["indexer.key_norm.scale"] + w["indexer.key_norm.bias"]
            for h in range(INDEXER["heads"]):
                product = place(q[h], t) @ place(k, s) / np.sqrt(INDEXER["head_dim"])
                out[t, s] += head_weights[h] * max(product, 0.0)
    return out


def by_hand(
    w: dict[str, np.ndarray], x: np.ndarray, rope: Rope, scale: float, selected: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(the layer's output for one batch, its attention [batch, head, t, s]) with heads and positions in loops."""
    batch = x.shape[0]
    q, k = (np.zeros((batch, SEQ, HEADS, NOPE + ROPE)) for _ in range(2))
    v = np.zeros((batch, SEQ, HEADS, VALUE))
    for b in range(batch):
        for t in range(SEQ):
            down = x[b, t] @ w["kv_down"]
            latent, shared = rms(down[:RANK], w["kv_norm.scale"]), turned(down[RANK:], rope, t, rope.layout)
            source = x[b, t] if "query" in w else rms(x[b, t] @ w["q_down"], w["q_norm.scale"])
            query = np.einsum("r,rhd->hd", source, w["query"] if "query" in w else w["q_up"])
            up = np.einsum("r,rhd->hd", latent, w["kv_up"])
            for h in range(HEADS):
                q[b, t, h] = np.concatenate([query[h, :NOPE], turned(query[h, NOPE:], rope, t, rope.layout)])
                k[b, t, h] = np.concatenate([up[h, :NOPE], shared])
            v[b, t] = up[:, NOPE:]
    y = reference.attention(q, k, v, scale=scale, segments=SEGMENTS, selected=selected)
    eye = np.broadcast_to(np.eye(SEQ)[None, :, None], (batch, SEQ, HEADS, SEQ))
    seen = reference.attention(q, k, eye, scale=scale, segments=SEGMENTS, selected=selected)
    return np.einsum("bthv,hvd->btd", y, w["out"]), seen.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("q_rank", [None, 5])
def test_layer_against_loops(layout: Any, q_rank: int | None) -> None:
    rope = Rope(theta=100.0, layout=layout, scaling=YARN)
    layer = layer_of(rope, q_rank=q_rank)
    table = jnp.asarray(rotary_table(rope, ROPE, SEQ))
    found, statistics = jax.jit(lambda m: m(jnp.asarray(X), table, jnp.asarray(SEGMENTS), Execution()))(layer)
    scale = (NOPE + ROPE) ** -0.5 * (0.1 * 0.7 * np.log(4.0) + 1) ** 2
    np.testing.assert_allclose(found, by_hand(weights_of(layer), X, rope, scale, None)[0], atol=5e-6)
    assert statistics == {}


@pytest.mark.parametrize("index_layout", ["half", "interleaved"])
def test_sparse_layer_against_loops(index_layout: Any) -> None:
    """The highest top_k indices among the keys in sight, then attention to those; KL of the two on the way."""
    rope = Rope(theta=100.0, layout="interleaved")
    layer = layer_of(rope, q_rank=5, indexer={**INDEXER, "layout": index_layout})
    table, w = jnp.asarray(rotary_table(rope, ROPE, SEQ)), weights_of(layer)
    index = np.stack([index_by_hand(w, x, rope, index_layout) for x in X.astype(np.float64)])
    selected = np.zeros((2, SEQ, SEQ), bool)
    for b, t in np.ndindex(2, SEQ):
        keys = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
        selected[b, t, sorted(keys, key=lambda s: index[b, t, s])[-INDEXER["top_k"] :]] = True
    assert selected.sum() < np.tril(np.ones((2, SEQ, SEQ))).sum()
    expected, attention = by_hand(w, X.astype(np.float64), rope, (NOPE + ROPE) ** -0.5, selected)
    found, statistics = jax.jit(lambda m: m(jnp.asarray(X), table, jnp.asarray(SEGMENTS), Execution()))(layer)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    total = 0.0
    for b, t in np.ndindex(2, SEQ):
        keys = np.flatnonzero(selected[b, t])
        p, q = attention[b, :, t, keys].mean(-1), reference.softmax(index[b, t, keys])
        total += (p * np.log(p / q)).sum()
    np.testing.assert_allclose(statistics["indexer"], total / (2 * SEQ), rtol=1e-5)


def test_the_indexer_and_the_model_do_not_train_each_other() -> None:
    """Its loss reaches the indexer alone, the output everything but the indexer; both reach all they should."""
    rope = Rope(theta=100.0)
    layer = layer_of(rope, q_rank=5, indexer=INDEXER)
    table = jnp.asarray(rotary_table(rope, ROPE, SEQ))

    def parts(layer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, statistics = layer(x, table, None, Execution())
        return jnp.sum(jnp.sin(y)), statistics["indexer"]

    x = jnp.asarray(X)
    for which in (0, 1):
        gradient, along = jax.jit(jax.grad(lambda m, x, i=which: parts(m, x)[i], (0, 1)))(layer, x)
        moved = {name for name, value in weights_of(gradient).items() if np.abs(value).max() > 0}
        own = {name for name in weights_of(layer) if name.startswith("indexer")}
        assert moved == (own if which else set(weights_of(layer)) - own)
        assert (float(jnp.abs(along).max()) > 0) == (which == 0)


def test_gradient_of_the_indexer_loss() -> None:
    """d KL / d index = softmax(index) - p over the keys seen: central differences agree."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 4, 2, 3)), jnp.float32) for _ in range(2))
    index = rng.standard_normal((1, 4, 4)).astype(np.float32)
    seen = np.tril(np.ones((4, 4), bool))[None] & (rng.random((1, 4, 4)) < 0.8) | np.eye(4, dtype=bool)[None]
    found = jax.grad(lambda i: divergence(q, k, i, jnp.asarray(seen), 0.6, "float32"))(jnp.asarray(index))
    p = np.zeros((1, 4, 4))
    for t in range(4):
        keys = np.flatnonzero(seen[0, t])
        scores = np.einsum("hd,shd->hs", np.asarray(q)[0, t], np.asarray(k)[0, keys]) * 0.6
        p[0, t, keys] = reference.softmax(scores).mean(0)

    def kl(i: np.ndarray) -> float:
        rows = [(p[0, t, s], reference.softmax(i[0, t, s])) for t in range(4) for s in [np.flatnonzero(seen[0, t])]]
        return float(sum((a * np.log(a / b)).sum() for a, b in rows) / 4)

    np.testing.assert_allclose(found, reference.numeric_gradient(kl, index), atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
def test_selection_keeps_the_mask(top_k: int) -> None:
    """Exactly min(top_k, keys in sight) of the keys in sight, and the best of them."""
    index = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 5)), jnp.float32)
    keep = jnp.tril(jnp.ones((1, 5, 5), bool))
    found = np.asarray(selection(index, keep, top_k))
    for b, t in np.ndindex(2, 5):
        best = np.argsort(-np.asarray(index)[b, t, : t + 1])[:top_k]
        assert set(np.flatnonzero(found[b, t])) == set(best.tolist())
    assert choose(index, keep, top_k).shape == (2, 5, min(top_k, 5))
