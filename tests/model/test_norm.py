from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import LayerNorm, NoNorm, RMSNorm
from llamax.model.norm import Normalize

from .modules import randomized

X = (3.0 + 2.0 * np.random.default_rng(0).standard_normal((2, 3, 8))).astype(np.float32)


def test_rmsnorm() -> None:
    norm = randomized(lambda _: Normalize(RMSNorm(eps=0.5), 8))
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.5) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(norm(jnp.asarray(X)), expected, rtol=2e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_layernorm(bias: bool) -> None:
    norm = randomized(lambda _: Normalize(LayerNorm(eps=0.5, bias=bias), 8))
    expected = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 0.5) * np.asarray(norm.scale[...])
    expected = expected + np.asarray(norm.bias[...]) if bias else expected
    assert hasattr(norm, "bias") == bias
    np.testing.assert_allclose(norm(jnp.asarray(X)), expected, rtol=5e-6, atol=1e-6)


def test_none_is_the_identity_without_parameters() -> None:
    norm = Normalize(NoNorm(), 8)
    x = jnp.asarray(X)
    assert norm(x) is x
    assert not hasattr(norm, "scale")


@pytest.mark.parametrize("config", [RMSNorm(), LayerNorm()], ids=["rmsnorm", "layernorm"])
def test_a_fresh_norm_gives_unit_variance(config: RMSNorm | LayerNorm) -> None:
    y = np.asarray(Normalize(config, 8)(jnp.asarray(X)))
    np.testing.assert_allclose((y**2).mean(-1), 1.0, rtol=1e-4)


def test_statistics_are_float32_for_bfloat16_inputs() -> None:
    """A mean of 4096 squares in bfloat16 would lose most of its digits."""
    x = jnp.asarray(1.0 + 0.1 * np.random.default_rng(0).standard_normal((4, 4096)), jnp.bfloat16)
    y = Normalize(RMSNorm(), 4096)(x)
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), wide / np.sqrt((wide**2).mean(-1, keepdims=True)), rtol=2**-8)


def test_one_plus_multiplies_in_float32_and_starts_neutral() -> None:
    """Gemma: x (1 + w) rounded once. With w at 1/1000 a product in bfloat16 could not tell 1 + w from 1."""
    fresh = Normalize(RMSNorm(weight="one_plus"), 8)
    assert np.all(np.asarray(fresh.scale[...]) == 0)
    norm = randomized(lambda _: Normalize(RMSNorm(eps=0.5, weight="one_plus"), 8))
    plain = X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(norm(jnp.asarray(X)), plain * (1 + np.asarray(norm.scale[...])), rtol=2e-6)
    fine = Normalize(RMSNorm(eps=1e-6, weight="one_plus"), 256)
    fine.scale.set_value(jnp.full(256, 1e-3))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 256)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = jnp.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True)) * 1.001, jnp.bfloat16)
    assert float(jnp.mean(fine(x) == exact)) > 0.99


WEIGHTS = {"one": lambda w: w, "one_plus": lambda w: 1 + w, "none": lambda w: 1.0}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_gradients_of_rmsnorm_are_its_slopes(kind: str, dtype: str, tolerance: float) -> None:
    """By finite differences in float64, of x and of weights that heads have for themselves."""
    rng = np.random.default_rng(0)
    config = RMSNorm(eps=0.5, weight=kind)  # type: ignore[arg-type]
    norm = randomized(lambda _: Normalize(config, (3, 8), ("heads", "head_dim")))
    x = jnp.asarray(rng.standard_normal((2, 3, 8)), dtype)
    g = jnp.asarray(rng.standard_normal(x.shape), dtype)
    found, d_x = jax.grad(lambda norm, x: jnp.sum((norm(x) * g).astype(jnp.float32)), (0, 1))(norm, x)

    def total(x: np.ndarray, w: np.ndarray) -> float:
        unit = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5)
        return float((unit * WEIGHTS[kind](w) * np.asarray(g, np.float64)).sum())

    wide = np.asarray(x, np.float64)
    w = np.zeros((3, 8)) if kind == "none" else np.asarray(norm.scale[...], np.float64)
    scale = np.abs(np.asarray(d_x, np.float64)).max()
    assert d_x.dtype == x.dtype
    np.testing.assert_allclose(
        np.asarray(d_x, np.float64), slopes(lambda x: total(x, w), wide), rtol=tolerance, atol=tolerance * scale
    )
    if kind != "none":
        np.testing.assert_allclose(
            found.scale[...], slopes(lambda w: total(wide, w), w), rtol=tolerance, atol=tolerance * scale
        )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rmsnorm_rounds_where_the_plain_formula_does(kind: str) -> None:
    """In bfloat16, against autodiff of the formula: the same bits forward, a last digit of difference backward. The
    weight's gradient is exact to float32, summed over more rows than bfloat16 can count."""
    rng = np.random.default_rng(1)
    norm = randomized(lambda _: Normalize(RMSNorm(eps=1e-5, weight=kind), 64))  # type: ignore[arg-type]
    x, g = (jnp.asarray(rng.standard_normal((4096, 64)), jnp.bfloat16) for _ in range(2))

    def plain(norm: Normalize, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
        if kind == "one_plus":
            wide = wide * (1.0 + norm.scale[...])
        out = wide.astype(x.dtype)
        return out * norm.scale.astype(x.dtype) if kind == "one" else out

    y, back = jax.vjp(lambda norm, x: norm(x), norm, x)
    expected, back_plain = jax.vjp(plain, norm, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))
    (d_norm, d_x), (_, d_plain) = back(g), back_plain(g)
    d_x, d_plain = (np.asarray(d, np.float32) for d in (d_x, d_plain))
    np.testing.assert_allclose(d_x, d_plain, rtol=2**-7, atol=2**-7 * np.abs(d_plain).mean(-1).min())
    assert np.mean(d_x == d_plain) > 0.99
    if kind == "one":  # products are rounded, as autodiff's are, and their sum is not
        unit = np.asarray(Normalize(RMSNorm(eps=1e-5), 64)(x), np.float64)
        products = jnp.asarray(unit * np.asarray(g, np.float64), jnp.bfloat16)
        np.testing.assert_allclose(d_norm.scale[...], np.asarray(products, np.float64).sum(0), rtol=1e-4, atol=1e-3)


def slopes(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Central differences."""
    found = np.zeros(at.shape)
    for i in np.ndindex(*at.shape):
        step = np.zeros(at.shape)
        step[i] = 1e-5
        found[i] = (function(at + step) - function(at - step)) / 2e-5
    return found


def test_weightless_rmsnorm_has_no_parameter() -> None:
    norm = Normalize(RMSNorm(eps=0.5, weight="none"), 8)
    assert not hasattr(norm, "scale")
    np.testing.assert_allclose(norm(jnp.asarray(X)), X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.5), rtol=2e-6)


@pytest.mark.parametrize("config", [RMSNorm(eps=0.5), LayerNorm(eps=0.5)], ids=["rmsnorm", "layernorm"])
def test_weights_per_head(config: RMSNorm | LayerNorm) -> None:
    """[..., heads, width]: each head is normed with its own weights."""
    norm = randomized(lambda _: Normalize(config, (3, 8), ("heads", "head_dim")))
    found = np.asarray(norm(jnp.asarray(X)))
    for head in range(3):
        one = Normalize(config, 8)
        one.scale.set_value(norm.scale[...][head])
        if isinstance(config, LayerNorm):
            one.bias.set_value(norm.bias[...][head])
        np.testing.assert_allclose(found[:, head], one(jnp.asarray(X[:, head])), rtol=1e-5, atol=1e-6)
