"""The component unions: one small object an axis of ablation, carrying only its own parameters.

Each union is discriminated by `kind`. A component that changes how a block computes goes here and in
`llamax/model/`; nothing else needs to know of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llamax.config.base import Frozen
from llamax.config.rotary import RopeScaling

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


# ---------------------------------------------------------------- norm
class RMSNorm(Frozen):
    """Root-mean-square norm (arXiv:1910.07467).

    `weight`: `one` multiplies by a learned w that starts at 1, after rounding to the input's type (Llama); `one_plus`
    by 1 + w, w starting at 0, in float32 (Gemma); `none` by nothing (the L2 norm of Llama 4's queries and keys).
    """

    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: PositiveFloat = 1e-5
    weight: Literal["one", "one_plus", "none"] = "one"


class LayerNorm(Frozen):
    """Mean and variance norm with a learned scale and, if `bias`, an offset (arXiv:1607.06450)."""

    kind: Literal["layernorm"] = "layernorm"
    eps: PositiveFloat = 1e-5
    bias: bool = True


class NoNorm(Frozen):
    """The identity."""

    kind: Literal["none"] = "none"


Norm = Annotated[RMSNorm | LayerNorm | NoNorm, Field(discriminator="kind")]


# ---------------------------------------------------------------- position
RotaryLayout = Literal["half", "interleaved"]


class Rope(Frozen):
    """Rotary embedding on the first `fraction` of every head (arXiv:2104.09864).

    `layout` says which dimensions turn together: `half` i with i + half (transformers), `interleaved` 2i with 2i + 1
    (the paper, Meta's own weights, Cohere, DeepSeek).
    """

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10000.0
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    layout: RotaryLayout = "half"
    scaling: RopeScaling | None = None


class Learned(Frozen):
    """A learned vector a position, added to the token embedding (GPT-2)."""

    kind: Literal["learned"] = "learned"


class Sinusoidal(Frozen):
    """Fixed sines and cosines added to the token embedding (arXiv:1706.03762)."""

    kind: Literal["sinusoidal"] = "sinusoidal"


class Alibi(Frozen):
    """A linear penalty on distance, one slope a head, added to the attention logits (arXiv:2108.12409)."""

    kind: Literal["alibi"] = "alibi"


class Nope(Frozen):
    """No position signal: the causal mask alone (arXiv:2305.19466)."""

    kind: Literal["nope"] = "nope"


Position = Annotated[Rope | Learned | Sinusoidal | Alibi | Nope, Field(discriminator="kind")]


# ---------------------------------------------------------------- attention
class Temperature(Frozen):
    """Queries multiplied by 1 + scale ln(1 + floor((position + 1) / floor)) (Llama 4's NoPE layers; after scalable
    softmax, arXiv:2501.19399)."""

    scale: PositiveFloat = 0.1
    floor: PositiveInt = 8192


class BlockSparse(Frozen):
    """Which blocks of `size` keys a query sees (Phi-3-small, arXiv:2404.14219): its own, the `local` - 1 before it, and
    of the older ones every `stride`-th.

    Head h sees the older block j where j + 1 + h x step is a multiple of `stride`. `heads`: with `shifted` the step is
    max(1, stride // heads), which spreads the heads over the blocks; with `alike` it is 0.
    """

    size: PositiveInt
    local: PositiveInt
    stride: PositiveInt
    heads: Literal["shifted", "alike"] = "shifted"

    def remainders(self, heads: int) -> tuple[int, ...]:
        """Of each of `heads` heads, the remainder modulo `stride` of the older blocks it sees."""
        step = max(1, self.stride // heads) if self.heads == "shifted" else 0
        return tuple((-1 - h * step) % self.stride for h in range(heads))


class GroupedQueryAttention(Frozen):
    """Softmax attention with `kv_heads` shared by groups of query heads (arXiv:2305.13245).

    `kv_heads = heads` is multi-head, `kv_heads = 1` multi-query. `window` counts keys, the query's own included
    (Mistral); `chunk` lets a query see its own block of `chunk` positions, no further back (Llama 4); `block_sparse`
    lets it see near blocks and some of the far ones, others by head; `softcap` caps the logits at
    cap * tanh(logit / cap) before the mask (Gemma 2); `scale` defaults to head_dim ** -0.5; `clip` clamps queries, keys
    and values to [-clip, clip] before anything else (DBRX); `temperature` sharpens far queries (Llama 4).

    `qk_norm` normalizes queries and keys over head_dim, `before` the rotary (Qwen 3, arXiv:2302.05442) or `after` it
    (Llama 4), with weights `shared` by the heads or one set `per_head` (Command R+).
    """

    kind: Literal["gqa"] = "gqa"
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    window: PositiveInt | None = None
    chunk: PositiveInt | None = None
    block_sparse: BlockSparse | None = None
    softcap: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    clip: PositiveFloat | None = None
    temperature: Temperature | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_weights: Literal["shared", "per_head"] = "shared"
    qk_norm_place: Literal["before", "after"] = "before"

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return self.head_dim

    @property
    def rotary_width(self) -> int:
        """The dimensions of a head that a rotary embedding may turn."""
        return self.head_dim

    @model_validator(mode="after")
    def _groups(self) -> GroupedQueryAttention:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; choose a divisor of heads"
            )
        masks = {name: getattr(self, name) for name in ("window", "chunk", "block_sparse")}
        given = [
            f"{name}={value.as_dict() if isinstance(value, Frozen) else value}"
            for name, value in masks.items()
            if value is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        return self


class Indexer(Frozen):
    """DeepSeek sparse attention's lightning indexer: `heads` small heads choose `top_k` keys a query (DeepSeek-V3.2).

    Its rotary dimensions come first in a head, as many as the attention's, in a `layout` of its own.
    """

    heads: PositiveInt
    head_dim: PositiveInt
    top_k: PositiveInt
    layout: RotaryLayout = "half"
    norm: LayerNorm = LayerNorm(eps=1e-6)


class LatentAttention(Frozen):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    Keys and values are read from one normed latent of width `kv_rank`, queries from one of `q_rank` (null: straight
    from the stream); one key part of `rope_dim`, shared by the heads, carries the position. A query or key head is
    [nope_dim | rope_dim]. `indexer` makes the attention sparse.
    """

    kind: Literal["mla"] = "mla"
    heads: PositiveInt
    q_rank: PositiveInt | None = None
    kv_rank: PositiveInt
    nope_dim: PositiveInt
    rope_dim: PositiveInt
    value_dim: PositiveInt
    scale: PositiveFloat | None = None
    norm: RMSNorm = RMSNorm(eps=1e-6)
    indexer: Indexer | None = None

    @property
    def head_dim(self) -> int:
        """Width of a query or key head."""
        return self.nope_dim + self.rope_dim

    @property
    def rotary_width(self) -> int:
        """The dimensions of a head that a rotary embedding may turn."""
        return self.rope_dim

    @model_validator(mode="after")
    def _indexer(self) -> LatentAttention:
        if self.indexer is not None and self.q_rank is None:
            raise ValueError("indexer reads the query latent and q_rank is null; give q_rank, or set indexer=null")
        if self.indexer is not None and self.indexer.head_dim < self.rope_dim:
            raise ValueError(
                f"indexer.head_dim={self.indexer.head_dim} is smaller than rope_dim={self.rope_dim}; raise head_dim"
            )
        return self


Attention = Annotated[GroupedQueryAttention | LatentAttention, Field(discriminator="kind")]


# ---------------------------------------------------------------- mlp
class DenseMlp(Frozen):
    """Feed-forward block of width `d_ff`. The `*glu` kinds have a gate (arXiv:2002.05202); relu2 is squared ReLU.

    Of the gated kinds, quick_geglu takes x sigmoid(1.702 x) for GELU (arXiv:1606.08415); `limit` clamps the gate to at
    most `limit` before the nonlinearity, and what it multiplies to [-limit, limit]; `linear` multiplies by that (`one`)
    or by 1 + that (`one_plus`). All three together are Phi-3-small's GEGELU.
    """

    kind: Literal["swiglu", "geglu", "quick_geglu", "reglu", "relu2", "gelu", "silu"]
    d_ff: PositiveInt
    bias: bool = False
    limit: PositiveFloat | None = None
    linear: Literal["one", "one_plus"] = "one"

    @property
    def gated(self) -> bool:
        """Whether a second input projection gates the first."""
        return self.kind in ("swiglu", "geglu", "quick_geglu", "reglu")

    @model_validator(mode="after")
    def _gate(self) -> DenseMlp:
        if not self.gated and (self.limit is not None or self.linear != "one"):
            raise ValueError(
                f"kind={self.kind} has no gate for limit={self.limit} and linear={self.linear}; "
                "choose a *glu kind, or set limit=null and linear=one"
            )
        return self


class ExpertGroups(Frozen):
    """Experts in `count` equal groups of which a token uses `keep`, chosen by the `max` score in a group (DeepSeek-V2)
    or by the sum of its `top2` (DeepSeek-V3)."""

    count: PositiveInt
    keep: PositiveInt
    by: Literal["max", "top2"] = "top2"

    @model_validator(mode="after")
    def _keep(self) -> ExpertGroups:
        if self.keep > self.count:
            raise ValueError(f"keep={self.keep} is larger than count={self.count}; lower keep")
        return self


class Router(Frozen):
    """How experts are scored, chosen and weighed; all in float32.

    `score`: `softmax` over all experts (Mixtral), `sigmoid` of each (DeepSeek-V3, Llama 4), or `sparsemixer`: top-2
    by masked softmaxes within `jitter` of the winner (arXiv:2310.00811, Phi-3.5-MoE), which takes no other option.
    `normalize` divides the chosen scores by their sum (for softmax the same as a softmax after the choice); then they
    are multiplied by `scale`. `bias` adds a learned-by-rule offset to the scores for the choice alone, which balances
    load without a loss (arXiv:2408.15664). `groups` limits the choice to some groups of experts. `weigh` multiplies
    the experts' `output`, or their `input` (Llama 4).
    """

    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalize: bool = True
    scale: PositiveFloat = 1.0
    bias: bool = False
    groups: ExpertGroups | None = None
    weigh: Literal["output", "input"] = "output"
    jitter: PositiveFloat = 0.01

    @model_validator(mode="after")
    def _sparsemixer(self) -> Router:
        if self.score == "sparsemixer" and (self.normalize or self.bias or self.groups or self.scale != 1.0):
            raise ValueError(
                "score=sparsemixer makes its own weights; set normalize=false, bias=false, groups=null, scale=1"
            )
        return self


class MoeMlp(Frozen):
    """Mixture of `experts` feed-forward blocks, `top_k` a token (arXiv:2401.04088). Dropless.

    `shared`, if given, is a dense block every token also passes through (DeepSeekMoE, arXiv:2401.06066), multiplied by
    the sigmoid of a learned score of the token where `shared_gate` is set (Qwen1.5-MoE).
    """

    kind: Literal["moe"]
    experts: PositiveInt
    top_k: PositiveInt
    expert: DenseMlp
    router: Router = Router()
    shared: DenseMlp | None = None
    shared_gate: bool = False

    @model_validator(mode="after")
    def _choice(self) -> MoeMlp:
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is larger than experts={self.experts}; lower top_k")
        if self.expert.bias:
            raise ValueError(
                "expert.bias=true is not supported: experts are bias-free grouped matmuls; set expert.bias=false"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate=true needs a shared expert; give shared or set shared_gate=false")
        if self.router.score == "sparsemixer" and self.top_k != 2:
            raise ValueError(f"router.score=sparsemixer chooses two experts; set top_k=2, not {self.top_k}")
        groups = self.router.groups
        if groups is not None and self.experts % groups.count:
            raise ValueError(
                f"experts={self.experts} do not divide into router.groups.count={groups.count} groups; change one"
            )
        if groups is not None and self.top_k > groups.keep * (self.experts // groups.count):
            raise ValueError(
                f"top_k={self.top_k} is more than router.groups.keep={groups.keep} groups hold; lower top_k"
            )
        return self


Mlp = Annotated[DenseMlp | MoeMlp, Field(discriminator="kind")]


# ---------------------------------------------------------------- initialization
class Init(Frozen):
    """How weights start. `normal`: std everywhere; `fan_in`: std = 1/sqrt(fan_in) a matrix, a tied embedding as the
    head it also is (1/sqrt(d_model)); other embeddings keep `std`.

    `depth_scaling` shrinks the matrices that write to the residual stream: `total` by 1/sqrt(2 L) (GPT-2), `layer` by
    1/sqrt(2 (l + 1)) at layer l (arXiv:1908.11365), `none` not at all.
    """

    kind: Literal["normal", "fan_in"] = "normal"
    std: PositiveFloat = 0.02
    depth_scaling: Literal["none", "total", "layer"] = "total"
