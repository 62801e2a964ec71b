"""FLOPs against a loop over matrix products, a published table and XLA's own count."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llamax.accounting import (
    count_params,
    decode_flops_per_token,
    forward_flops_by_component,
    training_flops_per_token,
)
from llamax.accounting.keys import Reach, keys_at, most_keys, visible_keys
from llamax.config.components import BlockSparse, DenseMlp, LatentAttention, MoeMlp
from llamax.config.load import load_model, validate
from llamax.config.model import Block, ModelConfig

from .random_models import random_family_model, random_model


def brute_force(model: ModelConfig, seq_len: int, causal: bool) -> float:
    """Multiplies and adds of every weight matmul and every (query, key) pair of one sequence, counted one by one."""
    head = 2 * seq_len * model.d_model * model.vocab_size
    total = sum(brute_block(block, model.d_model, seq_len, causal) for block in model.layers) + head
    projection = 2 * seq_len * (2 * model.d_model) * model.d_model
    return total + model.mtp * (projection + brute_block(model.layers[-1], model.d_model, seq_len, causal) + head)


def brute_block(block: Block, d: int, seq_len: int, causal: bool) -> float:
    total = sum(2 * seq_len * rows * columns for rows, columns in matrices(block, d))
    for query in range(seq_len):
        seen, indexed = brute_keys(block, query, seq_len, causal)
        total += 2 * seen * sum(pair_widths(block)) + indexed * index_width(block)
    return total


def matrices(block: Block, d: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix one token of this block is multiplied by."""
    a = block.attention
    if isinstance(a, LatentAttention):
        found = [(d, a.kv_rank + a.rope_dim), (a.kv_rank, a.heads * (a.nope_dim + a.value_dim))]
        found += [(a.heads * a.value_dim, d)]
        found += [(d, a.q_rank), (a.q_rank, a.heads * a.head_dim)] if a.q_rank else [(d, a.heads * a.head_dim)]
        if a.indexer:
            found += [(a.q_rank or 0, a.indexer.heads * a.indexer.head_dim), (d, a.indexer.head_dim)]
            found += [(d, a.indexer.heads)]
    else:
        found = [(d, a.heads * a.head_dim), (a.heads * a.head_dim, d), *2 * [(d, a.kv_heads * a.head_dim)]]
    for mlp in [block.mlp, *([block.branch] if block.branch else [])]:
        dense = [mlp]
        if isinstance(mlp, MoeMlp):
            found.append((d, mlp.experts))
            dense = mlp.top_k * [mlp.expert] + ([mlp.shared] if mlp.shared else [])
            found += [(d, 1)] if mlp.shared_gate else []
        for m in dense:
            found += (3 if m.kind.endswith("glu") else 2) * [(d, m.d_ff)]
    return found


