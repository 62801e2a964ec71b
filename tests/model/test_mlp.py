from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import DenseMlp, Init
from llamax.model.execution import Execution
from llamax.model.mlp import FeedForward

from . import reference
from .modules import randomized

NONLINEARITIES = {
    "swiglu": reference.silu,
    "geglu": reference.erf_free_gelu,
    "quick_geglu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "reglu": lambda x: x * (x > 0),
    "relu2": lambda x: (x * (x > 0)) ** 2,
    "gelu": reference.erf_free_gelu,
    "silu": reference.silu,
}
GATED = ("swiglu", "geglu", "quick_geglu", "reglu")
CASES = [(kind, bias, None, "one") for kind in NONLINEARITIES for bias in (False, True)]
CASES += [("quick_geglu", True, 0.4, "one_plus"), ("swiglu", False, 0.3, "one"), ("geglu", False, None, "one_plus")]


@pytest.mark.parametrize(("kind", "bias", "limit", "linear"), CASES)
def test_value_and_gradient(kind: str, bias: bool, limit: float | None, linear: str) -> None:
    config = DenseMlp(kind=kind, d_ff=5, bias=bias, limit=limit, linear=linear)
    layer = randomized(lambda key: FeedForward(config, 4, Init(), jnp.float32(1), key=key))
    x, g = np.random.default_rng(1).standard_normal((2, 2, 3, 4)).astype(np.float32)
    names = ["up", "down"] + ["gate"] * (kind in GATED)
    names += [f"{name}_bias" for name in names] if bias else []
    values = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in names}
    assert len(jax.tree.leaves(layer)) == len(names)

    clamped: list[float] = []

    def plain(**changed: np.ndarray) -> np.ndarray:
        p = {"x": x, **values, **changed}
        up = p["x"] @ p["up"] + p.get("up_bias", 0)
        hidden = NONLINEARITIES[kind](up)
        if kind in GATED:
            gate = p["x"] @ p["gate"] + p.get("gate_bias", 0)
            if limit is not None:
                clamped.append(float(np.mean((gate > limit) | (abs(up) > limit))))
                gate = np.where(gate > limit, limit, gate)
                up = np.where(abs(up) > limit, np.sign(up) * limit, up)
            hidden = NONLINEARITIES[kind](gate) * (1 + up if linear == "one_plus" else up)
        return hidden @ p["down"] + p.get("down_bias", 0)

    @jax.jit
    def both(layer, x):  # type: ignore[no-untyped-def]
        y, vjp = jax.vjp(lambda m, x: m(x, Execution()), layer, x)
        return y, *vjp(jnp.asarray(g))

    y, d_layer, dx = both(layer, x)
    np.testing.assert_allclose(y, plain(), atol=2e-6)
    found = {"x": dx, **{name: getattr(d_layer, name)[...] for name in names}}
    for name, gradient in found.items():
        start = x if name == "x" else values[name]
        exact = reference.numeric_gradient(lambda v, name=name: float((g * plain(**{name: v})).sum()), start)
        np.testing.assert_allclose(gradient, exact, atol=1e-5, err_msg=name)
    assert limit is None or 0.1 < clamped[0] < 0.9
