"""The compiled small step keeps to a budget of operations: counts from the program's text, not times."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from llamax.config.load import run_from_data
from llamax.config.mesh import load_rules
from llamax.mesh.rules import make_mesh
from llamax.train.state import abstract_state
from llamax.train.step import make_dispatch

LAYERS = 2
# A product more is work; of the others a few may come and go with the compiler.
PRODUCTS = LAYERS * (4 + 3) * 3 + LAYERS * 2 * 6 + 3  # weights: forward, dx, dw; attention in two spans; head
BEFORE = {  # optimized HLO on a CPU, jax 0.10.2, 2026-11-28
    "float32": {"fusion": 368, "copy": 126, "transpose": 57, "exponential": 9, "reduce": 65, "select": 99},
    "bfloat16": {"fusion": 367, "copy": 114, "transpose": 51, "exponential": 9, "reduce": 65, "convert": 74},
}


def program(compute: str) -> Counter[str]:
    """How often each operation occurs in the compiled dispatch of 2 layers at width 32 (shape S1 of tools/bench.py)."""
    config = run_from_data(
        {
            "model": {
                "vocab_size": 256,
                "d_model": 32,
                "max_seq_len": 128,
                "segments": [{"repeat": LAYERS}],
                "attention": {"heads": 2, "kv_heads": 1},
                "position": {"kind": "rope"},
                "mlp": {"kind": "swiglu", "d_ff": 96},
                "head": {"tied": False},
            },
            "train": {"batch_size": 8, "seq_len": 128, "steps": 100, "compute_dtype": compute},
        },
        where="budget",
    )
    rules, mesh = load_rules("default"), make_mesh(config.mesh, jax.devices()[:1])
    abstract = abstract_state(config, rules, mesh)
    tokens = {"tokens": jax.ShapeDtypeStruct((10, 8, 129), jnp.int32)}
    lowered = make_dispatch(config, rules, mesh, abstract).lower(abstract, tokens, jax.ShapeDtypeStruct((), jnp.int32))
    return Counter(re.findall(r"= \S+ ([\w-]+)\(", lowered.compile().as_text()))


@pytest.mark.parametrize(("compute", "before"), BEFORE.items())
def test_the_small_step_keeps_to_its_budget(compute, before):
    found = program(compute)
    assert found["dot"] == PRODUCTS
    for name, count in before.items():
        assert found[name] <= 1.05 * count, (name, found[name])
