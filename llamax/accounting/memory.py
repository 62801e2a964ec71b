"""Bytes a training run needs, summed over the whole mesh.
 Parameters, gradients and optimizer states are exact for the layouts in use. Activations are an estimate: what the
backward pass keeps, by the rules in `MEMORY_RULES`; compilers fuse some of it away and add buffers of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamax.accounting.params import Leaf, leaves
from llamax.accounting.pipeline import turns
from llamax.config.components import Attention, DenseMlp, LatentAttention, MoeMlp
from llamax.config.model import Block, ModelConfig

if TYPE_CHECKING:  # the sections of a run take a tenth of the time in which `llamax model list` answers
    from llamax.config.run import RunConfig, TrainConfig

_F32 = 4
# float8 operands are made where they are multiplied; auto is bfloat16 wherever memory is scarce.
_BYTES = {"float32": 4, "bfloat16": 2, "float8": 2, "auto": 2}

MEMORY_RULES: dict[str, str] = {
    "parameters": "4 bytes a parameter, prediction modules and router biases included: float32 master weights",
    "gradients": "4 bytes a parameter, twice that with gradient accumulation (the sum and the newest part)",
    "optimizer": "4 bytes each: AdamW 2 a parameter; Muon 1 for matrices, 2 for the rest; Lion and SGD 1; "
    "Adafactor a row and a column for matrices of 128 or more on both sides, else 1 a parameter",
    "activations": "what the backward pass keeps of one microbatch, and one layer's float32 attention scores with "
    "their gradient. none: every intermediate of every layer, attention weights included; dots: each unit's input and "
    "its weight matmuls' results, and one unit's intermediates; full: each unit's input, and one unit's intermediates",
    "logits": "two float32 arrays (logits, their gradient) of vocab_size for loss_chunk tokens (null: the microbatch)",
    "total": "the sum, over the whole mesh: divide by the devices for what is sharded over all of them",
}


def memory_bytes(config: RunConfig, flash: bool = False, stages: int = 1) -> dict[str, int]:
    """Bytes of a training step by the keys of `MEMORY_RULES`, over the whole mesh; with `flash` attention kernels
    layers without softcap, ALiBi, chunks or blocks hold no scores. `remat: auto` counts as full.

    In a pipeline of `stages` each keeps what its layers keep for every turn (see `pipeline.turns`), all work at once,
    and the head reads the whole batch.
    """
    train = config.train
    state = training_state_bytes(config.model, config.optimizer.kind)
    parts = train.grad_accumulation
    microbatch = train.batch_size // parts * train.seq_len
    at_head = microbatch if stages == 1 else parts * microbatch
    kept, scratch = _activation_bytes_per_token(config.model, train, flash)
    result = state | {
        "gradients": state["gradients"] * (1 if parts == 1 else 2),
        "activations": microbatch * (kept * (1 if stages == 1 else turns(stages, parts)) + scratch * stages),
        "logits": 2 * _F32 * config.model.vocab_size * min(train.loss_chunk or at_head, at_head),
    }
    return result | {"total": sum(result.values())}


def training_state_bytes(model: ModelConfig, optimizer: str = "adamw") -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state, as in `MEMORY_RULES` without accumulation; exact."""
    rows = list(leaves(model))
    learned = [leaf for leaf in rows if leaf.group != "buffer"]  # a rule moves the others, without gradient or moments
    return {
        "parameters": _F32 * sum(leaf.size for leaf in rows),
        "optimizer": _F32 * sum(_moments(leaf, optimizer) for leaf in learned),
        "gradients": _F32 * sum(leaf.size for leaf in learned),
    }


def stacked_share(model: ModelConfig) -> float:
    """The share of a model's parameters that is in its stacks of layers, which stages divide among them."""
    rows = list(leaves(model))
    return sum(leaf.size for leaf in rows if leaf.layers) / sum(leaf.size for leaf in rows)


def _moments(leaf: Leaf, optimizer: str) -> int:
    """Scalars of optimizer state for one leaf."""
    if optimizer == "adamw" or (optimizer == "muon" and leaf.group != "matrix"):
        return 2 * leaf.size
    if optimizer == "adafactor" and min(leaf.sides) >= 128:  # optax factors from that size on
        rows, columns = leaf.sides
        return leaf.size // (rows * columns) * (rows + columns)
    return leaf.size


