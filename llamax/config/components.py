"""The component unions: one small object an axis of ablation, carrying only its own parameters.

Each union is discriminated by `kind`. A component that changes how a block computes goes here and in
`llamax/model/`; nothing else needs to know of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llamax.config.base import Frozen

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


# ---------------------------------------------------------------- norm
class RMSNorm(Frozen):
    """Root-mean-square norm with a learned scale (arXiv:1910.07467)."""

    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: PositiveFloat = 1e-5


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
class RopeLinear(Frozen):
    """Position interpolation: every frequency divided by `factor` (arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat


class RopeLlama3(Frozen):
    """Llama 3.1's piecewise scaling: long wavelengths divided by `factor`, short ones kept (arXiv:2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_len: PositiveInt = 8192


class RopeYarn(Frozen):
    """YaRN: NTK-by-parts interpolation and a temperature on the attention logits (arXiv:2309.00071).

    Without the `mscale` pair cos and sin are multiplied by 0.1 ln(factor) + 1; with it by
    m(mscale)/m(mscale_all_dim), m(a) = 0.1 a ln(factor) + 1, as DeepSeek-V2 does.
    """

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_max_len: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @model_validator(mode="after")
    def _pair(self) -> RopeYarn:
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(f"mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim}: give both or neither")
        return self


RopeScaling = Annotated[RopeLinear | RopeLlama3 | RopeYarn, Field(discriminator="kind")]


class Rope(Frozen):
    """Rotary embedding on the first `fraction` of every head, half-split layout (arXiv:2104.09864)."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10000.0
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
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
class GroupedQueryAttention(Frozen):
    """Softmax attention with `kv_heads` shared by groups of query heads (arXiv:2305.13245).

    `kv_heads = heads` is multi-head, `kv_heads = 1` multi-query. `window` counts keys, the query's own included
    (Mistral); `softcap` caps the logits at cap * tanh(logit / cap) before the mask (Gemma 2); `scale` defaults to
    head_dim ** -0.5; `qk_norm` normalizes queries and keys over head_dim before the rotary (Qwen 3).
    """

    kind: Literal["gqa"] = "gqa"
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    window: PositiveInt | None = None
    softcap: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None

    @model_validator(mode="after")
    def _groups(self) -> GroupedQueryAttention:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; choose a divisor of heads"
            )
        return self


Attention = GroupedQueryAttention


# ---------------------------------------------------------------- mlp
class DenseMlp(Frozen):
    """Feed-forward block of width `d_ff`. The `*glu` kinds have a gate (arXiv:2002.05202); relu2 is squared ReLU."""

    kind: Literal["swiglu", "geglu", "reglu", "relu2", "gelu", "silu"]
    d_ff: PositiveInt
    bias: bool = False

    @property
    def gated(self) -> bool:
        """Whether a second input projection gates the first."""
        return self.kind in ("swiglu", "geglu", "reglu")


class MoeMlp(Frozen):
    """Mixture of `experts` feed-forward blocks, `top_k` a token, weights renormalized over the chosen (Mixtral,
    arXiv:2401.04088).

    Dropless. `shared`, if given, is a dense block every token also passes through.
    """

    kind: Literal["moe"]
    experts: PositiveInt
    top_k: PositiveInt
    expert: DenseMlp
    shared: DenseMlp | None = None

    @model_validator(mode="after")
    def _top_k(self) -> MoeMlp:
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is larger than experts={self.experts}; lower top_k")
        if self.expert.bias:
            raise ValueError(
                "expert.bias=true is not supported: experts are bias-free grouped matmuls; set expert.bias=false"
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
