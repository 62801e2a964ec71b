from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamax.config.components import Init
from llamax.model.block import DecoderBlock
from llamax.model.execution import Execution

from .modules import randomized, small_config

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16)), jnp.float32)


def block_of(**fields: Any) -> DecoderBlock:
    config = small_config(position={"kind": "nope"}, **fields)
    return randomized(lambda key: DecoderBlock(config.layers[0], 16, Init(), 2, layer=jnp.int32(0), key=key))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "none"])
@pytest.mark.parametrize(
    ("placement", "residual"),
    [("pre", "sequential"), ("post", "sequential"), ("sandwich", "sequential"), ("pre", "parallel")],
)
def test_residual_layout(placement: str, residual: str, norm: str) -> None:
    """The block against the formula in its config, written out with the block's own parts."""
    block = block_of(placement=placement, residual=residual, norm={"kind": norm})

    def expected(block: DecoderBlock) -> jax.Array:
        def attention(x: jax.Array) -> jax.Array:
            return block.attention(x, None, None, Execution())[0]

        def mlp(x: jax.Array) -> jax.Array:
            return block.mlp(x, Execution())

        n = block.attention_norm
        if residual == "parallel":
            return X + attention(n(X)) + mlp(n(X))
        if placement == "pre":
            y = X + attention(n(X))
            return y + mlp(block.mlp_norm(y))
        if placement == "post":
            y = n(X + attention(X))
            return block.mlp_norm(y + mlp(y))
        y = X + block.attention_out_norm(attention(n(X)))
        return y + block.mlp_out_norm(mlp(block.mlp_norm(y)))

    both = jax.jit(lambda block: (*block(X, None, None, Execution()), expected(block)))
    found, statistics, written_out = both(block)
    np.testing.assert_allclose(found, written_out, rtol=1e-5, atol=1e-5)
    assert statistics == {}
    assert hasattr(block, "mlp_norm") == (residual == "sequential")
    assert hasattr(block, "attention_out_norm") == hasattr(block, "mlp_out_norm") == (placement == "sandwich")


def test_a_mixture_reports_its_router() -> None:
    block = block_of(mlp={"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 8}})
    _, statistics = jax.eval_shape(lambda block: block(X, None, None, Execution()), block)
    assert set(statistics) == {"mlp"}
    assert {"balance", "z", "entropy", "dead", "dropped"} <= set(statistics["mlp"])


def test_branch_reads_the_block_s_input() -> None:
    """Snowflake Arctic: h = x + attn(norm(x)); h + mlp(norm(h)) + moe(norm'(x)), with the statistics of both."""
    moe = {"kind": "moe", "experts": 4, "top_k": 2, "expert": {"kind": "swiglu", "d_ff": 8}}
    for mlp in ({"kind": "swiglu", "d_ff": 8}, moe):
        block = block_of(mlp=mlp, branch=moe)

        def written_out(block: DecoderBlock) -> jax.Array:
            h = X + block.attention(block.attention_norm(X), None, None, Execution())[0]
            m = block.mlp(block.mlp_norm(h), Execution())
            out = h + (m[0] if isinstance(m, tuple) else m)
            return out + block.branch(block.branch_norm(X), Execution())[0]

        both = jax.jit(lambda block, f=written_out: (*block(X, None, None, Execution()), f(block)))
        found, statistics, expected = both(block)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert set(statistics) == ({"branch", "mlp"} if mlp is moe else {"branch"})
