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
 K is the number of keys a query is charged for: all `seq_len` (or `window`, `chunk`, an indexer's `top_k`, if smaller)
under `palm` and `chinchilla`; under `causal` the average number of visible keys, (T + 1) / 2 without a window, which is
where half the attention goes. Block-sparse attention counts the mean over its heads: of the most keys a query sees, and
of the visible ones.
 Latent attention is counted in the form that trains: keys and values expanded to every head. Its widths are nope_dim +
rope_dim a score and value_dim a value. An indexer's own scores, one for each head and key before the choice of top_k,
are its row `indexer`, with its three projections; in `palm` its scores join the attention's. `decode` counts one step
of generation, latent attention in the absorbed form.
 Multi-token prediction modules are the row `mtp` of `chinchilla` and `causal` (projection, block, one more pass of the
head), since a training step does them; N leaves them out, so `6n` and `palm` do.
 Adaptations the sources do not spell out, the same under every convention: grouped-query attention projects to heads
+ 2 kv_heads (the scores stay at `heads`); a gated MLP (`*glu`) has three matrices where the Chinchilla table has two;
a mixture of experts costs its router (d x E), top_k experts and the shared expert with its gate; each layer of a mixed
stack is counted by its own block. Table A4 of the Chinchilla paper itself leaves out its embedding and logits rows;
this table keeps them, as appendix F prints it (a test reproduces A4 from the remaining rows).
"""

from __future__ import annotations

from collections.abc import Callable

from llamax.accounting.keys import Reach, keys_at, most_keys, visible_keys
from llamax.accounting.params import count_params
from llamax.config.components import DenseMlp, GroupedQueryAttention, Indexer, LatentAttention, Mlp, MoeMlp
from llamax.config.model import Block, ModelConfig

CONVENTIONS = ("6n", "chinchilla", "palm", "causal")
_ROWS = ("embedding", "qkv", "scores", "softmax", "values", "out", "indexer", "mlp", "router", "experts", "shared")
_UNCOUNTED = ("embedding", "softmax")  # rows of the appendix F table that are no matrix product

Keys = Callable[[Reach], float]
"""The keys a query is charged for."""


def training_flops_per_token(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Forward and backward FLOPs per token at sequence length `seq_len`, by convention."""

    def keys(reach: Reach) -> float:
        return most_keys(seq_len, reach)

    table = _forward(model, keys) | {"mtp": model.mtp * sum(_prediction(model, keys).values())}
    exact = forward_flops_by_component(model, seq_len)
    six_n = 6.0 * count_params(model).active_matmul
    pairs = table["scores"] + table["values"] + sum(_index_scores(b, keys) for b in model.layers)
    return {
        "6n": six_n,
        "chinchilla": 3.0 * sum(table.values()),
        "palm": six_n + 3.0 * pairs,  # 12 H Q K = 3 passes x (scores 2 H Q K + values 2 H Q K)
        "causal": 3.0 * sum(exact.values()),
    }


def forward_flops_by_component(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Forward FLOPs per token of every component, counted exactly as in `causal`: matrix products alone.

    Keys: qkv, scores, values, out, indexer (attention), mlp, router, experts, shared, head, mtp.
    """

    def keys(reach: Reach) -> float:
        return visible_keys(seq_len, reach)

    return _products(_forward(model, keys)) | {"mtp": model.mtp * sum(_products(_prediction(model, keys)).values())}


def decode_flops_per_token(model: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of generating one token after `context - 1` others from a cache, by component, counted as `causal` does.

    Latent attention is in its absorbed form (DeepSeek-V2, arXiv:2405.04434, section 2.1.2): kv_up multiplies the query
    and the output instead of every cached latent, so a score is kv_rank + rope_dim wide and a value kv_rank.
    Prediction modules do not run.
    """

    def keys(reach: Reach) -> float:
        return keys_at(context - 1, reach)

    return _products(_forward(model, keys, absorbed=True))


def _products(table: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in table.items() if name not in _UNCOUNTED}


def _forward(model: ModelConfig, keys: Keys, absorbed: bool = False) -> dict[str, float]:
    """The rows of the appendix F table, summed over layers, per token."""
    d = model.d_model
    lookup = 2.0 * model.vocab_size * d
    total = dict.fromkeys(_ROWS, 0.0)
    total["embedding"] = lookup
    for repeat, unit in model.blocks:
        for block in unit:
            for name, value in _block(block, d, keys, absorbed).items():
                total[name] += repeat * value
    return total | {"head": lookup}


def _prediction(model: ModelConfig, keys: Keys) -> dict[str, float]:
    """The rows of one multi-token prediction module: its projection, a block like the last one's, the shared head."""
    d = model.d_model
    own = {"project": 2.0 * (2 * d) * d, "head": 2.0 * model.vocab_size * d}
    return own | _block(model.layers[-1], d, keys, absorbed=False)


def _block(block: Block, d: int, keys: Keys, absorbed: bool) -> dict[str, float]:
    total = dict.fromkeys(_ROWS, 0.0)
    parts = [_attention(block, d, keys, absorbed), _feed_forward(block.mlp, d)]
    for part in [*parts, *([_feed_forward(block.branch, d)] if block.branch else [])]:
        for name, value in part.items():
            total[name] += value
    return total


def _attention(block: Block, d: int, keys: Keys, absorbed: bool) -> dict[str, float]:
    a = block.attention
    if isinstance(a, LatentAttention):
        return _latent(a, d, keys, absorbed)
    return _softmax_attention(
        project=d * (a.heads + 2 * a.kv_heads) * a.head_dim,
        pair=(a.heads, a.head_dim, a.head_dim),
        out=a.heads * a.head_dim * d,
        seen=keys(Reach(a.window, a.chunk, a.block_sparse, a.heads)),
    )


def _latent(a: LatentAttention, d: int, keys: Keys, absorbed: bool) -> dict[str, float]:
    query = a.heads * a.head_dim
    project = d * query if a.q_rank is None else (d + query) * a.q_rank
    project += d * (a.kv_rank + a.rope_dim) + a.kv_rank * a.heads * (a.nope_dim + a.value_dim)
    widths = (a.kv_rank + a.rope_dim, a.kv_rank) if absorbed else (a.head_dim, a.value_dim)
    seen = keys(Reach(a.indexer.top_k if a.indexer else None))
    rows = _softmax_attention(project, (a.heads, *widths), a.heads * a.value_dim * d, seen)
    if a.indexer is None or a.q_rank is None:
        return rows
    i = a.indexer
    projections = 2.0 * (a.q_rank * i.heads * i.head_dim + d * (i.head_dim + i.heads))
    return rows | {"indexer": projections + _score_all(i, keys)}


def _softmax_attention(project: int, pair: tuple[int, int, int], out: int, seen: float) -> dict[str, float]:
    """`pair` is (heads, width of a score, width of a value); `project` and `out` are the multiply-adds of matrices."""
    heads, score, value = pair
    return {
        "qkv": 2.0 * project,
        "scores": 2.0 * heads * score * seen,
        "softmax": 3.0 * heads * seen,
        "values": 2.0 * heads * value * seen,
        "out": 2.0 * out,
    }


def _score_all(indexer: Indexer, keys: Keys) -> float:
    """Index scores of one query: every head meets every visible key, and the heads' scores are summed by weight."""
    return 2.0 * indexer.heads * (indexer.head_dim + 1) * keys(Reach())


def _index_scores(block: Block, keys: Keys) -> float:
    a = block.attention
    return 0.0 if isinstance(a, GroupedQueryAttention) or a.indexer is None else _score_all(a.indexer, keys)


def _feed_forward(mlp: Mlp | MoeMlp, d: int) -> dict[str, float]:
    if isinstance(mlp, DenseMlp):
        return {"mlp": _dense(mlp, d)}
    cost = {"router": 2.0 * d * mlp.experts, "experts": mlp.top_k * _dense(mlp.expert, d)}
    if mlp.shared is None:
        return cost
    return cost | {"shared": _dense(mlp.shared, d) + (2.0 * d if mlp.shared_gate else 0.0)}


def _dense(mlp: DenseMlp, d: int) -> float:
    return 2.0 * (3 if mlp.gated else 2) * d * mlp.d_ff