def _activation_bytes_per_token(model: ModelConfig, train: TrainConfig, flash: bool) -> tuple[int, int]:
    """Bytes per token of the microbatch: (what is kept of every layer, the scratch of the unit at work).

    Rematerialization works on units (the body of the scan over layers), so their inputs are what is kept.
    """
    d, carry, operand = model.d_model, _BYTES[train.activation_dtype], _BYTES[train.compute_dtype]
    kept, scratch = 0, 0
    for repeat, unit in model.blocks:
        keys = [0 if flash and _flash_covers(block) else train.seq_len for block in unit]
        whole = sum(_block_bytes(block, d, k, carry, operand) for block, k in zip(unit, keys, strict=True))
        scores = max(2 * _F32 * _scores(block.attention) * k for block, k in zip(unit, keys, strict=True))
        matmuls = operand * sum(_matmul_width(block, d) for block in unit)
        inputs = carry * d
        kept += repeat * {"none": whole, "dots": inputs + matmuls, "full": inputs, "auto": inputs}[train.remat]
        scratch = max(scratch, scores + (0 if train.remat == "none" else whole))
    if model.mtp:  # the modules are not scanned: each keeps its two inputs, their projection and all of its block
        kept += model.mtp * (4 * carry * d + _block_bytes(model.layers[-1], d, train.seq_len, carry, operand))
    return kept, scratch


def _scores(a: Attention) -> int:
    """Float32 scores a query and key: one a head, and an indexer's own."""
    return a.heads + (a.indexer.heads if isinstance(a, LatentAttention) and a.indexer else 0)


def _flash_covers(block: Block) -> bool:
    """Whether a flash kernel may serve the layer (llamax/model/flash.py)."""
    a = block.attention
    plain = not isinstance(a, LatentAttention) and a.softcap is None and a.chunk is None and a.block_sparse is None
    return plain and block.position.kind != "alibi"


def _block_bytes(block: Block, d: int, keys: int, carry: int, operand: int) -> int:
    """The intermediates of one block, per token: residual stream and norms, queries, keys and values, attention
    weights over `keys` keys and the slope of a softcap, attention output, MLP and branch."""
    a = block.attention
    sublayers = (4 if block.placement == "sandwich" else 2) + (block.branch is not None)
    residual = carry * d * (2 + sublayers)
    softcap = not isinstance(a, LatentAttention) and a.softcap is not None
    weights = a.heads * keys * (operand + (_F32 if softcap else 0))
    mixture = 0 if block.branch is None else _mlp_width(block.branch, d)
    widths = _attention_width(a) + a.heads * a.value_dim + d + _mlp_width(block.mlp, d) + mixture
    return residual + weights + operand * widths


def _attention_width(a: Attention) -> int:
    """Elements per token on the way to the scores: queries and keys before and after rotation, values; for latent
    attention its latents before and after their norms, and the same of every index head."""
    if not isinstance(a, LatentAttention):
        return (2 * (a.heads + a.kv_heads) + a.kv_heads) * a.head_dim
    latents = 2 * (a.q_rank or 0) + 2 * (a.kv_rank + a.rope_dim)
    expanded = 2 * a.heads * a.head_dim + a.heads * (a.nope_dim + a.value_dim) + a.heads * a.head_dim
    index = 0 if a.indexer is None else 2 * (a.indexer.heads + 1) * a.indexer.head_dim + a.indexer.heads
    return latents + expanded + index


def _mlp_width(mlp: DenseMlp | MoeMlp, d: int) -> int:
    """Elements per token inside an MLP: up, gate, activation, product, output; for experts once a chosen one."""
    if isinstance(mlp, DenseMlp):
        return (4 if mlp.gated else 2) * mlp.d_ff + d
    routed = mlp.top_k * (_mlp_width(mlp.expert, d) + d)  # the dispatched copy of the token
    return routed + 2 * mlp.experts + (0 if mlp.shared is None else _mlp_width(mlp.shared, d))


def _matmul_width(block: Block, d: int) -> int:
    """Elements per token that the weight matmuls of one block put out: what remat=dots saves."""
    mlps = [block.mlp] if block.branch is None else [block.mlp, block.branch]
    dense: list[DenseMlp] = []
    for mlp in mlps:
        if isinstance(mlp, DenseMlp):
            dense.append(mlp)
        else:
            dense += [mlp.expert] * mlp.top_k + ([mlp.shared] if mlp.shared else [])
    return _projected(block.attention) + d + sum((2 if m.gated else 1) * m.d_ff + d for m in dense)


def _projected(a: Attention) -> int:
    """Elements per token that the projections before the scores put out."""
    if not isinstance(a, LatentAttention):
        return (a.heads + 2 * a.kv_heads) * a.head_dim
    index = 0 if a.indexer is None else (a.indexer.heads + 1) * a.indexer.head_dim + a.indexer.heads
    latents = (a.q_rank or 0) + a.kv_rank + a.rope_dim
    return latents + a.heads * (a.head_dim + a.nope_dim + a.value_dim) + index
