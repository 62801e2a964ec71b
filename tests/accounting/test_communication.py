"""Bytes by formula against the collectives of the compiled step on eight simulated devices, one axis at a time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llamax.accounting.communication import communication
from llamax.config.mesh import load_rules
from llamax.config.run import RunConfig
from llamax.mesh.rules import batch_sharding, make_mesh
from llamax.report.collectives import collectives
from llamax.report.hlo import parse_program
from llamax.train.state import abstract_state
from llamax.train.step import execution_of, train_step

BATCH, SEQ = 16, 64
LATENT = {"kind": "mla", "heads": 8, "q_rank": 32, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
LAYERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "latent": {"attention": LATENT},
    "experts": {"mlp": {"kind": "moe", "experts": 8, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 32}}},
}
SUMS = ("all-reduce", "reduce-scatter")  # a CPU has the first in place of the second


def run_config(layers: str = "dense", mesh: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 256,
                "d_model": 64,
                "max_seq_len": SEQ,
                "segments": [{"repeat": 2}],
                "attention": {"kind": "gqa", "heads": 8, "kv_heads": 8},
                "position": {"kind": "rope"},
                "mlp": {"kind": "swiglu", "d_ff": 128},
                "head": {"tied": False},
                **LAYERS[layers],
            },
            "mesh": {"data": 1, **(mesh or {})},
            "train": {
                "batch_size": BATCH,
                "seq_len": SEQ,
                "steps": 10,
                "compute_dtype": "float32",
                "unroll_layers": True,
                **train,
            },
        }
    )


def of_the_program(config: RunConfig) -> dict[tuple[tuple[str, ...], str], float]:
    """Bytes of the arrays by (axes, kind) in the compiled step."""
    rules, mesh = load_rules("default"), make_mesh(config.mesh)
    abstract, execution = abstract_state(config, rules, mesh), execution_of(config, rules, mesh)
    batch = {"tokens": jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32, sharding=batch_sharding(rules, mesh))}
    step = jax.jit(
        lambda state, batch: train_step(state, batch, config, execution),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), None),
    )
    program = parse_program(step.lower(abstract, batch).compile().as_text())
    totals: dict[Any, float] = defaultdict(float)
    for one in collectives(program, dict(mesh.shape)):
        if "/while/" not in program.instructions[one.name].op_name or mesh.shape["stage"] > 1:  # spare rounds
            totals[one.axes, "sum" if one.kind in SUMS else one.kind] += one.bytes * one.times
    return totals


def by_formula(config: RunConfig) -> dict[tuple[tuple[str, ...], str], float]:
    totals: dict[Any, float] = defaultdict(float)
    for one in communication(config, {k: v for k, v in config.mesh.sizes.items() if v > 0}, cpu=True):
        totals[one.axes, "sum" if one.kind in SUMS else one.kind] += one.bytes
    return totals


@pytest.mark.parametrize(
    ("mesh", "layers", "tolerance"),
    [
        ({"data": 8}, "dense", 1e-4),
        ({"fsdp": 8}, "dense", 0.02),  # norms' scales are gathered in pieces, gradient norms summed
        ({"fsdp": 8}, "latent", 0.02),  # no array of activations is cut along a latent
        ({"tensor": 8}, "dense", 0.01),  # and sums over the vocabulary
        ({"context": 8}, "dense", 0.02),
        ({"expert": 8}, "experts", 0.01),
    ],
)
def test_the_compiled_step_sends_what_the_formulas_say(mesh: dict[str, int], layers: str, tolerance: float) -> None:
    config = run_config(layers, mesh)
    found, expected = of_the_program(config), by_formula(config)
    total = sum(expected.values())
    for key in found.keys() | expected.keys():
        assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), abs=tolerance * total), key
    assert expected
