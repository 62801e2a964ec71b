"""Tiny runs for the tests of the step and the loop: one model, one data shape, so that one compilation serves many."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamax.config.load import run_from_data
from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.mesh.rules import make_mesh
from llamax.train.state import TrainState, abstract_state, init_state
from llamax.train.step import Dispatch, make_dispatch

BATCH, SEQ, VOCAB, STEPS = 8, 16, 256, 12
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "max_seq_len": 64,
    "segments": [{"repeat": 2}],
    "attention": {"kind": "gqa", "heads": 2},
    "position": {"kind": "rope"},
    "mlp": {"kind": "swiglu", "d_ff": 32},
}
MIXTURE = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 16}}
RUN: dict[str, Any] = {
    "model": MODEL,
    "mesh": {"data": 1},
    "optimizer": {"kind": "adamw", "lr": 1e-2},
    "train": {
        "steps": STEPS,
        "batch_size": BATCH,
        "seq_len": SEQ,
        "steps_per_dispatch": 10,
        "compute_dtype": "float32",
    },
    "log": {"every_steps": 1},
    "checkpoint": {"every_seconds": None},
}


def run_config(*overrides: str, store: Path | None = None) -> RunConfig:
    """The tiny run with `a.b.c=value` overrides."""
    data = {} if store is None else {"data": {"store": str(store)}}
    return run_from_data({**RUN, **data}, overrides)


def write_texts(folder: Path, seed: int = 0, files: int = 24) -> Path:
    """A folder of small texts of few words, easy to learn and never the same twice."""
    rng, words = random.Random(seed), ["the", "model", "learns", "a", "token", "and", "then", "another", "again"]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        text = " ".join(rng.choice(words) for _ in range(60))
        (folder / f"{i:02}.txt").write_text(f"text {i}: {text}\n")
    return folder


def tokens_of(steps: int, config: RunConfig, seed: int = 0, vocab: int = 32) -> dict[str, np.ndarray]:
    """Learnable sequences [steps, batch, seq + 1]: each token is the one before plus 1 to 3."""
    rng = np.random.default_rng(seed)
    shape = (steps, config.train.batch_size, config.train.seq_len + 1)
    start = rng.integers(0, vocab, (*shape[:2], 1))
    return {"tokens": ((start + np.cumsum(rng.integers(1, 4, shape), -1)) % vocab).astype(np.int32)}


def prepare(config: RunConfig) -> tuple[Dispatch, TrainState]:
    """(dispatch, fresh state) on one device."""
    rules, mesh = load_rules(config.mesh.rules), make_mesh(config.mesh)
    abstract = abstract_state(config, rules, mesh)
    state = init_state(config, config.train.steps or STEPS, abstract)
    return make_dispatch(config, rules, mesh, abstract), state


def go(
    dispatch: Dispatch, state: TrainState, batches: dict[str, np.ndarray], count: int
) -> tuple[TrainState, Any, int]:
    """`dispatch` on a copy of `state` (it donates): (state, metrics as NumPy arrays of the steps run, steps run)."""
    state, metrics, ran = dispatch(jax.tree.map(jnp.copy, state), batches, jnp.int32(count))
    return state, {name: np.asarray(value)[: int(ran)] for name, value in metrics.items()}, int(ran)


def assert_same_bits(a: Any, b: Any) -> None:
    """Every array of two trees equal bit for bit (NaN equals NaN)."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(a)[0]]
    for path, x, y in zip(paths, jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path)
