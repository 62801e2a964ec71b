from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import DenseMlp, Init, MoeMlp, Router
from llamax.model.execution import Execution
from llamax.model.mlp import FeedForward
from llamax.model.moe import MixtureOfExperts
from llamax.model.router import route, router_statistics

from . import reference
from .modules import randomized

EXPERTS, WIDTH, HIDDEN = 4, 5, 3


def mixture(top_k: int, kind: str = "swiglu", shared: bool = False, scale: float = 0.7) -> MixtureOfExperts:
    config = MoeMlp(
        kind="moe",
        experts=EXPERTS,
        top_k=top_k,
        expert=DenseMlp(kind=kind, d_ff=HIDDEN),
        shared=DenseMlp(kind="swiglu", d_ff=4) if shared else None,
    )
    return randomized(lambda key: MixtureOfExperts(config, WIDTH, Init(), jnp.float32(1), key=key), scale)


def inputs() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)


def test_experts_clamp_and_shift_as_a_dense_block_does() -> None:
    """One expert, always chosen with weight 1, is the dense block of its numbers."""
    dense = DenseMlp(kind="quick_geglu", d_ff=HIDDEN, limit=0.3, linear="one_plus")
    config = MoeMlp(kind="moe", experts=1, top_k=1, expert=dense)
    layer = randomized(lambda key: MixtureOfExperts(config, WIDTH, Init(), jnp.float32(1), key=key))
    block = randomized(lambda key: FeedForward(dense, WIDTH, Init(), jnp.float32(1), key=key))
    for name in ("up", "gate", "down"):
        getattr(block, name)[...] = getattr(layer, name)[0]
    expected = block(jnp.asarray(inputs()), Execution())
    np.testing.assert_allclose(layer(jnp.asarray(inputs()), Execution())[0], expected, atol=1e-6)


@pytest.mark.parametrize(("top_k", "kind"), [(2, "swiglu"), (1, "swiglu"), (EXPERTS, "swiglu"), (2, "silu")])
def test_value_and_gradient_equal_a_dense_loop(top_k: int, kind: str) -> None:
    layer, x = mixture(top_k, kind), inputs()
    g = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    names = ["router", "up", "down"] + ["gate"] * (kind == "swiglu")
    values = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in names}

    def plain(**changed: np.ndarray) -> np.ndarray:
        p = {"x": x, "gate": None, **values, **changed}
        rows = p.pop("x").reshape(-1, WIDTH)
        return reference.mixture(rows, **p, top_k=top_k).reshape(x.shape)

    @jax.jit
    def both(layer, x):  # type: ignore[no-untyped-def]
        y, vjp, statistics = jax.vjp(lambda m, x: m(x, Execution()), layer, x, has_aux=True)
        return y, *vjp(jnp.asarray(g)), statistics

    y, d_layer, dx, statistics = both(layer, x)
    np.testing.assert_allclose(y, plain(), atol=2e-6)
    assert float(statistics["dropped"]) == 0
    for name, found in {"x": dx, **{name: getattr(d_layer, name)[...] for name in names}}.items():
        start = x if name == "x" else values[name]
        exact = reference.numeric_gradient(lambda v, name=name: float((g * plain(**{name: v})).sum()), start)
        np.testing.assert_allclose(found, exact, atol=2e-5, err_msg=name)


def test_an_expert_without_tokens_costs_nothing() -> None:
    """Its gradient is zero, every other expert's is not, and no token is lost."""
    layer, x = mixture(2), np.abs(inputs())
    router = np.asarray(layer.router[...]).copy()
    router[:, 1] = -50.0
    layer.router.set_value(jnp.asarray(router))
    names = ("gate", "up", "down")

    @jax.jit
    @jax.grad
    def gradient(layer):  # type: ignore[no-untyped-def]
        return jnp.sum(layer(jnp.asarray(x), Execution())[0] ** 2)

    y, statistics = layer(jnp.asarray(x), Execution())
    values = {name: np.asarray(getattr(layer, name)[...]) for name in names}
    expected = reference.mixture(x.reshape(-1, WIDTH), router, **values, top_k=2)
    np.testing.assert_allclose(y.reshape(-1, WIDTH), expected, atol=2e-6)
    assert float(statistics["dead"]) >= 1
    for name in names:
        assert np.all(np.asarray(getattr(gradient(layer), name)[...])[1] == 0)


def test_shared_expert_is_added() -> None:
    layer, x = mixture(2, shared=True), inputs()
    values = {name: np.asarray(getattr(layer, name)[...]) for name in ("router", "gate", "up", "down")}
    shared = {name: np.asarray(getattr(layer.shared, name)[...]) for name in ("gate", "up", "down")}
    dense = (reference.silu(x @ shared["gate"]) * (x @ shared["up"])) @ shared["down"]
    routed = reference.mixture(x.reshape(-1, WIDTH), **values, top_k=2).reshape(x.shape)
    np.testing.assert_allclose(layer(jnp.asarray(x), Execution())[0], routed + dense, atol=2e-6)


def test_statistics_by_hand() -> None:
    """Three tokens, four experts, top 2: picks (0,1), (0,1), (0,2), so the loads are 3/6, 2/6, 1/6, 0."""
    logits = np.log(np.array([[4.0, 2, 1, 1], [4, 2, 1, 1], [4, 1, 2, 1]]))
    choice = route(jnp.asarray(logits, jnp.float32), Router(), 2)
    found = router_statistics(jnp.asarray(logits, jnp.float32), choice)
    load = np.array([3, 2, 1, 0]) / 6
    mean = np.array([4, 5 / 3, 4 / 3, 1]) / 8
    expected = {
        "balance": 4 * (load * mean).sum(),
        "sequence_balance": 4 * (load * mean).sum(),  # all three tokens as one sequence
        "z": math.log(8) ** 2,
        "entropy": -sum(p * math.log(p) for p in load[:3]) / math.log(4),
        "dead": 1.0,
        "dropped": 0.0,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-6), name


def test_balance_is_one_and_entropy_full_when_uniform() -> None:
    logits = jnp.asarray(np.log(np.eye(4) * 0.5 + 0.5), jnp.float32)
    found = router_statistics(logits, route(logits, Router(), 1))
    np.testing.assert_allclose([found[n] for n in ("balance", "sequence_balance", "entropy")], 1.0, rtol=1e-6)


def test_balance_gradient_flows_through_the_probabilities_alone() -> None:
    """d balance / d logits = E / tokens x p (f - p . f), f held fixed (Switch, arXiv:2101.03961, eq. 4)."""
    logits = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)

    def balance(logits: jax.Array) -> jax.Array:
        return router_statistics(logits, route(logits, Router(), 2))["balance"]

    p = reference.softmax(logits)
    f = np.bincount(np.argsort(-logits, -1)[:, :2].reshape(-1), minlength=4) / 12
    expected = 4 / 6 * p * (f - (p @ f)[:, None])
    np.testing.assert_allclose(jax.grad(balance)(jnp.asarray(logits)), expected, atol=1e-6)
