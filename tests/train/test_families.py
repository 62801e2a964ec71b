"""Every family's style trains: at the smallest size that has all its parts, in the scan and unrolled, on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.files import shipped
from llamax.config.load import run_from_data
from llamax.config.run import RunConfig
from llamax.mesh.rules import batch_sharding, load_rules, make_mesh
from llamax.train.param_info import param_table
from llamax.train.state import TrainState, abstract_state, init_state
from llamax.train.step import make_dispatch

STYLES = list(shipped("styles"))
# The richest style and a dense one; the others, and all on a mesh, are slow tests.
TRAINED, UNROLLED, SHARDED = ("deepseek_v32", "gemma3"), ("gemma3",), ()
STEPS, BATCH, SEQ, VOCAB = 10, 8, 32, 32
# Two heads, the last segment twice (a scan of two), and windows, chunks and chosen keys of 16 or 32 of 32 tokens.
RUN: dict[str, Any] = {
    "model": {"base": "ladder/d32", "vocab_size": VOCAB, "max_seq_len": 64},
    "optimizer": {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.0},
    "schedule": {"kind": "constant", "warmup": 0.0},
    "train": {
        "steps": STEPS,
        "batch_size": BATCH,
        "seq_len": SEQ,
        "steps_per_dispatch": STEPS,
        "moe_sequence_balance_loss": 1e-3,
        "divergence_factor": 9.0,
    },
}


def subset(*default: str) -> list[Any]:
    return [s if s in default else pytest.param(s, marks=pytest.mark.slow) for s in STYLES]


def family(style: str, mesh: dict[str, int], *overrides: str) -> RunConfig:
    plain = run_from_data({**RUN, "mesh": mesh}, [f"style={style}"])
    last = len(plain.model.segments) - 1
    return run_from_data({**RUN, "mesh": mesh}, [f"style={style}", f"model.segments.{last}.repeat=2", *overrides])


def tokens() -> dict[str, np.ndarray]:
    """Each token is the one before plus 1 to 3: ln 3 of ln 32 nats are left to learn."""
    rng = np.random.default_rng(0)
    shape = (STEPS, BATCH, SEQ + 1)
    start = rng.integers(0, VOCAB, (*shape[:2], 1))
    return {"tokens": ((start + np.cumsum(rng.integers(1, 4, shape), -1)) % VOCAB).astype(np.int32)}


Trained = tuple[Any, TrainState, dict[str, np.ndarray], dict[str, np.ndarray]]


def trained(config: RunConfig, devices: list[jax.Device]) -> Trained:
    """(weights at the start as numpy, state at the end, metrics [STEPS], metrics without the indexer's loss)."""
    rules, mesh = load_rules(config.mesh.rules), make_mesh(config.mesh, devices)
    abstract = abstract_state(config, rules, mesh)
    state = init_state(config, STEPS, abstract)
    before = jax.tree.map(np.asarray, state.model)
    batches = jax.device_put(tokens(), batch_sharding(rules, mesh, leading=1))
    dispatch, metrics = make_dispatch(config, rules, mesh, abstract), []
    for weight in (0.0, 1.0):
        hyper = {**state.hyper, "indexer_loss": jax.device_put(jnp.float32(weight), state.hyper["lr"].sharding)}
        start = dataclasses.replace(state, hyper=hyper)
        after, found, ran = dispatch(jax.tree.map(jnp.copy, start), batches, jnp.int32(STEPS))
        assert int(ran) == STEPS
        metrics.append(jax.tree.map(np.asarray, found))
    return before, after, metrics[1], metrics[0]


@functools.cache
def alone(style: str) -> Trained:
    return trained(family(style, {"data": 1}), jax.devices()[:1])


def assert_same_training(found: dict[str, np.ndarray], style: str) -> None:
    expected = alone(style)[2]
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(found["loss"][:5], expected["loss"][:5], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"][:5], expected["grad_norm"][:5], rtol=1e-3)
    # Later a rounding may have chosen another expert or another key for a token: steps of their own, as small.
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=5e-3)


@pytest.mark.parametrize("style", subset(*TRAINED))
def test_a_family_trains(style: str) -> None:
    """Ten steps: nothing is not finite, every array moves (Adam without decay moves what has a gradient, and the rule
    moves router biases), and the loss falls."""
    before, after, metrics, _ = alone(style)
    for name, values in metrics.items():
        assert np.all(np.isfinite(values)), name
    assert not metrics["bad"].any()
    rows = zip(param_table(before), jax.tree.leaves(before), jax.tree.leaves(after.model), strict=True)
    still = [info.path for info, a, b in rows if np.array_equal(a, b)]
    assert not still
    assert metrics["loss"][-1] < metrics["loss"][0] - 0.3
    if "mtp_loss" in metrics:
        assert metrics["mtp_loss"][-1] < metrics["mtp_loss"][0] - 0.2


@pytest.mark.parametrize("style", ["deepseek_v32", pytest.param("glm5", marks=pytest.mark.slow)])
def test_an_indexer_learns_by_its_own_loss(style: str) -> None:
    """The attention it follows sharpens as the model learns, so what counts is where it would be without the loss."""
    _, _, with_loss, without = alone(style)
    assert with_loss["indexer_loss"][-1] < 0.9 * without["indexer_loss"][-1]
    # A part of its own, which only reads: the model itself differs by the keys that were chosen, and not yet at step 0.
    assert with_loss["loss"][0] == without["loss"][0]
    np.testing.assert_allclose(with_loss["loss"], without["loss"], rtol=0.05)


@pytest.mark.parametrize("style", subset(*UNROLLED))
def test_scan_equals_unrolled(style: str) -> None:
    unrolled = family(style, {"data": 1}, "train.unroll_layers=true")
    assert_same_training(trained(unrolled, jax.devices()[:1])[2], style)


@pytest.mark.parametrize("style", subset(*SHARDED))
def test_sharded_equals_unsharded(style: str) -> None:
    mesh = {"data": 1, "fsdp": 2, "expert": 4}
    assert_same_training(trained(family(style, mesh), jax.devices())[2], style)
