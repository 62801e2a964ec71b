"""bfloat16 on the CPU: every shape compiles and runs forward and backward, and stays near float32.

XLA's CPU backend rewrites some bfloat16 products into ones it cannot run ("Unsupported element type for DotThunk"), and
says so only when the program runs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.model.execution import Execution
from llamax.model.loss import next_token_loss
from llamax.model.transformer import Transformer
from llamax.train.step import CPU_OPTIONS

from .modules import small_config, small_model, tokens_of

MOE = {
    "kind": "moe",
    "experts": 4,
    "top_k": 2,
    "expert": {"kind": "swiglu", "d_ff": 24},
    "shared": {"kind": "swiglu", "d_ff": 8},
}
GELU = {"kind": "gelu", "d_ff": 40, "bias": True}
TIED = {"tied": True, "bias": True, "softcap": 5.0}
FAST = ("grouped", "mixture", "one_token")
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "grouped": (2, 16, {}),
    "multi_head": (3, 7, {"attention": {"kind": "gqa", "heads": 2}, "mlp": {"kind": "relu2", "d_ff": 20}}),
    "multi_query_tied": (2, 8, {"attention": {"kind": "gqa", "heads": 4, "kv_heads": 1, "softcap": 3.0}, "head": TIED}),
    "one_head_one_row": (
        1,
        16,
        {"attention": {"kind": "gqa", "heads": 1, "window": 4}, "mlp": GELU, "head": {"tied": True}},
    ),
    "one_token": (1, 1, {"segments": [{"repeat": 1}]}),
    "mixture": (2, 8, {"mlp": MOE}),
    "wide": (
        4,
        32,
        {
            "d_model": 64,
            "vocab_size": 256,
            "attention": {"kind": "gqa", "heads": 2},
            "mlp": {"kind": "geglu", "d_ff": 96},
        },
    ),
}


def gradient(execution: Execution, chunk: int | None):  # type: ignore[no-untyped-def]
    def loss(model: Transformer, tokens: jax.Array) -> jax.Array:
        nats, z, count, routers = next_token_loss(model, tokens, None, None, jnp.float32(0.01), chunk, execution)
        return (nats + z) / count + (0.01 * routers["balance"].mean() if routers else 0.0)

    return jax.value_and_grad(loss)


def run(name: str, execution: Execution, chunk: int | None) -> tuple[float, np.ndarray]:
    batch, seq, fields = SHAPES[name]
    model = small_model(scale=0.1, **fields)
    tokens = tokens_of(batch, seq + 1, small_config(**fields).vocab_size)
    # As users have it, not at conftest's level: what is tested is the compiler.
    options = CPU_OPTIONS if execution.compute == "bfloat16" else None
    value, tree = jax.jit(gradient(execution, chunk), compiler_options=options)(model, tokens)
    leaves = jax.tree.leaves(tree)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    return float(value), np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])


@functools.cache
def exact(name: str) -> tuple[float, np.ndarray]:
    return run(name, Execution(), None)


@pytest.mark.parametrize("activation", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES])
def test_loss_and_gradient(name: str, activation: Any) -> None:
    # The narrower residual stream goes with rematerialization and a chunked loss: other products for the compiler.
    narrow = activation == "bfloat16"
    execution = Execution("bfloat16", activation, "full" if narrow else "none")
    value, leaves = run(name, execution, 8 if narrow else None)
    expected, expected_leaves = exact(name)
    assert value == pytest.approx(expected, rel=5e-3)
    error = np.linalg.norm(leaves - expected_leaves) / np.linalg.norm(expected_leaves)
    assert 0 < error < (0.05 if narrow else 0.03)
