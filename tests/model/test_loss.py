from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.model.execution import Execution
from llamax.model.loss import chunk_length, cross_entropy, next_token_loss

from . import reference
from .modules import small_model, tokens_of

BATCH, SEQ, WIDTH, VOCAB = 2, 6, 4, 9


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((BATCH, SEQ, WIDTH)).astype(np.float32),
        "w": rng.standard_normal((WIDTH, VOCAB)).astype(np.float32),
        "bias": rng.standard_normal(VOCAB).astype(np.float32),
        "targets": rng.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32),
        "weights": rng.random((BATCH, SEQ)).astype(np.float32) * (rng.random((BATCH, SEQ)) < 0.8),
    }


@pytest.mark.parametrize("chunk", [6, 3, 1])
@pytest.mark.parametrize(
    ("bias", "z_loss", "softcap"), [(False, 0.0, None), (True, 0.0, None), (False, 0.3, None), (True, 0.3, 1.5)]
)
def test_value_and_gradient(chunk: int, bias: bool, z_loss: float, softcap: float | None) -> None:
    a = arrays()
    a["bias"] = a["bias"] if bias else None  # type: ignore[assignment]
    targets, weights = jnp.asarray(a["targets"]), jnp.asarray(a["weights"], jnp.float32)

    def sums(x, w, bias):  # type: ignore[no-untyped-def]
        return cross_entropy(x, w, bias, targets, weights, jnp.float32(z_loss), softcap, chunk, "float32")

    def total(x, w, bias):  # type: ignore[no-untyped-def]
        nats, z = sums(x, w, bias)
        return 0.25 * (nats + z), (nats, z)

    args = [jnp.asarray(a["x"]), jnp.asarray(a["w"]), jnp.asarray(a["bias"]) if bias else None]
    (_, found), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*args)

    def plain(**changed: np.ndarray) -> tuple[float, float]:
        return reference.cross_entropy(**{**a, **changed}, z_loss=z_loss, softcap=softcap)

    np.testing.assert_allclose(found, plain(), rtol=2e-6)
    np.testing.assert_allclose(sums(*args), plain(), rtol=2e-6)
    for name, gradient in zip(("x", "w", "bias"), gradients, strict=True):
        if a[name] is not None:
            exact = reference.numeric_gradient(lambda v, name=name: 0.25 * sum(plain(**{name: v})), a[name])
            np.testing.assert_allclose(gradient, exact, atol=5e-6, err_msg=name)


def test_equal_to_jax_log_softmax() -> None:
    a = {name: jnp.asarray(value) for name, value in arrays().items()}

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(x @ w)
        return -(jnp.take_along_axis(log_p, a["targets"][..., None], -1)[..., 0] * a["weights"]).sum()

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        weights = a["weights"].astype(jnp.float32)
        return sum(cross_entropy(x, w, None, a["targets"], weights, jnp.float32(0), None, 2, "float32"))

    expected, expected_gradient = jax.value_and_grad(plain, (0, 1))(a["x"], a["w"])
    found, gradient = jax.value_and_grad(ours, (0, 1))(a["x"], a["w"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=2e-6), gradient, expected_gradient)


def test_large_logits_stay_finite() -> None:
    x, w = jnp.full((1, 1, 1), 1e4), jnp.asarray([[1.0, -1.0, 0.0]])
    nats, _ = cross_entropy(x, w, None, jnp.array([[1]]), jnp.ones((1, 1)), jnp.float32(0), None, 1, "float32")
    assert float(nats) == 2e4


@pytest.mark.parametrize("factor", [1 / 3, 0.7])
def test_bfloat16_features_keep_their_scale(factor: float) -> None:
    """The loss is divided by the token count after the sums: that factor must not be rounded to bfloat16."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 64, 16), (16, 32)))
    targets = jnp.asarray(rng.integers(0, 32, (2, 64)), jnp.int32)

    @jax.jit
    @jax.grad
    def gradient(x: jax.Array) -> jax.Array:
        wide = w.astype(jnp.float32)
        return factor * sum(
            cross_entropy(x, wide, None, targets, jnp.ones((2, 64)), jnp.float32(0), None, 32, "bfloat16")
        )

    exact, rounded = np.asarray(gradient(x.astype(jnp.float32))), np.asarray(gradient(x), np.float64)
    assert abs((exact * rounded).sum() / (exact * exact).sum() - 1) < 5e-4


@pytest.mark.parametrize(
    ("seq", "batch", "tokens", "expected"),
    [(12, 2, None, 12), (12, 2, 24, 12), (12, 2, 23, 6), (12, 2, 8, 4), (12, 2, 1, 1), (7, 1, 6, 1)],
)
def test_chunk_length(seq: int, batch: int, tokens: int | None, expected: int) -> None:
    assert chunk_length(seq, batch, tokens) == expected


@pytest.mark.parametrize(
    "head",
    [{"tied": False}, {"tied": True}, {"tied": True, "bias": True, "softcap": 2.0}],
    ids=["untied", "tied", "tied_bias_softcap"],
)
def test_next_token_loss_is_cross_entropy_of_the_logits(head: dict) -> None:  # type: ignore[type-arg]
    """Value and gradient of every parameter, against the model's own logits and jax.nn.log_softmax."""
    model, tokens = small_model(head=head), tokens_of(2, 9)

    def ours(model):  # type: ignore[no-untyped-def]
        nats, z, count, _ = next_token_loss(model, tokens, None, None, jnp.float32(0.1), 4, Execution())
        return (nats + z) / count, count

    def plain(model):  # type: ignore[no-untyped-def]
        logits = model(tokens[:, :-1])
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return nats.mean() + 0.1 * jnp.square(jax.nn.logsumexp(logits, -1)).mean()

    (found, count), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(model)
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(model)
    assert float(count) == 16
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for f, e in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(f, e, atol=1e-5 * float(jnp.abs(e).max()) + 1e-7)


def test_documents_are_not_predicted_from_each_other() -> None:
    """The loss of packed documents is the sum of their losses alone."""
    model, tokens = small_model(position={"kind": "nope"}), tokens_of(1, 12)
    segments = jnp.asarray([[0] * 5 + [1] * 4 + [2] * 3], jnp.int32)
    loss = jax.jit(lambda t, s: next_token_loss(model, t, s, None, jnp.float32(0), None, Execution())[0::2])
    nats, count = loss(tokens, segments)
    alone = [loss(part, None) for part in (tokens[:, :5], tokens[:, 5:9], tokens[:, 9:])]
    assert float(count) == 4 + 3 + 2
    np.testing.assert_allclose(nats, sum(float(a[0]) for a in alone), rtol=1e-5)


def test_weights_choose_positions() -> None:
    model, tokens = small_model(), tokens_of(2, 9)
    loss = jax.jit(lambda w: next_token_loss(model, tokens, None, w, jnp.float32(0), 4, Execution())[0::2])
    first, rest = jnp.zeros((2, 8)).at[:, :3].set(1.0), jnp.ones((2, 8)).at[:, :3].set(0.0)
    (a, n), (b, m), (both, total) = loss(first), loss(rest), loss(jnp.ones((2, 8)))
    np.testing.assert_allclose([a + b, n + m], [both, total], rtol=1e-6)
    assert float(n) == 6
