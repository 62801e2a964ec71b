"""FLOPs against a loop over matrix products, a published table and XLA's own count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llamax.accounting import count_params, forward_flops_by_component, training_flops_per_token
from llamax.accounting.flops import visible_keys
from llamax.config.components import MoeMlp
from llamax.config.load import load_model, validate
from llamax.config.model import ModelConfig

from .random_models import random_model


def brute_force(model: ModelConfig, seq_len: int, causal: bool) -> float:
    """Multiplies and adds of every weight matmul and every (query, key) pair of one sequence, counted one by one."""
    total = 0
    for block in model.layers:
        a, mlp = block.attention, block.mlp
        matrices = [(model.d_model, a.heads * a.head_dim), (a.heads * a.head_dim, model.d_model)]
        matrices += 2 * [(model.d_model, a.kv_heads * a.head_dim)]
        dense = [mlp]
        if isinstance(mlp, MoeMlp):
            matrices.append((model.d_model, mlp.experts))
            dense = mlp.top_k * [mlp.expert] + ([mlp.shared] if mlp.shared else [])
        for m in dense:
            matrices += (3 if m.kind.endswith("glu") else 2) * [(model.d_model, m.d_ff)]
        total += sum(2 * seq_len * rows * columns for rows, columns in matrices)
        for query in range(seq_len):
            for key in range(seq_len):
                near = a.window is None or abs(query - key) < a.window
                if causal and query >= key and near:
                    total += 2 * (2 * a.heads * a.head_dim)
        if not causal:
            total += 2 * (2 * a.heads * a.head_dim) * seq_len * min(seq_len, a.window or seq_len)
    return total + 2 * seq_len * model.d_model * model.vocab_size


@pytest.mark.parametrize("seed", range(12))
def test_causal_is_three_passes_of_the_brute_force_count(seed: int) -> None:
    model, seq_len = random_model(seed), 7
    causal = training_flops_per_token(model, seq_len)["causal"]
    assert causal * seq_len == pytest.approx(3 * brute_force(model, seq_len, True))
    assert causal == 3 * sum(forward_flops_by_component(model, seq_len).values())


@pytest.mark.parametrize("seed", range(12))
def test_chinchilla_is_the_full_count_with_lookup_and_softmax(seed: int) -> None:
    model, seq_len = random_model(seed), 7
    lookup = 2 * model.vocab_size * model.d_model * seq_len
    softmax = sum(3 * b.attention.heads * min(seq_len, b.attention.window or seq_len) * seq_len for b in model.layers)
    expected = 3 * (brute_force(model, seq_len, False) + lookup + softmax)
    assert training_flops_per_token(model, seq_len)["chinchilla"] * seq_len == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(12))
def test_palm_adds_twelve_l_h_q_t_to_six_n(seed: int) -> None:
    model, seq_len = random_model(seed), 7
    layers = [block.attention for block in model.layers]
    attention = sum(12 * a.heads * a.head_dim * min(seq_len, a.window or seq_len) for a in layers)
    flops = training_flops_per_token(model, seq_len)
    assert flops["6n"] == 6 * count_params(model).active_matmul
    assert flops["palm"] == flops["6n"] + attention


# layers, d_model, d_ff, heads, key size, parameters, F / 6ND: Table A4 of arXiv:2203.15556, parameters of Table A9.
# Their FLOPs there leave out the embedding and logits rows; the models are ungated, full attention over 2048 positions.
TABLE_A4 = [
    (10, 640, 2560, 10, 64, 73e6, 1.03),
    (20, 1024, 4096, 16, 64, 305e6, 1.10),
    (24, 1280, 5120, 10, 128, 552e6, 1.08),
    (26, 1792, 7168, 14, 128, 1.1435e9, 1.04),
    (28, 2048, 8192, 16, 128, 1.593e9, 1.03),
    (40, 3584, 14336, 28, 128, 6.796e9, 0.99),
]


@pytest.mark.parametrize(("layers", "d_model", "d_ff", "heads", "head_dim", "params", "ratio"), TABLE_A4)
def test_chinchilla_reproduces_the_papers_ratios(
    layers: int, d_model: int, d_ff: int, heads: int, head_dim: int, params: float, ratio: float
) -> None:
    data = {
        "vocab_size": 32000, "d_model": d_model, "segments": [{"repeat": layers}], "position": {"kind": "nope"},
        "attention": {"heads": heads, "head_dim": head_dim}, "mlp": {"kind": "gelu", "d_ff": d_ff},
        "norm": {"kind": "rmsnorm"},
    }  # fmt: skip
    flops = training_flops_per_token(validate(ModelConfig, data, "chinchilla"), 2048)["chinchilla"]
    tables = 3 * 2 * (2 * 32000 * d_model)
    assert (flops - tables) / (6 * params) == pytest.approx(ratio, abs=0.0125)


def test_visible_keys_of_a_window() -> None:
    assert visible_keys(8, None) == 4.5
    assert visible_keys(8, 100) == 4.5
    assert visible_keys(8, 1) == 1
    assert visible_keys(8, 3) == (1 + 2 + 6 * 3) / 8


def test_conventions_order_on_a_real_model() -> None:
    """6N < causal with attention < palm < chinchilla at a length where attention matters."""
    flops = training_flops_per_token(load_model("llama3/8b"), 8192)
    assert flops["6n"] < flops["causal"] < flops["palm"] < flops["chinchilla"]
    assert flops["6n"] == 6 * 7_504_924_672


def test_mixtral_costs_its_active_parameters() -> None:
    flops = training_flops_per_token(load_model("mixtral/8x7b"), 1)
    assert flops["6n"] == 6 * 12_748_853_248


# ---------------------------------------------------------------- XLA
VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention": {"heads": 8, "kv_heads": 2, "head_dim": 32}, "mlp": {"kind": "gelu", "d_ff": 512}},
    {"head": {"tied": True}, "placement": "sandwich", "norm": {"kind": "layernorm"}},
]


@pytest.mark.parametrize("change", VARIANTS)
def test_xla_counts_the_same_products(change: dict[str, Any]) -> None:
    """XLA's count of an unrolled model: the forward pass, and a training step at three times as much.

    XLA multiplies all pairs of positions and masks afterwards, so it is compared with the count at full attention
    (causal with every key); it also counts norms, softmax and activations, about one percent
    here (the causal half would be three).
    """
    from llamax.model.execution import Execution
    from llamax.model.loss import next_token_loss
    from llamax.model.transformer import Transformer

    data = {
        "vocab_size": 512, "d_model": 256, "segments": [{"repeat": 2}, {"repeat": 1}], "position": {"kind": "rope"},
        "attention": {"heads": 4}, "mlp": {"kind": "swiglu", "d_ff": 512}, "norm": {"kind": "rmsnorm"}, **change,
    }  # fmt: skip
    model, batch, seq_len = validate(ModelConfig, data, "xla"), 2, 64
    execution = Execution(unroll=True)
    made = jax.eval_shape(lambda key: Transformer(model, key=key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    more = jax.ShapeDtypeStruct((batch, seq_len + 1), jnp.int32)

    def loss(m: Transformer, t: jax.Array) -> jax.Array:
        return next_token_loss(m, t, None, None, jnp.float32(0.0), None, execution)[0]

    forward = xla_flops(lambda m, t: m(t, None, execution), made, tokens)
    assert forward == pytest.approx(brute_force(model, seq_len, causal=False) * batch, rel=0.02)
    assert forward > brute_force(model, seq_len, causal=False) * batch  # XLA has more to count, never less
    if not change:
        step = xla_flops(jax.grad(loss), made, more)
        assert step == pytest.approx(3 * brute_force(model, seq_len, causal=False) * batch, rel=0.02)


def xla_flops(function: Any, *args: Any) -> float:
    """XLA's cost analysis of the compiled program."""
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])
