"""Parameters by component, from the config alone.

`leaves` lists every array the model holds; counts, optimizer memory and the tests' comparison with the real model all
read that one list. Multi-token prediction modules and router biases are in the list and apart in the counts: published
totals leave both out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llamax.config.components import (
    DenseMlp,
    GroupedQueryAttention,
    Indexer,
    LatentAttention,
    LayerNorm,
    MoeMlp,
    NoNorm,
    Norm,
    RMSNorm,
)
from llamax.config.model import Block, ModelConfig

Component = Literal["embedding", "position", "attention", "mlp", "router", "experts", "shared", "norm", "head", "mtp"]
COMPONENTS: tuple[Component, ...] = (
    "embedding",
    "position",
    "attention",
    "mlp",
    "router",
    "experts",
    "shared",
    "norm",
    "head",
)


@dataclass(frozen=True)
class Leaf:
    """One parameter array of the model: `shape`, stacked over `layers` blocks of one kind (0: not stacked).

    `name` is its path in llamax/model; `group` the optimizer's (embedding, head, matrix, router, norm, bias), or
    `buffer` for state that a rule moves and no gradient does; `component` `mtp` for all of a prediction module;
    `inputs` counts the axes a matrix product contracts, after a leading experts axis; a token uses `chosen` of the
    `experts`.
    """

    name: str
    component: Component
    group: str
    shape: tuple[int, ...]
    inputs: int = 0
    layers: int = 0
    experts: int = 0
    chosen: int = 0

    @property
    def size(self) -> int:
        """Elements, all layers and experts."""
        return max(self.layers, 1) * math.prod(self.shape)

    @property
    def active(self) -> int:
        """Elements one token passes through: top_k of E experts, everything elsewhere."""
        return self.size * self.chosen // self.experts if self.experts else self.size

    @property
    def sides(self) -> tuple[int, int]:
        """One matrix as (inputs, outputs), a lookup table as (rows, columns); (1, elements) for a vector."""
        one = self.shape[1:] if self.experts else self.shape
        split = 1 if self.group == "embedding" else self.inputs
        return math.prod(one[:split]), math.prod(one[split:])


@dataclass(frozen=True)
class Params:
    """Parameter counts. Each field counts scalars stored, all layers together, biases with the matrix they belong to.

    `attention` includes QK norms, latent norms and the indexer; `experts` counts all E routed experts; `shared` the
    shared experts and their gate; `norm` the block and final norms; `head` the untied output matrix (0 when tied) and
    its bias. `routed_active` is the part of `experts` one token uses; `lookup` the part of `embedding` and `position`
    that is only looked up, never multiplied.

    Outside every sum: `mtp`, the multi-token prediction modules without the embedding and head they share, and
    `buffers`, the elements of the router biases (those of `mtp` left out).
    """

    embedding: int
    position: int
    attention: int
    mlp: int
    router: int
    experts: int
    shared: int
    norm: int
    head: int
    routed_active: int
    lookup: int
    mtp: int = 0
    buffers: int = 0

    @property
    def by_component(self) -> dict[str, int]:
        """The nine components, in the order data flows through them."""
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def total(self) -> int:
        """Every stored parameter; a tied table counts once."""
        return sum(self.by_component.values())

    @property
    def active(self) -> int:
        """What one token passes through: total with top_k of the E routed experts."""
        return self.total - self.experts + self.routed_active

    @property
    def active_matmul(self) -> int:
        """N, the model size of every plan and fit: `active` without tables that are only looked up.

        A tied embedding stays, because it is the output matrix; an untied one and a learned position table go.
        """
        return self.active - self.lookup

    @property
    def non_embedding(self) -> int:
        """Kaplan's N (arXiv:2001.08361): total without embedding, positions and output matrix, all experts counted."""
        return self.total - self.embedding - self.position - self.head


def count_params(model: ModelConfig) -> Params:
    """Parameters of `model` by component."""
    rows = list(leaves(model))
    learned = [leaf for leaf in rows if leaf.group != "buffer"]
    counts = {name: sum(leaf.size for leaf in learned if leaf.component == name) for name in COMPONENTS}
    routed = sum(leaf.active for leaf in learned if leaf.component == "experts")
    lookup = counts["position"] + (0 if model.head.tied else counts["embedding"])
    mtp = sum(leaf.size for leaf in learned if leaf.component == "mtp")
    buffers = sum(leaf.size for leaf in rows if leaf.group == "buffer" and leaf.component != "mtp")
    return Params(**counts, routed_active=routed, lookup=lookup, mtp=mtp, buffers=buffers)


def leaves(model: ModelConfig) -> Iterator[Leaf]:
    """Every parameter array and buffer of `model` as llamax/model lays it out."""
    d, vocab = model.d_model, model.vocab_size
    yield Leaf("embedding", "embedding", "embedding", (vocab, d))
    if model.position.kind == "learned":
        yield Leaf("position", "position", "embedding", (model.max_seq_len, d))
    for s, (repeat, unit) in enumerate(model.blocks):
        for u, block in enumerate(unit):
            for leaf in _block(block, d):
                yield replace(leaf, name=f"stacks.{s}.blocks.{u}.{leaf.name}", layers=repeat)
    yield from _norm("norm", "norm", model.norm, (d,))
    if not model.head.tied:
        yield Leaf("head", "head", "head", (d, vocab), inputs=1)
    if model.head.bias:
        yield Leaf("head_bias", "head", "bias", (vocab,))
    for k in range(model.mtp):
        for leaf in _mtp(model, d):
            yield replace(leaf, name=f"mtp.{k}.{leaf.name}", component="mtp")


