from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.model.dispatch import batched, collect, grouped, in_rounds, layout_of, round_of, spread, widths

EXPERTS, TOP_K, WIDTH = 4, 2, 3

# Picks of 40 tokens: as even as can be, all on two experts (several later rounds), and one expert that takes most.
CHOSEN = {
    "even": np.stack([np.arange(40) % 4, (np.arange(40) + 1) % 4], 1),
    "two_experts": np.tile([2, 0], (40, 1)),
    "skewed": np.stack([np.where(np.arange(40) < 33, 3, 1), np.where(np.arange(40) % 5, 2, 0)], 1),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_layout_and_rounds_hold_every_pick_once(name: str) -> None:
    chosen = CHOSEN[name]
    layout = layout_of(jnp.asarray(chosen), EXPERTS)
    np.testing.assert_array_equal(layout.sizes, np.bincount(chosen.reshape(-1), minlength=EXPERTS))
    np.testing.assert_array_equal(chosen.reshape(-1)[np.asarray(layout.order)], np.sort(chosen.reshape(-1)))
    first, width = widths(chosen.size, EXPERTS)
    seen: list[int] = []
    start, size = 0, first
    while start < int(layout.sizes.max()):
        moves = round_of(layout, start, size)
        picks, filled = np.asarray(moves.pick), np.asarray(moves.filled)
        expert_of_slot = np.arange(picks.size) // size
        np.testing.assert_array_equal(chosen.reshape(-1)[picks[filled]], expert_of_slot[filled])
        here = np.flatnonzero(np.asarray(moves.here))
        np.testing.assert_array_equal(picks[np.asarray(moves.slot)[here]], here)  # slot and pick are inverse
        seen += picks[filled].tolist()
        start, size = start + size, width
    assert sorted(seen) == list(range(chosen.size))


@pytest.mark.parametrize("name", CHOSEN)
def test_value_and_gradient_equal_a_loop_over_picks(name: str) -> None:
    """sum over a token's picks j of weight[t, j] tanh(x[t] W[expert]), by autodiff of a dense form."""
    chosen = jnp.asarray(CHOSEN[name])
    rng = np.random.default_rng(0)
    shapes = ((40, WIDTH), (40, TOP_K), (EXPERTS, WIDTH, WIDTH), (40, WIDTH))
    x, weights, w, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def one(operands, moves):  # type: ignore[no-untyped-def]
        x, weights, w = operands
        out = jnp.tanh(batched(spread(x, moves).reshape(EXPERTS, -1, WIDTH), w, "float32"))
        return (collect(out.reshape(-1, WIDTH), moves).reshape(40, TOP_K, WIDTH) * weights[..., None]).sum(1)

    def dense(x, weights, w):  # type: ignore[no-untyped-def]
        every = jnp.tanh(jnp.einsum("ti,eio->teo", x, w))
        return (jnp.take_along_axis(every, chosen[..., None], axis=1) * weights[..., None]).sum(1)

    def both(function):  # type: ignore[no-untyped-def]
        y, pull = jax.vjp(function, x, weights, w)
        return y, *pull(g)

    found = jax.jit(lambda: both(lambda *a: in_rounds(one, a, layout_of(chosen, EXPERTS))))()
    for a, b in zip(found, both(dense), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_replicas_of_different_loads() -> None:
    """Under vmap the loop runs as often as the fullest replica needs; the others gain nothing from it."""
    chosen = jnp.asarray(np.stack([CHOSEN["even"], CHOSEN["two_experts"]]))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, WIDTH)), jnp.float32)

    def one(x, moves):  # type: ignore[no-untyped-def]
        return collect(spread(x, moves), moves).reshape(40, TOP_K, WIDTH).sum(1)

    found = jax.vmap(lambda x, c: in_rounds(one, x, layout_of(c, EXPERTS)))(x, chosen)
    np.testing.assert_allclose(found, TOP_K * x, atol=1e-6)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("weigh", ["input", "output", None])
@pytest.mark.parametrize("replicas", [1, 2])
def test_grouped_equals_every_expert_on_every_token(name: str, weigh: str | None, replicas: int) -> None:
    """In value and gradient; with two replicas, under vmap, of which the other's loads are even."""
    chosen = jnp.asarray(np.stack([CHOSEN[name], CHOSEN["even"]])[:replicas])
    rng = np.random.default_rng(0)
    shapes = ((40, WIDTH), (40, TOP_K), (EXPERTS, WIDTH, WIDTH), (40, WIDTH))
    x, weights, w, g = (jnp.asarray(rng.standard_normal((replicas, *shape)), jnp.float32) for shape in shapes)

    def experts(rows, w):  # type: ignore[no-untyped-def]
        return jnp.tanh(batched(rows.reshape(w.shape[0], -1, WIDTH), w, "float32")).reshape(-1, WIDTH)

    def ours(x, weights, w, chosen):  # type: ignore[no-untyped-def]
        return grouped(experts, weigh, (x, None if weigh is None else weights, w), layout_of(chosen, EXPERTS))

    def dense(x, weights, w, chosen):  # type: ignore[no-untyped-def]
        own = w[chosen]  # [tokens, top_k, inputs, outputs]
        into = x[:, None] * (weights[..., None] if weigh == "input" else 1.0)
        out = jnp.tanh(jnp.einsum("tki,tkio->tko", into, own))
        return (out * (weights[..., None] if weigh == "output" else 1.0)).sum(1)

    def both(function):  # type: ignore[no-untyped-def]
        def one(x, weights, w, g, chosen):  # type: ignore[no-untyped-def]
            y, pull = jax.vjp(lambda *a: function(*a, chosen), x, weights, w)
            return y, *pull(g)

        return jax.jit(jax.vmap(one))(x, weights, w, g, chosen)

    for a, b in zip(both(ours), both(dense), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("picks", "experts", "expected"), [(32768, 8, (4608, 1152)), (12, 4, (8, 8)), (2, 8, (2, 8))])
def test_widths(picks: int, experts: int, expected: tuple[int, int]) -> None:
    """32768 x 1.125 / 8 = 4608; never more slots than picks, never fewer than 8."""
    assert widths(picks, experts) == expected


def test_bfloat16_operands_and_no_wider_product() -> None:
    """Backward too: every product of the program has bfloat16 operands and a float32 sum."""
    x, w = jnp.ones((2, 8, 4), jnp.float32), jnp.ones((2, 4, 6), jnp.float32)
    program = jax.make_jaxpr(jax.grad(lambda x, w: (batched(x, w, "bfloat16") ** 2).sum(), (0, 1)))(x, w)
    dots = [e for e in program.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert all({str(v.aval.dtype) for v in e.invars} == {"bfloat16"} for e in dots)
    assert len(dots) >= 2
