"""Losses besides cross-entropy: multi-token prediction and what layers report, in the objective and the metrics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.run import RunConfig
from llamax.model.execution import Execution
from llamax.model.transformer import Transformer
from llamax.train.evaluate import evaluate
from llamax.train.state import hyper_of
from llamax.train.step import LAYER_LOSSES, loss_and_gradients
from tests.train.runs import SEQ, run_config, tokens_of

MIXTURE = (
    "model.mlp={kind: moe, experts: 4, top_k: 2, expert: {kind: swiglu, d_ff: 8}, router: {score: sigmoid, bias: true}}"
)
TWO = ("model.mtp=2", "model.segments=[{repeat: 1}]", "model.vocab_size=32")


def start(config: RunConfig) -> Transformer:
    return jax.jit(lambda k: Transformer(config.model, key=k))(jax.random.key(0))


def one_batch(config: RunConfig, masked: bool = False) -> dict[str, np.ndarray]:
    batch = {name: value[0] for name, value in tokens_of(1, config).items()}
    if masked:  # a document of 3 to 10 tokens in front of another
        batch["segments"] = (np.arange(SEQ + 1)[None] >= 3 + np.arange(8)[:, None]).astype(np.int32)
    return batch


PROGRAMS: dict[str, Any] = {}


def found(model: Transformer, batch: Any, config: RunConfig, **hyper: float) -> tuple[float, Any, Any]:
    numbers = hyper_of(config, 1) | {name: jnp.float32(value) for name, value in hyper.items()}
    compiled = jax.jit(lambda m, b, h: loss_and_gradients(m, b, h, config, Execution()))
    return PROGRAMS.setdefault(repr(config), compiled)(model, batch, numbers)


def shifted_by_hand(model: Transformer, tokens: np.ndarray, segments: np.ndarray | None) -> list[float]:
    """Nats per token of the model and of each module, over sequences cut to where a target is left."""
    inside = None if segments is None else jnp.asarray(segments[:, :-1])
    stream, _ = jax.jit(Transformer.features)(model, jnp.asarray(tokens[:, :-1]), inside)
    means = []
    for k in range(model.config.mtp + 1):
        if k:
            cut = None if inside is None else inside[:, : SEQ - k]
            further = jax.jit(Transformer.further, static_argnums=1)
            stream, _ = further(model, k - 1, stream[:, : SEQ - k], jnp.asarray(tokens[:, k:SEQ]), cut)
        logits = np.asarray(model.logits(stream), np.float64)
        nats = []
        for row in range(len(tokens)):
            for t in range(SEQ - k):
                if segments is None or segments[row, t] == segments[row, t + 1 + k]:
                    nats.append(np.log(np.exp(logits[row, t]).sum()) - logits[row, t, tokens[row, t + 1 + k]])
        means.append(float(np.mean(nats)))
    return means


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "masked"])
def test_prediction_modules_equal_shifting_by_hand(masked: bool) -> None:
    config = run_config(*TWO, "train.grad_accumulation=2")
    model, batch = start(config), one_batch(config, masked)
    exact = shifted_by_hand(model, batch["tokens"], batch.get("segments"))
    loss, metrics, _ = found(model, batch, config)
    np.testing.assert_allclose([loss, metrics["mtp_loss"]], [exact[0], np.mean(exact[1:])], rtol=1e-5)


def test_weight_of_the_prediction_loss_and_its_gradient() -> None:
    """The objective is loss + weight x mtp_loss: gradients are linear in the weight, and 0 leaves modules alone."""
    config = run_config(*TWO)
    model, batch = start(config), one_batch(config)
    (_, _, none), (_, _, one), (_, metrics, two) = (found(model, batch, config, mtp_loss=w) for w in (0.0, 1.0, 2.0))
    for zero, single, double in zip(*(jax.tree.leaves(g) for g in (none, one, two)), strict=True):
        np.testing.assert_allclose(double - zero, 2 * (single - zero), atol=2e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none.mtp))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(one.mtp))
    held_out = {"tokens": batch["tokens"], "weights": np.ones((8, SEQ), np.float32)}
    alone = run_config(*TWO[1:])
    expected = shifted_by_hand(model, batch["tokens"], None)[0]
    assert evaluate(model, [held_out], loss_chunk=None, execution=Execution())[0] == pytest.approx(expected, rel=1e-5)
    assert found(start(alone), batch, alone)[0] == pytest.approx(
        float(expected), rel=1e-5
    )  # the model itself starts alike
    assert metrics["mtp_loss"] > 0


def test_modules_report_load_and_balance_like_layers() -> None:
    """Layer statistics count a module's block as one more layer, and its load stands under its own path."""
    config = run_config(MIXTURE, "model.mtp=1", "model.segments=[{repeat: 1}]", "model.vocab_size=32")
    model, batch = start(config), one_batch(config)
    _, metrics, gradients = found(model, batch, config)
    assert {name for name in metrics if name.startswith("load.")} == {
        "load.stacks.0.blocks.0.mlp",
        "load.mtp.0.block.mlp",
    }
    assert metrics["load.mtp.0.block.mlp"].sum() == 8 * SEQ * 2
    assert np.any(gradients.mtp[0].block.mlp.router[...])


def test_each_layer_loss_is_the_mean_over_layers_times_its_weight() -> None:
    config = run_config(MIXTURE, "model.vocab_size=32")
    model, batch = start(config), one_batch(config)
    none = dict.fromkeys(LAYER_LOSSES.values(), 0.0)
    _, metrics, base = found(model, batch, config, **none)
    _, statistics = jax.jit(Transformer.features)(model, jnp.asarray(batch["tokens"][:, :-1]))

    def mean(model: Transformer, name: str) -> Any:
        return model.features(jnp.asarray(batch["tokens"][:, :-1]))[1][name].mean()

    for name in ("balance", "sequence_balance", "z"):
        weight = LAYER_LOSSES[name]
        assert metrics[weight] == pytest.approx(float(statistics[name].mean()), rel=1e-5)
        _, _, tilted = found(model, batch, config, **none | {weight: 3.0})
        exact = jax.jit(jax.grad(mean), static_argnums=1)(model, name)
        for a, b, g in zip(*(jax.tree.leaves(t) for t in (tilted, base, exact)), strict=True):
            np.testing.assert_allclose(a - b, 3.0 * g, atol=5e-6)
