"""A few steps of a small model on any mesh, to compare with the same on one device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.mesh.rules import batch_sharding, make_mesh
from llamax.train.axes import check_axes
from llamax.train.state import abstract_state, init_state
from llamax.train.step import make_dispatch

STEPS, BATCH, SEQ, VOCAB = 2, 8, 32, 32
EXPERTS = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 8}, "router": {"bias": True}}
LATENT = {"kind": "mla", "heads": 4, "q_rank": 8, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}
WINDOW = {"attention": {"kind": "gqa", "heads": 4, "kv_heads": 2, "window": 9, "softcap": 4.0}}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "documents": {},  # of about ten tokens, masked
    "window": {"segments": [{"repeat": 2, "unit": [WINDOW, {}]}], "placement": "sandwich", "head": {"tied": True}},
    "chunk": {"attention": {"kind": "gqa", "heads": 4, "kv_heads": 2, "chunk": 12, "temperature": {"floor": 8}}},
    "latent": {"attention": LATENT, "mtp": 1},
    "sparse": {"attention": {**LATENT, "indexer": {"heads": 2, "head_dim": 8, "top_k": 6}}},
    "experts": {"mlp": EXPERTS},
    "learned": {"position": {"kind": "learned"}, "residual": "parallel", "norm": {"kind": "layernorm"}},
    "alibi": {"position": {"kind": "alibi"}},
}


class Trained(NamedTuple):
    """Metrics [STEPS], what every parameter moved by in all, and the rounding of a parameter itself."""

    metrics: dict[str, np.ndarray]
    moved: list[np.ndarray]
    rounding: list[float]


def run_config(mesh: dict[str, Any], kind: str = "dense", **train: Any) -> RunConfig:
    """Plain gradient descent, so that what weights move by is the sum of their gradients."""
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": VOCAB,
                "d_model": 16,
                "max_seq_len": SEQ,
                "segments": [{"repeat": 2}],
                "attention": {"kind": "gqa", "heads": 4, "kv_heads": 2},
                "position": {"kind": "rope"},
                "mlp": {"kind": "swiglu", "d_ff": 32},
                "init": {"std": 0.2},
                **KINDS[kind],
            },
            "data": {"mask_documents": kind == "documents"},
            "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.0, "clip_norm": None, "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup": 0.0},
            "mesh": {"data": 1, **mesh},
            "train": {
                "steps": STEPS,
                "batch_size": BATCH,
                "seq_len": SEQ,
                "steps_per_dispatch": STEPS,
                "compute_dtype": "float32",
                "unroll_layers": False,
                "z_loss": 1e-3,
                **train,
            },
        }
    )


def batches(documents: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (STEPS, BATCH, SEQ + 1)
    found = {"tokens": rng.integers(0, VOCAB, shape, dtype=np.int32)}
    if documents:
        found["segments"] = 1 + np.cumsum(rng.random(shape) < 0.1, axis=-1, dtype=np.int32)
    return found


def compiled(config: RunConfig, devices: list[jax.Device]) -> tuple[Any, Any, dict[str, jax.Array]]:
    """(the program of a dispatch, a fresh state, its batches)."""
    rules, mesh = load_rules(config.mesh.rules), make_mesh(config.mesh, devices)
    check_axes(config, mesh)
    abstract = abstract_state(config, rules, mesh)
    state = init_state(config, STEPS, abstract)
    given = jax.device_put(batches(config.data.mask_documents), batch_sharding(rules, mesh, leading=1))
    program = make_dispatch(config, rules, mesh, abstract).lower(state, given, jnp.int32(STEPS)).compile()
    return program, state, given


def trained(config: RunConfig, devices: list[jax.Device]) -> tuple[Trained, str]:
    """(what STEPS steps did, the text of the program)."""
    program, state, given = compiled(config, devices)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.model)]
    after, metrics, ran = program(state, given, jnp.int32(STEPS))
    assert int(ran) == STEPS
    moved = [np.asarray(a) - b for a, b in zip(jax.tree.leaves(after.model), before, strict=True)]
    rounding = [STEPS * np.spacing(np.abs(b).max()) for b in before]
    return Trained(jax.tree.map(np.asarray, metrics), moved, rounding), program.as_text()


@functools.cache
def alone(kind: str, **train: Any) -> Trained:
    """The same on one device."""
    return trained(run_config({}, kind, **train), jax.devices()[:1])[0]


def assert_same(found: Trained, expected: Trained) -> None:
    """Every metric to 1e-5, and every array's movement to 1e-5 of its largest entry and the weights' own rounding."""
    assert found.metrics.keys() == expected.metrics.keys()
    for name, values in expected.metrics.items():
        np.testing.assert_allclose(found.metrics[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    for ours, theirs, rounding in zip(found.moved, expected.moved, expected.rounding, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max() + rounding)


def assert_trains_as_alone(mesh: dict[str, Any], kind: str, **train: Any) -> str:
    """The text of the program of `mesh`, which trained as one device does."""
    found, text = trained(run_config(mesh, kind, **train), jax.devices())
    assert_same(found, alone(kind, **train))
    return text
