from __future__ import annotations

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
