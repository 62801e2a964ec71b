"""What the devices of a mesh send each other in one training step, by mesh axis: arithmetic on configs.

`communication` lists the collectives of the program that llamax/train makes for a mesh, each with the array that it
gathers, reduces or exchanges; `RULES` says them in words. Scalars, token ids and a loss's sums over vocabulary shards
are left out. Where the compiler has a choice, the list is what TPU and GPU compilers do; `cpu=True` what XLA's does for
simulated devices (`CPU_RULES`), which is what the tests compare with.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llamax.accounting.params import Leaf, leaves
from llamax.accounting.roofline import SENT
from llamax.config.components import GroupedQueryAttention, LatentAttention, Mlp, MoeMlp
from llamax.config.mesh import AXES
from llamax.config.model import Block
from llamax.config.run import RunConfig

_F32 = 4
SLACK = 1.125  # slots over the even share in an exchange that sends slots (llamax/model/dispatch.py)

RULES: dict[str, str] = {
    "data": "the gradient of every weight a device holds, once a microbatch: an all-reduce",
    "fsdp": "float32 weights of all layers gathered for the forward and for the backward pass, those of the head once; "
    "their gradients reduce-scattered; the embedded tokens exchanged, for its table is cut by columns. Per microbatch",
    "expert": "top_k rows of d_model a token to their experts and back, the same again backward, a layer with experts "
    "(recomputed layers once more); as over data the gradients of all other weights",
    "context": "keys and values of every layer gathered forward and backward, in the narrower of the stream's type and "
    "that of products, their gradients reduce-scattered in float32; and weights as over fsdp, the table of tokens too",
    "tensor": "the stream [tokens, d_model]: an all-reduce after attention and after the feed-forward block, and one "
    "before each backward (experts: of the rows in their slots); one of the embedded tokens and one before the head "
    "backward. With sequence_parallel the same bytes, as reduce-scatter and all-gather",
    "stage": "the stream of one microbatch to the next stage, each of the microbatches + stages - 1 turns, and back",
}
CPU_RULES = (
    "reduce-scatter of weights is an all-reduce and a slice; before attention and feed-forward blocks backward each "
    "input matrix has an all-reduce of its own; expert exchanges send all slots; gathered keys and values are kept"
)


@dataclass(frozen=True)
class Traffic:
    """One kind of collective of one cause. `bytes` are the arrays that a group holds or reduces in a step (of an
    all-gather the results, else the operands, on one device), all `times` of them together; `group` devices over `axes`
    talk."""

    axes: tuple[str, ...]
    kind: str
    what: str
    bytes: float
    group: int
    times: float

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step, on a ring."""
        return self.bytes * SENT[self.kind](self.group)


def communication(config: RunConfig, mesh: Mapping[str, int], cpu: bool = False) -> list[Traffic]:
    """The collectives of a step of `config` on a mesh of these sizes (axes that are not named: 1)."""
    sizes = {axis: mesh.get(axis, 1) for axis in AXES}
    found = [*_weights(config, sizes), *_stream(config, sizes, cpu), *_experts(config, sizes, cpu)]
    found += [*_context(config, sizes, cpu), *_stages(config, sizes)]
    return [one for one in found if one.group > 1 and one.bytes]


def held_bytes(config: RunConfig, mesh: Mapping[str, int]) -> float:
    """Bytes of float32 weights that one device of the mesh holds."""
    sizes = {axis: mesh.get(axis, 1) for axis in AXES}
    return sum(_held(leaf, sizes) for leaf in leaves(config.model)) / (sizes["fsdp"] * sizes["context"])