def brute_blocks(pattern: BlockSparse, heads: int, query: int) -> float:
    """Keys a query sees, the mean over heads, counted one key and one head at a time."""
    step = max(1, int(pattern.stride / heads)) if pattern.heads == "shifted" else 0
    seen = 0
    for head in range(heads):
        for key in range(query + 1):
            near = query // pattern.size - key // pattern.size < pattern.local
            seen += near or (key // pattern.size + 1 + head * step) % pattern.stride == 0
    return seen / heads


def brute_keys(block: Block, query: int, seq_len: int, causal: bool) -> tuple[float, int]:
    """(keys this query attends to, keys an indexer scores for it), counted one key at a time where it is causal."""
    a = block.attention
    top_k = a.indexer.top_k if isinstance(a, LatentAttention) and a.indexer else seq_len
    window, chunk = (None, None) if isinstance(a, LatentAttention) else (a.window, a.chunk)
    if not isinstance(a, LatentAttention) and a.block_sparse is not None:
        most = max(brute_blocks(a.block_sparse, a.heads, t) for t in range(seq_len))
        return brute_blocks(a.block_sparse, a.heads, query) if causal else most, seq_len
    if not causal:
        return min(seq_len, window or seq_len, chunk or seq_len, top_k), seq_len
    seen = 0
    for key in range(query + 1):
        near = window is None or query - key < window
        same = chunk is None or query // chunk == key // chunk
        seen += near and same
    return min(seen, top_k), query + 1


def pair_widths(block: Block) -> tuple[int, int]:
    """Multiply-adds a (query, key) pair: of the scores, and of the values."""
    a = block.attention
    return a.heads * a.head_dim, a.heads * a.value_dim


def index_width(block: Block) -> int:
    """FLOPs of one index score: a product a head, and the sum of the heads by weight."""
    a = block.attention
    return 2 * a.indexer.heads * (a.indexer.head_dim + 1) if isinstance(a, LatentAttention) and a.indexer else 0


MODELS = [random_model(seed) for seed in range(12)] + [random_family_model(seed) for seed in range(24)]


def test_the_random_models_have_every_component() -> None:
    layers = [block for model in MODELS for block in model.layers]
    latent = [b.attention for b in layers if isinstance(b.attention, LatentAttention)]
    assert {a.q_rank is None for a in latent} == {a.indexer is None for a in latent} == {True, False}
    assert any(getattr(b.attention, "chunk", None) for b in layers)
    assert any(getattr(b.attention, "block_sparse", None) for b in layers)
    assert any(isinstance(b.mlp, DenseMlp) and b.mlp.limit for b in layers)
    assert any(b.branch for b in layers)
    assert any(isinstance(b.mlp, MoeMlp) and b.mlp.shared_gate for b in layers)
    assert any(model.mtp for model in MODELS)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{MODELS.index(model)}")
def test_causal_is_three_passes_of_the_brute_force_count(model: ModelConfig) -> None:
    causal = training_flops_per_token(model, 7)["causal"]
    assert causal * 7 == pytest.approx(3 * brute_force(model, 7, True))
    assert causal == 3 * sum(forward_flops_by_component(model, 7).values())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{MODELS.index(model)}")
def test_chinchilla_is_the_full_count_with_lookup_and_softmax(model: ModelConfig) -> None:
    lookup = 2 * model.vocab_size * model.d_model * 7
    layers = [*model.layers, *model.mtp * [model.layers[-1]]]
    softmax = sum(3 * b.attention.heads * 7 * brute_keys(b, 0, 7, False)[0] for b in layers)
    expected = 3 * (brute_force(model, 7, False) + lookup + softmax)
    assert training_flops_per_token(model, 7)["chinchilla"] * 7 == pytest.approx(expected)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{MODELS.index(model)}")
def test_palm_adds_the_pairs_of_every_layer_to_six_n(model: ModelConfig) -> None:
    """12 heads x head_dim x keys where a value is as wide as a key; index scores where there is an indexer."""
    pairs = 0
    for block in model.layers:
        seen, indexed = brute_keys(block, 0, 7, False)
        pairs += 6 * seen * sum(pair_widths(block)) + 3 * indexed * index_width(block)
    flops = training_flops_per_token(model, 7)
    assert flops["6n"] == 6 * count_params(model).active_matmul
    assert flops["palm"] == flops["6n"] + pairs


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{MODELS.index(model)}")
def test_decoding_costs_the_last_row_of_the_forward_pass(model: ModelConfig) -> None:
    """The absorbed form exchanges the widths of a pair, head_dim for kv_rank + rope_dim and value_dim for kv_rank."""
    expected = 2 * model.d_model * model.vocab_size
    for block in model.layers:
        a, (seen, indexed) = block.attention, brute_keys(block, 6, 7, True)
        widths = sum(pair_widths(block))
        if isinstance(a, LatentAttention):
            widths = a.heads * (a.kv_rank + a.rope_dim + a.kv_rank)
        expected += sum(2 * rows * columns for rows, columns in matrices(block, model.d_model))
        expected += 2 * seen * widths + indexed * index_width(block)
    assert sum(decode_flops_per_token(model, 7).values()) == expected


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
    assert visible_keys(8, Reach()) == 4.5
    assert visible_keys(8, Reach(100)) == 4.5
    assert visible_keys(8, Reach(1)) == 1
    assert visible_keys(8, Reach(3)) == (1 + 2 + 6 * 3) / 8


def test_visible_keys_of_a_chunk() -> None:
    assert visible_keys(8, Reach(None, 100)) == 4.5
    assert visible_keys(8, Reach(None, 4)) == 2.5
    assert visible_keys(8, Reach(None, 3)) == (1 + 2 + 3 + 1 + 2 + 3 + 1 + 2) / 8
    assert visible_keys(4, Reach(2, 3)) == (1 + 2 + 2 + 1) / 4


def test_visible_keys_of_blocks() -> None:
    """Every position of sequences that end inside and at the end of a block, patterns wider and narrower than them."""
    for size, local, stride, heads, alike in itertools.product((1, 3, 4), (1, 2), (1, 3, 7), (1, 3, 8), (True, False)):
        pattern = BlockSparse(size=size, local=local, stride=stride, heads="alike" if alike else "shifted")
        reach = Reach(blocks=pattern, heads=heads)
        seen = [brute_blocks(pattern, heads, t) for t in range(26)]
        for t, expected in enumerate(seen):
            assert keys_at(t, reach) == pytest.approx(expected)
        for length in (1, 12, 26):
            assert most_keys(length, reach) == pytest.approx(max(seen[:length]))
            assert visible_keys(length, reach) == pytest.approx(sum(seen[:length]) / length)


def test_phi_3_small_sees_an_eighth_of_the_far_keys() -> None:
    """At its context: 16 blocks of 64 near, one in eight of the 112 far ones, the last block whole."""
    pattern = load_model("phi3/small-8k").layers[0].attention.block_sparse  # type: ignore[union-attr]
    assert most_keys(8192, Reach(blocks=pattern, heads=32)) == 64 * (16 + 112 / 8)


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
