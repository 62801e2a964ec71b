"""FLOPs per token, per component, under the four conventions in use.

A multiply and an add are two FLOPs. All figures are *model* FLOPs: recomputation (remat) is not counted, and a training
step is three forward passes' worth, because the backward pass has two matrix products for each forward one.

| convention   | counts                                                                                            |
|--------------|---------------------------------------------------------------------------------------------------|
| `6n`         | 6 N, N = Params.active_matmul (norm scales and biases included, as everyone does). No attention   |
|              | scores. The convention of budgets: C = 6 N D (Kaplan, arXiv:2001.08361).                          |
| `palm`       | 6 N + 12 sum over layers of heads x head_dim x K: attention over every pair of positions          |
|              | (PaLM, arXiv:2204.02311, appendix B).                                                             |
| `chinchilla` | The table of Hoffmann et al. (arXiv:2203.15556, appendix F), times 3: the input embedding as if   |
|              | it were a one-hot matmul, QKV, scores, softmax (3 a score), values, output projection, dense      |
|              | block, logits. All pairs of positions. Norms, biases and activation functions are not counted.    |
| `causal`     | Matrix products a causal kernel must do, exactly: as the table, without the embedding lookup and  |
|              | the softmax, and each query meets only the keys it can see.                                       |
 K is the number of keys a query is charged for: all `seq_len` (or `window`, if smaller) under `palm` and
`chinchilla`; under `causal` the average number of visible keys, (T + 1) / 2 without a window, which is where half the
attention goes.
 Adaptations the sources do not spell out, the same under every convention: grouped-query attention projects to heads
+ 2 kv_heads (the scores stay at `heads`); a gated MLP (`*glu`) has three matrices where the Chinchilla table has two;
a mixture of experts costs its router (d x E), top_k experts and the shared expert; each layer of a mixed stack is
counted by its own block. Table A4 of the Chinchilla paper itself leaves out its embedding and logits rows; this table
keeps them, as appendix F prints it (a test reproduces A4 from the remaining rows).
"""

from __future__ import annotations

from llamax.accounting.params import count_params
from llamax.config.components import DenseMlp, Mlp
from llamax.config.model import Block, ModelConfig

CONVENTIONS = ("6n", "chinchilla", "palm", "causal")


def training_flops_per_token(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Forward and backward FLOPs per token at sequence length `seq_len`, by convention."""
    table = _forward(model, seq_len, causal=False)
    exact = forward_flops_by_component(model, seq_len)
    six_n = 6.0 * count_params(model).active_matmul
    pairs = sum(table[name] for name in ("scores", "values"))
    return {
        "6n": six_n,
        "chinchilla": 3.0 * sum(table.values()),
        "palm": six_n + 3.0 * pairs,  # 12 H Q K = 3 passes x (scores 2 H Q K + values 2 H Q K)
        "causal": 3.0 * sum(exact.values()),
    }


def forward_flops_by_component(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Forward FLOPs per token of every component, counted exactly as in `causal`: matrix products alone.

    Keys: qkv, scores, values, out (attention), mlp, router, experts, shared, head.
    """
    table = _forward(model, seq_len, causal=True)
    return {name: value for name, value in table.items() if name not in ("embedding", "softmax")}


def visible_keys(seq_len: int, window: int | None) -> float:
    """Keys a query sees on average under a causal mask: the mean over t = 1..T of min(t, window)."""
    span = seq_len if window is None else min(seq_len, window)
    return (span * (span + 1) / 2 + (seq_len - span) * span) / seq_len


def _forward(model: ModelConfig, seq_len: int, causal: bool) -> dict[str, float]:
    """The rows of the appendix F table, summed over layers, per token."""
    d = model.d_model
    lookup = 2.0 * model.vocab_size * d
    total = dict.fromkeys(
        ("embedding", "qkv", "scores", "softmax", "values", "out", "mlp", "router", "experts", "shared"), 0.0
    )
    total["embedding"] = lookup
    for repeat, unit in model.blocks:
        for block in unit:
            for name, value in (_attention(block, d, seq_len, causal) | _feed_forward(block.mlp, d)).items():
                total[name] += repeat * value
    return total | {"head": lookup}


def _attention(block: Block, d: int, seq_len: int, causal: bool) -> dict[str, float]:
    a = block.attention
    width = a.heads * a.head_dim
    keys = visible_keys(seq_len, a.window) if causal else min(seq_len, a.window or seq_len)
    return {
        "qkv": 2.0 * d * (width + 2 * a.kv_heads * a.head_dim),
        "scores": 2.0 * width * keys,
        "softmax": 3.0 * a.heads * keys,
        "values": 2.0 * width * keys,
        "out": 2.0 * width * d,
    }


def _feed_forward(mlp: Mlp, d: int) -> dict[str, float]:
    if isinstance(mlp, DenseMlp):
        return {"mlp": _dense(mlp, d)}
    cost = {"router": 2.0 * d * mlp.experts, "experts": mlp.top_k * _dense(mlp.expert, d)}
    return cost if mlp.shared is None else cost | {"shared": _dense(mlp.shared, d)}


def _dense(mlp: DenseMlp, d: int) -> float:
    return 2.0 * (3 if mlp.gated else 2) * d * mlp.d_ff