# ---------------------------------------------------------------- sizes
def _tokens(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Tokens of a batch that one device has."""
    ways = sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["context"]
    return config.train.batch_size * config.train.seq_len / ways


def _activation(config: RunConfig) -> int:
    return {"float32": 4, "bfloat16": 2}[config.train.activation_dtype]


def _passes(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """How often a step goes through the layers: microbatches, or turns of a pipeline."""
    return config.train.grad_accumulation + sizes["stage"] - 1


def _over(sizes: Mapping[str, int], *axes: str) -> tuple[tuple[str, ...], int]:
    used = tuple(axis for axis in axes if sizes[axis] > 1)
    return used, math.prod(sizes[axis] for axis in used)


def _blocks(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[tuple[float, Block]]:
    """(how many of them a device has, block)."""
    for repeat, unit in config.model.blocks:
        for block in unit:
            yield repeat / sizes["stage"], block


# ---------------------------------------------------------------- weights
def _held(leaf: Leaf, sizes: Mapping[str, int]) -> float:
    """Bytes of a parameter on one device before fsdp and context cut it."""
    whole = leaf.name.endswith(("attention.q_down", "attention.kv_down", "project")) or "indexer" in leaf.name
    ways = sizes["tensor"] if leaf.group in ("matrix", "embedding", "head") and not whole else 1
    ways *= sizes["expert"] if leaf.experts else 1
    return _F32 * leaf.size / (ways * (sizes["stage"] if leaf.layers else 1))


def _weights(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Traffic]:
    shards, ways = _over(sizes, "fsdp", "context")
    passes, stages = _passes(config, sizes), _over(sizes, "stage")[0]
    learned = [leaf for leaf in leaves(config.model) if leaf.group != "buffer"]
    gathered, once, tables = 0.0, 0.0, 0.0
    whole = sizes["context"] > 1  # then the tokens' table is gathered like the head (Execution.table)
    reduced: dict[bool, float] = defaultdict(float)
    for leaf in learned:
        size = _held(leaf, sizes)
        reduced[bool(leaf.experts)] += size / ways * (passes if leaf.layers else config.train.grad_accumulation)
        if leaf.layers or leaf.component == "mtp":
            gathered += size
        elif leaf.group == "embedding" and not (leaf.component == "embedding" and (whole or config.model.head.tied)):
            tables += size
        else:
            once += size
    parts = config.train.grad_accumulation
    gathers = 2 * gathered * passes + once * parts
    yield Traffic(shards, "all-gather", "weights", gathers, ways, 2 * passes * len(learned))
    scattered = gathered * passes + once * parts
    yield Traffic(shards, "reduce-scatter", "gradients", scattered, ways, passes * len(learned))
    if not whole and (tables or config.model.head.tied):
        stream = _tokens(config, sizes) * config.model.d_model * _activation(config)
        yield Traffic(shards, "all-to-all", "embedded tokens", 2 * stream, ways, 2 * parts)
    for experts, size in reduced.items():
        axes, group = _over(sizes, "data") if experts else _over(sizes, "data", "expert")
        yield Traffic(axes, "all-reduce", "gradients", size, group, passes)
    if stages and (tables or once):  # every stage has the embedding and the head
        yield Traffic(stages, "all-reduce", "gradients", (tables + once) / ways, sizes["stage"], 1)


# ---------------------------------------------------------------- the stream over tensor
def _stream(config: RunConfig, sizes: Mapping[str, int], cpu: bool) -> Iterator[Traffic]:
    axes, group = _over(sizes, "tensor")
    item = _tokens(config, sizes) * config.model.d_model * _activation(config)
    passes = _passes(config, sizes) / config.train.grad_accumulation  # of the whole batch
    arrays = 2.0  # embedded tokens forward, the head's input backward
    for count, block in _blocks(config, sizes):
        arrays += count * passes * (_attention_arrays(block, config.model.d_model, cpu) + _mlp_arrays(block.mlp, cpu))
        if block.branch is not None:
            arrays += count * passes * _mlp_arrays(block.branch, cpu)
    size = arrays * item
    times = arrays * config.train.grad_accumulation
    if config.mesh.sequence_parallel:
        yield Traffic(axes, "reduce-scatter", "stream", size, group, times)
        yield Traffic(axes, "all-gather", "stream", size, group, times)
    else:
        yield Traffic(axes, "all-reduce", "stream", size, group, times)


def _attention_arrays(block: Block, d: int, cpu: bool) -> float:
    """All-reduces of the stream by one attention layer, in units of [tokens, d_model]."""
    a = block.attention
    if isinstance(a, LatentAttention):  # latents are whole; what is cut reads them
        query = d if a.q_rank is None else a.q_rank
        return 1 + (query + a.kv_rank) / d
    return 1 + (3 if cpu else 1)


def _mlp_arrays(mlp: Mlp | MoeMlp, cpu: bool) -> float:
    if isinstance(mlp, MoeMlp):
        shared = 0.0 if mlp.shared is None else _mlp_arrays(mlp.shared, cpu)
        return SLACK * mlp.top_k * _mlp_arrays(mlp.expert, cpu) + shared
    return 1 + (2 if cpu and mlp.gated else 1)


# ---------------------------------------------------------------- experts, sequences, stages
def _experts(config: RunConfig, sizes: Mapping[str, int], cpu: bool) -> Iterator[Traffic]:
    axes, group = _over(sizes, "expert")
    parts = config.train.grad_accumulation
    tokens = _tokens(config, sizes) / parts
    exchanges = 4 if config.train.remat == "none" else 6
    for count, block in _blocks(config, sizes):
        for mlp in (block.mlp, block.branch):
            if isinstance(mlp, MoeMlp):
                rows = _slots(tokens * mlp.top_k, group) if cpu else tokens * mlp.top_k
                times = count * exchanges * _passes(config, sizes)
                size = times * rows * config.model.d_model * _activation(config)
                yield Traffic(axes, "all-to-all" if cpu else "ragged-all-to-all", "tokens", size, group, times)


def _slots(picks: float, peers: int) -> float:
    """Slots of the first round, as llamax/model/dispatch.py has them."""
    even = -(-int(SLACK * picks) // peers)
    return peers * min(-(-even // 8) * 8, picks)


def _context(config: RunConfig, sizes: Mapping[str, int], cpu: bool) -> Iterator[Traffic]:
    axes, group = _over(sizes, "context")
    tokens = _tokens(config, sizes) * sizes["context"]
    operand = min(_activation(config), 4 if config.train.compute_dtype == "float32" else 2)
    for count, block in _blocks(config, sizes):
        a = block.attention
        heads = a.kv_heads if isinstance(a, GroupedQueryAttention) else a.heads
        width = heads * (a.head_dim + a.value_dim) / sizes["tensor"]
        times = count * _passes(config, sizes) / config.train.grad_accumulation
        size = times * tokens * width
        yield Traffic(axes, "all-gather", "keys and values", size * operand * (1 if cpu else 2), group, 4 * count)
        yield Traffic(axes, "reduce-scatter", "gradients of keys and values", size * _F32, group, 2 * count)


def _stages(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Traffic]:
    axes, group = _over(sizes, "stage")
    turns = config.train.grad_accumulation + group - 1
    one = _tokens(config, sizes) / config.train.grad_accumulation * config.model.d_model * _activation(config)
    if config.mesh.sequence_parallel:
        one /= sizes["tensor"]
    yield Traffic(axes, "collective-permute", "stream", 2 * turns * one, group, 2 * turns)