def _mtp(model: ModelConfig, d: int) -> Iterator[Leaf]:
    """One prediction module: [norm of an embedding | norm of the stream] projected to d, a last block, a norm."""
    for name in ("embed_norm", "stream_norm", "norm"):
        yield from _norm(name, "norm", model.norm, (d,))
    yield Leaf("project", "mtp", "matrix", (2 * d, d), inputs=1)
    for leaf in _block(model.layers[-1], d):
        yield replace(leaf, name=f"block.{leaf.name}")


def _block(block: Block, d: int) -> Iterator[Leaf]:
    for name in _norm_names(block):
        yield from _norm(name, "norm", block.norm, (d,))
    if isinstance(block.attention, LatentAttention):
        yield from _latent(block.attention, d)
    else:
        yield from _grouped(block.attention, d)
    if isinstance(block.mlp, DenseMlp):
        yield from _dense("mlp", "mlp", block.mlp, d)
    else:
        yield from _moe("mlp", block.mlp, d)
    if block.branch is not None:
        yield from _moe("branch", block.branch, d)


def _norm_names(block: Block) -> tuple[str, ...]:
    """One norm a sublayer before (pre) or after (post) it, both for sandwich; a parallel block shares one."""
    if block.residual == "parallel":
        return ("attention_norm",)
    if block.placement == "sandwich":
        return ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")
    return ("attention_norm", "mlp_norm", *(("branch_norm",) if block.branch is not None else ()))


def _norm(name: str, component: Component, norm: Norm, shape: tuple[int, ...]) -> Iterator[Leaf]:
    if isinstance(norm, NoNorm) or (isinstance(norm, RMSNorm) and norm.weight == "none"):
        return
    yield Leaf(f"{name}.scale", component, "norm", shape)
    if isinstance(norm, LayerNorm) and norm.bias:
        yield Leaf(f"{name}.bias", component, "norm", shape)


def _grouped(a: GroupedQueryAttention, d: int) -> Iterator[Leaf]:
    for name, heads in (("query", a.heads), ("key", a.kv_heads), ("value", a.kv_heads)):
        yield Leaf(f"attention.{name}", "attention", "matrix", (d, heads, a.head_dim), inputs=1)
        if a.qkv_bias:
            yield Leaf(f"attention.{name}_bias", "attention", "bias", (heads, a.head_dim))
    yield Leaf("attention.out", "attention", "matrix", (a.heads, a.head_dim, d), inputs=2)
    if a.out_bias:
        yield Leaf("attention.out_bias", "attention", "bias", (d,))
    if a.qk_norm is not None:
        for name, heads in (("query_norm", a.heads), ("key_norm", a.kv_heads)):
            own = (heads,) if a.qk_norm_weights == "per_head" else ()
            yield from _norm(f"attention.{name}", "attention", a.qk_norm, (*own, a.head_dim))


def _latent(a: LatentAttention, d: int) -> Iterator[Leaf]:
    if a.q_rank is None:
        yield _matrix("query", (d, a.heads, a.head_dim))
    else:
        yield _matrix("q_down", (d, a.q_rank))
        yield from _norm("attention.q_norm", "attention", a.norm, (a.q_rank,))
        yield _matrix("q_up", (a.q_rank, a.heads, a.head_dim))
    yield _matrix("kv_down", (d, a.kv_rank + a.rope_dim))
    yield from _norm("attention.kv_norm", "attention", a.norm, (a.kv_rank,))
    yield _matrix("kv_up", (a.kv_rank, a.heads, a.nope_dim + a.value_dim))
    yield _matrix("out", (a.heads, a.value_dim, d), inputs=2)
    if a.indexer is not None and a.q_rank is not None:
        yield from _indexer(a.indexer, a.q_rank, d)


def _indexer(indexer: Indexer, q_rank: int, d: int) -> Iterator[Leaf]:
    yield _matrix("indexer.query", (q_rank, indexer.heads, indexer.head_dim))
    yield _matrix("indexer.key", (d, indexer.head_dim))
    yield from _norm("attention.indexer.key_norm", "attention", indexer.norm, (indexer.head_dim,))
    yield _matrix("indexer.weights", (d, indexer.heads))


def _matrix(name: str, shape: tuple[int, ...], inputs: int = 1) -> Leaf:
    return Leaf(f"attention.{name}", "attention", "matrix", shape, inputs=inputs)


def _moe(name: str, mlp: MoeMlp, d: int) -> Iterator[Leaf]:
    yield Leaf(f"{name}.router", "router", "router", (d, mlp.experts), inputs=1)
    if mlp.router.bias:
        yield Leaf(f"{name}.router_bias", "router", "buffer", (mlp.experts,))
    for leaf in _dense(name, "experts", mlp.expert, d):
        yield replace(leaf, shape=(mlp.experts, *leaf.shape), experts=mlp.experts, chosen=mlp.top_k)
    if mlp.shared is not None:
        yield from _dense(f"{name}.shared", "shared", mlp.shared, d)
    if mlp.shared_gate:
        yield Leaf(f"{name}.shared_gate", "shared", "router", (d, 1), inputs=1)


def _dense(name: str, component: Component, mlp: DenseMlp, d: int) -> Iterator[Leaf]:
    parts = ("up", "gate") if mlp.gated else ("up",)
    for part, shape in [*((part, (d, mlp.d_ff)) for part in parts), ("down", (mlp.d_ff, d))]:
        yield Leaf(f"{name}.{part}", component, "matrix", shape, inputs=1)
        if mlp.bias:
            yield Leaf(f"{name}.{part}_bias", component, "bias", shape[1:])
