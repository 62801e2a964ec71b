from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import Alibi, BlockSparse, GroupedQueryAttention, Init, Rope
from llamax.model.attention import SelfAttention, attend
from llamax.model.execution import Execution
from llamax.model.position import alibi_slopes, rotary_table
from llamax.model.scores import Logits, Sight, in_blocks
from tests.hub.phi3small import block_mask

from . import reference
from .modules import randomized

CASES = {
    "multi_head": (4, 4, {}),
    "grouped": (4, 2, {}),
    "multi_query": (4, 1, {}),
    "scale": (2, 1, {"scale": 0.9}),
    "window": (4, 2, {"window": 3}),
    "window_of_one": (2, 2, {"window": 1}),
    "chunk": (4, 2, {"chunk": 4}),
    "blocks": (4, 2, {"blocks": (2, 1, 2, 1)}),
    "blocks_of_one": (6, 2, {"blocks": (1, 2, 3, 1), "softcap": 0.7, "slopes": tuple(alibi_slopes(6).tolist())}),
    "blocks_alike": (4, 4, {"blocks": (1, 1, 2, 0), "segments": np.array([[0, 0, 0, 1, 1, 2], [3, 3, 4, 4, 4, 4]])}),
    "softcap": (4, 2, {"softcap": 0.7}),
    "alibi": (4, 2, {"slopes": tuple(alibi_slopes(4).tolist())}),
    "segments": (4, 2, {"segments": np.array([[0, 0, 0, 1, 1, 2], [3, 3, 4, 4, 4, 4]])}),
    "everything": (
        4,
        2,
        {
            "scale": 0.4,
            "window": 3,
            "softcap": 0.7,
            "slopes": tuple(alibi_slopes(4).tolist()),
            "segments": np.array([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]]),
        },
    ),
}


