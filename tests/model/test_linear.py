from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import Init
from llamax.model.linear import _one_row, contract, residual_gain, weight

# x shape, w shape, contracted axes, the same as an einsum: every product in the model.
SHAPES = {
    "projection": ((2, 5, 8), (8, 3, 4), 1, "btd,dhe->bthe"),
    "attention_out": ((2, 5, 3, 4), (3, 4, 8), 2, "bthe,hed->btd"),
    "feed_forward": ((2, 5, 8), (8, 12), 1, "btd,df->btf"),
    "head": ((2, 5, 8), (8, 32), 1, "btd,dv->btv"),
    "one_token": ((1, 1, 8), (8, 12), 1, "btd,df->btf"),
}


def arrays(name: str) -> list[jax.Array]:
    x, w, _, spec = SHAPES[name]
    rng = np.random.default_rng(0)
    out = np.einsum(spec, np.zeros(x), np.zeros(w)).shape
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (x, w, out)]


@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient_equal_einsum(name: str) -> None:
    x, w, g = arrays(name)
    _, _, inputs, spec = SHAPES[name]
    found, vjp = jax.vjp(lambda x, w: contract(x, w, inputs, "float32"), x, w)
    expected, plain_vjp = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, w)
    for a, b in zip((found, *vjp(g)), (expected, *plain_vjp(g)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_one_row_as_a_sum(name: str) -> None:
    """What a GPU does in place of a product, in both number formats."""
    x, w, _ = arrays(name)
    _, _, inputs, spec = SHAPES[name]
    x = x[:1, :1]
    np.testing.assert_allclose(_one_row(x, w, inputs, "float32"), jnp.einsum(spec, x, w), atol=5e-6)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    exact = jnp.einsum(spec, x.astype(jnp.float32), w.astype(jnp.float32))
    np.testing.assert_array_equal(_one_row(x, w, inputs, "bfloat16").dtype, jnp.bfloat16)
    np.testing.assert_allclose(_one_row(x.astype(jnp.float32), w, inputs, "bfloat16"), exact, atol=5e-6)


@pytest.mark.parametrize("activation", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_products_accumulate_in_float32(name: str, activation: str) -> None:
    """Operands rounded once, sums exact: the same as float64 einsum of the rounded operands."""
    x, w, g = arrays(name)
    x, g = x.astype(activation), g.astype(activation)
    _, _, inputs, spec = SHAPES[name]

    def both(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(lambda x, w: contract(x, w, inputs, "bfloat16"), x, w)
        return (y, *vjp(g))

    y, dx, dw = jax.jit(both)(x, w, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, jnp.float32)
    rx, rw, rg = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, w, g))
    left, out = spec.split("->")
    xs, ws = left.split(",")
    expected = (
        np.einsum(spec, rx, rw),
        np.einsum(f"{out},{ws}->{xs}", rg, rw),
        np.einsum(f"{xs},{out}->{ws}", rx, rg),
    )
    for found, exact, dtype in zip((y, dx, dw), expected, (activation, activation, "float32"), strict=True):
        tolerance = 2**-8 if dtype == "bfloat16" else 1e-6
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize(("platform", "result"), [("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")])
def test_narrow_results_are_written_narrow_on_accelerators(platform: str, result: str) -> None:
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 6), jnp.float32)
    traced = jax.jit(lambda x, w: contract(x, w, 1, "bfloat16")).trace(x, w)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    (line,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert f"(tensor<4x8xbf16>, tensor<8x6xbf16>) -> tensor<4x6x{result}>" in line


@pytest.mark.parametrize("shape", [(64, 16, 16), (256, 64)])
def test_std_of_a_normal_matrix(shape: tuple[int, ...]) -> None:
    w = weight(jax.random.key(0), shape, ("embed",) * len(shape), Init(std=0.05))[...]
    assert w.dtype == jnp.float32
    assert abs(float(w.std()) / 0.05 - 1) < 4 / (2 * w.size) ** 0.5
    assert abs(float(w.mean())) < 4 * 0.05 / w.size**0.5


@pytest.mark.parametrize(
    ("shape", "axes", "inputs", "fan_in"),
    [
        ((64, 16, 16), ("embed", "heads", "head_dim"), 1, 64),
        ((16, 16, 64), ("heads", "head_dim", "embed"), 2, 256),
        ((4, 64, 64), ("experts", "embed", "mlp"), 1, 64),
    ],
)
def test_fan_in_std(shape: tuple[int, ...], axes: tuple[str, ...], inputs: int, fan_in: int) -> None:
    """Unit-variance inputs give unit-variance outputs; an expert axis is no input."""
    w = weight(jax.random.key(0), shape, axes, Init(kind="fan_in"), inputs=inputs, gain=0.5)[...]
    assert abs(float(w.std()) * fan_in**0.5 / 0.5 - 1) < 4 / (2 * w.size) ** 0.5


def test_residual_gain() -> None:
    gains = {
        depth: [float(residual_gain(Init(depth_scaling=depth), layer, 8)) for layer in (0, 1, 7)]
        for depth in ("none", "total", "layer")
    }
    np.testing.assert_allclose(gains["none"], [1, 1, 1])
    np.testing.assert_allclose(gains["total"], [0.25] * 3, rtol=1e-6)  # 1 / sqrt(2 x 8)
    np.testing.assert_allclose(gains["layer"], [2**-0.5, 0.5, 0.25], rtol=1e-6)  # 1 / sqrt(2 (l + 1))
