"""Scalings of a rotary embedding: how one trained on short sequences turns in long ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from llamax.config.base import Frozen


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


class RopeLongrope(Frozen):
    """LongRoPE: every frequency divided by a searched factor of its own (arXiv:2402.13753, Phi-3).

    `long` serves whole sequences of more than `original_max_len` tokens, `short` the others; each has one entry a
    frequency. cos and sin are multiplied by sqrt(1 + ln(factor) / ln(original_max_len)) in both cases, or by
    `short_mscale` and `long_mscale` where those are given (Phi-3-small).
    """

    kind: Literal["longrope"] = "longrope"
    short: tuple[PositiveFloat, ...] = Field(min_length=1)
    long: tuple[PositiveFloat, ...] = Field(min_length=1)
    original_max_len: Annotated[int, Field(gt=1)]
    factor: Annotated[float, Field(ge=1.0)]
    short_mscale: PositiveFloat | None = None
    long_mscale: PositiveFloat | None = None

    @field_validator("short", "long", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _lengths(self) -> RopeLongrope:
        if len(self.short) != len(self.long):
            raise ValueError(f"short has {len(self.short)} factors and long {len(self.long)}; give one a frequency")
        return self


RopeScaling = Annotated[RopeLinear | RopeLlama3 | RopeYarn | RopeLongrope, Field(discriminator="kind")]