def inputs(heads: int, kv_heads: int, seq: int = 6, dim: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(heads * 10 + kv_heads)
    shapes = [(2, seq, heads, dim), (2, seq, kv_heads, dim), (2, seq, kv_heads, dim), (2, seq, heads, dim)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def ours(case: dict, compute: str):  # type: ignore[no-untyped-def, type-arg]
    options = {name: value for name, value in case.items() if name not in ("segments", "blocks")}
    if "blocks" in case:
        size, local, stride, step = case["blocks"]
        options["block_sparse"] = BlockSparse(
            size=size, local=local, stride=stride, heads="shifted" if step else "alike"
        )
    logits = Logits(**{"scale": 0.5, **options})
    sight = Sight(segments=None if "segments" not in case else jnp.asarray(case["segments"]))
    return lambda q, k, v: attend(q, k, v, sight, logits, compute)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    heads, kv_heads, case = CASES[name]
    q, k, v, g = inputs(heads, kv_heads)

    def plain(*args: np.ndarray) -> np.ndarray:
        return reference.attention(*args, **{"scale": 0.5, **case})

    out, gradient = jax.jit(lambda *a: (lambda y, vjp: (y, vjp(jnp.asarray(g))))(*jax.vjp(ours(case, "float32"), *a)))(
        q, k, v
    )
    np.testing.assert_allclose(out, plain(q, k, v), atol=2e-6)
    wide = [a.astype(np.float64) for a in (q, k, v)]
    for i, found in enumerate(gradient):

        def along(a: np.ndarray, i: int = i) -> float:
            return float((g * plain(*wide[:i], a, *wide[i + 1 :])).sum())

        np.testing.assert_allclose(found, reference.numeric_gradient(along, wide[i]), atol=2e-5, err_msg="qkv"[i])


@pytest.mark.parametrize("name", ["multi_head", "grouped", "multi_query", "everything"])
def test_bfloat16_operands(name: str) -> None:
    heads, kv_heads, case = CASES[name]
    q, k, v, g = (jnp.asarray(a, jnp.bfloat16) for a in inputs(heads, kv_heads))

    def both(compute: str, *arrays: jax.Array) -> list[jax.Array]:
        y, vjp = jax.vjp(ours(case, compute), *arrays)
        return [y, *vjp(g.astype(y.dtype))]

    found = jax.jit(lambda *a: both("bfloat16", *a))(q, k, v)
    exact = jax.jit(lambda *a: both("float32", *a))(*(a.astype(jnp.float32) for a in (q, k, v)))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 0.03


def test_gradients_of_rounded_operands_take_the_output_s_gradient_rounded() -> None:
    """In every product that it is part of, and in the mean that stands for one of them: else they would not cancel."""
    q, k, v, g = (jnp.asarray(a) for a in inputs(4, 2, seq=40))
    pull = jax.vjp(lambda *args: attend(*args, Sight(), Logits(0.5), "bfloat16"), q, k, v)[1]
    for given, rounded in zip(pull(g), pull(g.astype(jnp.bfloat16).astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(given, rounded)


def test_a_narrow_stream_does_not_round_what_the_gradient_is_made_of() -> None:
    """float32 products around a bfloat16 stream: as near to float32 as its own rounding, with sharp scores too."""
    q, k, v, g = (jnp.asarray(a).astype(jnp.bfloat16) for a in inputs(4, 2, seq=40, dim=16))
    found, wide = (
        jax.vjp(lambda *args: attend(*args, Sight(), Logits(2.0), "float32"), *args)[1](out)
        for args, out in (((q, k, v), g), (tuple(a.astype(jnp.float32) for a in (q, k, v)), g.astype(jnp.float32)))
    )
    for a, b in zip(found, wide, strict=True):
        assert float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) < 2.5e-3  # 2^-9 and a little


def test_window_counts_the_query_itself() -> None:
    """With values that are one-hot in position, the output shows which keys are seen."""
    seq = 6
    q = k = jnp.zeros((1, seq, 1, seq))
    out = attend(q, k, jnp.eye(seq)[None, :, None], Sight(), Logits(1.0, window=3), "float32")[0, :, 0]
    seen = np.tril(np.ones((seq, seq))) - np.tril(np.ones((seq, seq)), -3)
    np.testing.assert_allclose(out, seen / seen.sum(1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("seq", [21, 24])
@pytest.mark.parametrize(
    ("heads", "size", "local", "stride", "alike"),
    [(6, 4, 2, 3, False), (3, 3, 1, 7, False), (2, 2, 3, 9, False), (4, 5, 2, 2, True), (4, 30, 1, 1, False)],
)
def test_blocks_are_those_of_the_authors_layout(
    seq: int, heads: int, size: int, local: int, stride: int, alike: bool
) -> None:
    """Against the dense mask of Phi-3-small's code, built block by block; fewer heads than the stride take steps."""
    pattern = BlockSparse(size=size, local=local, stride=stride, heads="alike" if alike else "shifted")
    places = jnp.arange(seq)[None]
    found = np.tril(in_blocks(pattern, heads, places, places)[0])
    np.testing.assert_array_equal(found, block_mask(heads, seq, size, local, stride, alike))


def test_future_keys_have_no_gradient() -> None:
    q, k, v, _ = inputs(2, 2)

    def first_queries(k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(jnp.asarray(q), k, v, Sight(), Logits(0.5), "float32")[:, :3].sum()

    for gradient in jax.grad(first_queries, (0, 1))(jnp.asarray(k), jnp.asarray(v)):
        assert np.all(np.asarray(gradient)[:, 3:] == 0)
        assert np.any(np.asarray(gradient)[:, :3] != 0)


def test_equal_to_jax_library_attention() -> None:
    q, k, v, _ = inputs(4, 2, seq=16, dim=8)
    found = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), Sight(), Logits(8**-0.5), "float32")
    np.testing.assert_allclose(found, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=2e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_projections_around_attend(bias: bool) -> None:
    """The layer against numpy: projections with biases, QK norm before the rotary, output projection."""
    config = GroupedQueryAttention(
        heads=4, kv_heads=2, head_dim=6, qkv_bias=bias, out_bias=bias, qk_norm={"kind": "rmsnorm", "eps": 1e-5}
    )
    rope = Rope(theta=100.0)
    layer = randomized(lambda key: SelfAttention(config, rope, 8, Init(), jnp.float32(1.0), key=key))
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    table = rotary_table(rope, 6, 5)

    def project(name: str) -> np.ndarray:
        y = np.einsum("btd,dhe->bthe", x, getattr(layer, name)[...])
        return y + np.asarray(getattr(layer, f"{name}_bias")[...]) if bias else y

    def normed_and_rotated(name: str) -> np.ndarray:
        y = project(name)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(getattr(layer, f"{name}_norm").scale[...])
        z = y[..., :3] + 1j * y[..., 3:]
        z = z * (table[0] + 1j * table[1])[None, :, None]
        return np.concatenate([z.real, z.imag], -1)

    q, k = normed_and_rotated("query"), normed_and_rotated("key")
    mixed = reference.attention(q, k, project("value"), scale=6**-0.5)
    expected = np.einsum("bthe,hed->btd", mixed, layer.out[...])
    expected = expected + np.asarray(layer.out_bias[...]) if bias else expected
    found = jax.jit(lambda m, x: m(x, jnp.asarray(table), None, Execution())[0])(layer, x)
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_positions_selection_and_value_width() -> None:
    """Rows at positions of their own, an empty slot, keys left out, values wider than keys: value and gradient."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 4, 5)).astype(np.float32), rng.standard_normal((2, 6, 2, 5)).astype(np.float32)
    v, g = rng.standard_normal((2, 6, 2, 7)).astype(np.float32), rng.standard_normal((2, 3, 4, 7)).astype(np.float32)
    queries, keys = np.array([[4, 5, 6], [9, 10, 11]]), np.array([[5, 2, 3, 4, 6, 99], [6, 7, 8, 9, 10, 11]])
    selected = (rng.random((2, 3, 6)) < 0.7) | (queries[:, :, None] == keys[:, None, :])
    sight = Sight(jnp.asarray(queries), jnp.asarray(keys), None, jnp.asarray(selected))
    logits = Logits(0.5, softcap=2.0, window=5, slopes=tuple(alibi_slopes(4).tolist()), chunk=4)

    def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        out = np.zeros(g.shape)
        for b, t, h in np.ndindex(2, 3, 4):
            here = queries[b, t]
            seen = [s for s in range(6) if 0 <= here - keys[b, s] < 5 and here // 4 == keys[b, s] // 4]
            seen = [s for s in seen if selected[b, t, s]]
            scores = 2 * np.tanh(k[b, seen, h // 2] @ q[b, t, h] / 4) - alibi_slopes(4)[h] * (here - keys[b, seen])
            out[b, t, h] = reference.softmax(scores) @ v[b, seen, h // 2]
        return out

    wide = [a.astype(np.float64) for a in (q, k, v)]

    def both(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        y, vjp = jax.vjp(lambda *a: attend(*a, sight, logits, "float32"), *arrays)
        return y, vjp(jnp.asarray(g))

    found, gradient = jax.jit(both)(q, k, v)
    np.testing.assert_allclose(found, plain(*wide), atol=2e-6)
    for i, along in enumerate(gradient):
        exact = reference.numeric_gradient(
            lambda a, i=i: float((g * plain(*wide[:i], a, *wide[i + 1 :])).sum()), wide[i]
        )
        np.testing.assert_allclose(along, exact, atol=2e-5, err_msg="qkv"[i])


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("weights", ["shared", "per_head"])
def test_clip_norm_rotary_and_temperature_in_their_order(place: Any, weights: Any) -> None:
    config = GroupedQueryAttention.model_validate(
        {
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 6,
            "clip": 0.4,
            "temperature": {"scale": 0.3, "floor": 2},
            "qk_norm": {"kind": "layernorm", "bias": False},
            "qk_norm_weights": weights,
            "qk_norm_place": place,
        }
    )
    rope = Rope(theta=100.0, layout="interleaved")
    layer = randomized(lambda key: SelfAttention(config, rope, 8, Init(), jnp.float32(1.0), key=key))
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    table = rotary_table(rope, 6, 5)

    def normed(y: np.ndarray, name: str) -> np.ndarray:
        y = y - y.mean(-1, keepdims=True)
        return (
            y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(getattr(layer, f"{name}_norm").scale[...])
        )

    def made(name: str) -> np.ndarray:
        y = np.clip(np.einsum("btd,dhe->bthe", x, getattr(layer, name)[...]), -0.4, 0.4)
        y = normed(y, name) if place == "before" else y
        z = (y[..., 0::2] + 1j * y[..., 1::2]) * (table[0] + 1j * table[1])[None, :, None]
        y = np.stack([z.real, z.imag], -1).reshape(y.shape)
        return normed(y, name) if place == "after" else y

    q = made("query") * (1 + 0.3 * np.log([1, 2, 2, 3, 3]))[None, :, None, None]
    value = np.clip(np.einsum("btd,dhe->bthe", x, layer.value[...]), -0.4, 0.4)
    mixed = reference.attention(q, made("key"), value, scale=6**-0.5)
    found = jax.jit(lambda m, x: m(x, jnp.asarray(table), None, Execution())[0])(layer, x)
    np.testing.assert_allclose(found, np.einsum("bthe,hed->btd", mixed, layer.out[...]), atol=5e-6)
    assert layer.query_norm.scale.shape == ((4, 6) if weights == "per_head" else (6,))
    assert layer.key_norm.scale.shape == ((2, 6) if weights == "per_head" else (6,))


def test_alibi_layer_uses_the_slopes_of_its_heads() -> None:
    config = GroupedQueryAttention(heads=8, kv_heads=8, head_dim=4, softcap=3.0, window=5)
    layer = randomized(lambda key: SelfAttention(config, Alibi(), 8, Init(), jnp.float32(1.0), key=key))
    assert layer.logits == Logits(0.5, 3.0, 5, tuple(2.0 ** -(i + 1) for i in range(8)), None)
