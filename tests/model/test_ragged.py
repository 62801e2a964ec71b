"""Products of sorted rows against a loop over groups; what the kernels get, as lowered for a GPU. The kernels
themselves run on a device only: tools/device_check.py compares a mixture with a loop over experts there."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import DenseMlp, Init, MoeMlp
from llamax.model import moe
from llamax.model.execution import Execution
from llamax.model.moe import MixtureOfExperts
from llamax.model.ragged import covers, ragged

SIZES = {"uneven": [3, 0, 9, 4], "one": [0, 16, 0, 0], "even": [4, 4, 4, 4]}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_value_and_gradient_equal_a_loop_over_groups(name: str, compute: str) -> None:
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((16, 6), (4, 6, 5), (16, 5)))

    def loop(x: jax.Array, w: jax.Array) -> jax.Array:
        ends = np.cumsum(SIZES[name])
        return jnp.concatenate(
            [x[end - n : end] @ w[i] for i, (n, end) in enumerate(zip(SIZES[name], ends, strict=True))]
        )

    found, pull = jax.vjp(lambda x, w: ragged(x, w, sizes, compute, False), x, w)
    expected, pull_exact = jax.vjp(loop, x, w)
    tolerance = 1e-5 if compute == "float32" else 5e-2
    for a, b in zip((found, *pull(g)), (expected, *pull_exact(g)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("weigh", ["input", "output"])
def test_a_mixture_of_sorted_rows_equals_one_in_rounds(weigh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's other path, its kernels replaced by their reference: value and every gradient."""
    config = MoeMlp(kind="moe", experts=4, top_k=2, expert=DenseMlp(kind="swiglu", d_ff=24), router={"weigh": weigh})
    layer = MixtureOfExperts(config, 16, Init(kind="fan_in"), jnp.float32(1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 32, 16))
    g = jax.random.normal(jax.random.key(2), x.shape)
    taken = []

    def reference(x: jax.Array, w: jax.Array, sizes: jax.Array, compute: str, kernel: bool) -> jax.Array:
        taken.append(kernel)
        return ragged(x, w, sizes, compute, False)

    monkeypatch.setattr(moe.ragged, "covers", lambda *call: True)
    monkeypatch.setattr(moe.ragged, "ragged", reference)

    def both(kernels: tuple[str, ...]) -> tuple[jax.Array, ...]:
        run = lambda layer, x: layer(x, Execution(kernels=kernels))[0]  # noqa: E731
        y, pull = jax.vjp(run, layer, x)
        return y, *jax.tree.leaves(pull(g))

    found, expected = both(("ragged",)), both(())
    assert taken.count(True) == 3  # up, gate and down
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_what_the_kernels_cover() -> None:
    assert covers(1024, 8, (256, 512), "bfloat16")
    assert not covers(1023, 8, (256, 512), "bfloat16")  # less than a block of rows a group
    assert not covers(1024, 8, (256, 96), "bfloat16")
    assert not covers(1024, 8, (256, 512), "float32")


@pytest.mark.parametrize("members", [0, 3])
def test_lowered_for_cuda_they_are_the_kernels(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, and both products of the backward pass, for one model and for the members of a population."""
    # The library asks this machine's device for its cores even to lower for another.
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(core_count=132)])
    x, w = jnp.ones((512, 128), jnp.bfloat16), jnp.ones((2, 128, 256), jnp.float32)

    def total(x: jax.Array, w: jax.Array) -> jax.Array:
        return ragged(x, w, jnp.asarray([300, 212], jnp.int32), "bfloat16", True).astype(jnp.float32).sum()

    both = jax.value_and_grad(total, (0, 1))
    if members:
        both, (x, w) = jax.vmap(both), (jnp.stack([a] * members) for a in (x, w))  # type: ignore[assignment]
    lowered = jax.jit(both).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", lowered)) == 3
    assert "chlo.ragged_dot" not in lowered
