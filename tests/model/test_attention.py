from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import Alibi, GroupedQueryAttention, Init, Rope
from llamax.model.attention import Logits, SelfAttention, Sight, attend
from llamax.model.execution import Execution
from llamax.model.position import alibi_slopes, rotary_table

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
    options = {name: value for name, value in case.items() if name != "segments"}
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


def test_window_counts_the_query_itself() -> None:
    """With values that are one-hot in position, the output shows which keys are seen."""
    seq = 6
    q = k = jnp.zeros((1, seq, 1, seq))
    out = attend(q, k, jnp.eye(seq)[None, :, None], Sight(), Logits(1.0, window=3), "float32")[0, :, 0]
    seen = np.tril(np.ones((seq, seq))) - np.tril(np.ones((seq, seq)), -3)
    np.testing.assert_allclose(out, seen / seen.sum(1, keepdims=True), atol=1e-6)


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


def test_alibi_layer_uses_the_slopes_of_its_heads() -> None:
    config = GroupedQueryAttention(heads=8, kv_heads=8, head_dim=4, softcap=3.0, window=5)
    layer = randomized(lambda key: SelfAttention(config, Alibi(), 8, Init(), jnp.float32(1.0), key=key))
    assert layer.logits == Logits(0.5, 3.0, 5, tuple(2.0 ** -(i + 1) for i in range(8)), None)
