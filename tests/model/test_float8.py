"""Eight-bit products against their emulation in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llamax.accounting.peaks import PEAKS, peak_flops_per_second
from llamax.model.execution import Execution
from llamax.model.linear import contract, quantize
from llamax.model.loss import next_token_loss
from llamax.model.transformer import Transformer

from .modules import small_model, tokens_of

LIMITS = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as the format holds it, scaled by the least power of two above its largest entry over the format's limit."""
    scale = np.float32(2.0) ** np.floor(np.log2(np.abs(x).max() / LIMITS[dtype]) + 1)
    return (x / scale).astype(getattr(ml_dtypes, dtype)).astype(np.float64) * scale


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_quantize(dtype: str, size: float) -> None:
    x = np.asarray(np.random.default_rng(0).standard_normal((5, 7)) * size, np.float32)
    values, scale = quantize(jnp.asarray(x), dtype)
    assert values.dtype == jnp.dtype(dtype)
    assert LIMITS[dtype] / 2 <= float(jnp.abs(values.astype(jnp.float32)).max()) <= LIMITS[dtype]
    assert np.frexp(float(scale))[0] == 0.5  # a power of two
    np.testing.assert_array_equal(np.asarray(values, np.float64) * float(scale), rounded(x, dtype))


@pytest.mark.parametrize("dtype", LIMITS)
def test_zeros_stay_zeros(dtype: str) -> None:
    values, scale = quantize(jnp.zeros((2, 2)), dtype)
    assert not np.any(np.asarray(values, np.float32))
    assert float(scale) == 1.0


def test_value_and_gradient_are_products_of_rounded_operands() -> None:
    """e4m3 for both operands forward; backward e5m2 for what comes back, e4m3 for the other."""
    rng = np.random.default_rng(1)
    x, w, g = (np.asarray(rng.standard_normal(s), np.float32) for s in ((3, 4, 8), (8, 6), (3, 4, 6)))

    def both(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, w: contract(x, w, 1, "float8"), x, w)
        return (y, *pull(g))

    y, dx, dw = jax.jit(both)(x, w, g)
    rx, rw, rg = rounded(x, "float8_e4m3fn"), rounded(w, "float8_e4m3fn"), rounded(g, "float8_e5m2")
    np.testing.assert_allclose(y, rx @ rw, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, rg @ rw.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("btd,btf->df", rx, rg), rtol=1e-5, atol=1e-5)


def test_the_operands_reach_the_product_in_eight_bits() -> None:
    """What a GPU's compiler needs to see: an eight-bit product, scales outside."""
    x, w = jnp.ones((4, 8)), jnp.ones((8, 6))
    text = jax.jit(lambda x, w: contract(x, w, 1, "float8")).lower(x, w).as_text()
    (line,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "tensor<4x8xf8E4M3FN>, tensor<8x6xf8E4M3FN>) -> tensor<4x6xf32>" in line


def test_gradients_of_a_model() -> None:
    """Finite, near the exact ones, and head, router and attention products in bfloat16."""
    model, tokens = small_model(scale=0.1), tokens_of(2, 17)

    def loss(model: Transformer, tokens: jax.Array, compute: str) -> jax.Array:
        execution = Execution(compute, "float32")  # type: ignore[arg-type]
        nats, _, count, _ = next_token_loss(model, tokens, None, None, jnp.float32(0.0), None, execution)
        return nats / count

    found = {
        c: jax.jit(jax.value_and_grad(lambda m, t, c=c: loss(m, t, c)))(model, tokens) for c in ("float32", "float8")
    }
    assert float(found["float8"][0]) == pytest.approx(float(found["float32"][0]), rel=0.02)
    a, b = (
        np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(found[c][1])]) for c in ("float8", "float32")
    )
    assert np.all(np.isfinite(a))
    assert 0.005 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.2


def test_peaks() -> None:
    assert peak_flops_per_second("NVIDIA H100 80GB HBM3", "float8") == pytest.approx(2 * 989.4e12, rel=1e-3)
    assert peak_flops_per_second("NVIDIA A100-SXM4-80GB", "float8") is None
    for row in PEAKS:
        assert row.fp8 is None or (row.bf16 is not None and row.fp8 == pytest.approx(2 * row.bf16, rel=0.05)), (
            row.device
        )
