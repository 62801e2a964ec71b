"""Bytes a training run needs, summed over the whole mesh, and the bytes of a KV cache.
 Parameters, gradients and optimizer states are exact for the layouts in use. Activations are an estimate: what the
backward pass keeps, by the rules in `MEMORY_RULES`; compilers fuse some of it away and add buffers of their own.
"""

from __future__ import annotations

from llamax.accounting.params import Leaf, leaves
from llamax.config.components import DenseMlp, MoeMlp
from llamax.config.model import Block, ModelConfig
from llamax.config.run import RunConfig, TrainConfig

_F32 = 4
_BYTES = {"float32": 4, "bfloat16": 2}

MEMORY_RULES: dict[str, str] = {
    "parameters": "4 bytes a parameter: float32 master weights",
    "gradients": "4 bytes a parameter, twice that with gradient accumulation (the sum and the newest part)",
    "optimizer": "4 bytes each: AdamW 2 a parameter; Muon 1 for matrices, 2 for the rest; Lion and SGD 1; "
    "Adafactor a row and a column for matrices of 128 or more on both sides, else 1 a parameter",
    "activations": "what the backward pass keeps of one microbatch, and one layer's float32 attention scores with "
    "their gradient. none: every intermediate of every layer, attention weights included; dots: each unit's input and "
    "its weight matmuls' results, and one unit's intermediates; full: each unit's input, and one unit's intermediates",
    "logits": "two float32 arrays (logits, their gradient) of vocab_size for loss_chunk tokens (null: the microbatch)",
    "total": "the sum, over the whole mesh: divide by the devices for what is sharded over all of them",
}


def memory_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes of a training step by the keys of `MEMORY_RULES`, over the whole mesh."""
    rows = list(leaves(config.model))
    train = config.train
    params = sum(leaf.size for leaf in rows)
    microbatch = train.batch_size // train.grad_accumulation * train.seq_len
    result = {
        "parameters": _F32 * params,
        "optimizer": _F32 * sum(_moments(leaf, config.optimizer.kind) for leaf in rows),
        "gradients": _F32 * params * (1 if train.grad_accumulation == 1 else 2),
        "activations": microbatch * _activation_bytes_per_token(config.model, train),
        "logits": 2 * _F32 * config.model.vocab_size * min(train.loss_chunk or microbatch, microbatch),
    }
    return result | {"total": sum(result.values())}


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes one more token appends to the KV cache: 2 (keys, values) x kv_heads x head_dim x layers, bfloat16 by
    default.

    A layer with a window appends as much until the window is full and nothing after.
    """
    return bytes_per_value * sum(2 * b.attention.kv_heads * b.attention.head_dim for b in model.layers)


def _moments(leaf: Leaf, optimizer: str) -> int:
    """Scalars of optimizer state for one leaf."""
    if optimizer == "adamw" or (optimizer == "muon" and leaf.group != "matrix"):
        return 2 * leaf.size
    if optimizer == "adafactor" and min(leaf.sides) >= 128:  # optax factors from that size on
        rows, columns = leaf.sides
        return leaf.size // (rows * columns) * (rows + columns)
    return leaf.size


def _activation_bytes_per_token(model: ModelConfig, train: TrainConfig) -> int:
    """Bytes per token of the microbatch: what is kept of every layer, and the scratch of the unit at work.

    Rematerialization works on units (the body of the scan over layers), so their inputs are what is kept.
    """
    d, carry, operand = model.d_model, _BYTES[train.activation_dtype], _BYTES[train.compute_dtype]
    kept, scratch = 0, 0
    for repeat, unit in model.blocks:
        whole = sum(_block_bytes(block, d, train.seq_len, carry, operand) for block in unit)
        scores = max(2 * _F32 * block.attention.heads * train.seq_len for block in unit)
        matmuls = operand * sum(_matmul_width(block, d) for block in unit)
        kept += repeat * {"none": whole, "dots": carry * d + matmuls, "full": carry * d}[train.remat]
        scratch = max(scratch, scores + (0 if train.remat == "none" else whole))
    return kept + scratch


def _block_bytes(block: Block, d: int, seq_len: int, carry: int, operand: int) -> int:
    """The intermediates of one block, per token: residual stream and norms, q k v before and after rotation, attention
    weights (no flash kernel: all `seq_len` keys, and the slope of a softcap), attention output, MLP."""
    a = block.attention
    sublayers = 4 if block.placement == "sandwich" else 2
    residual = carry * d * (2 + sublayers)
    qkv = operand * (2 * (a.heads + a.kv_heads) + a.kv_heads) * a.head_dim
    weights = a.heads * seq_len * (operand + (_F32 if a.softcap is not None else 0))
    return residual + qkv + weights + operand * (a.heads * a.head_dim + d) + operand * _mlp_width(block.mlp, d)


def _mlp_width(mlp: DenseMlp | MoeMlp, d: int) -> int:
    """Elements per token inside an MLP: up, gate, activation, product, output; for experts once a chosen one."""
    if isinstance(mlp, DenseMlp):
        return (4 if mlp.gated else 2) * mlp.d_ff + d
    routed = mlp.top_k * (_mlp_width(mlp.expert, d) + d)  # the dispatched copy of the token
    return routed + 2 * mlp.experts + (0 if mlp.shared is None else _mlp_width(mlp.shared, d))


def _matmul_width(block: Block, d: int) -> int:
    """Elements per token that the weight matmuls of one block put out: what remat=dots saves."""
    a, mlp = block.attention, block.mlp
    attention = (a.heads + 2 * a.kv_heads) * a.head_dim + d
    dense = [mlp] if isinstance(mlp, DenseMlp) else [mlp.expert] * mlp.top_k + ([mlp.shared] if mlp.shared else [])
    return attention + sum((2 if m.gated else 1) * m.d_ff + d for m in dense)
