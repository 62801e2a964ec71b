"""Normalization layers over the last axis, statistics in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llamax.config.components import LayerNorm, NoNorm, RMSNorm
from llamax.model.linear import parameter


class Normalize(nnx.Module):
    """RMSNorm (arXiv:1910.07467), LayerNorm (arXiv:1607.06450) or the identity over a last axis of `width`."""

    def __init__(self, config: RMSNorm | LayerNorm | NoNorm, width: int, axis: str = "embed"):
        self.config = config
        if not isinstance(config, NoNorm):
            self.scale = parameter(jnp.ones(width), (axis,), "norm")
        if isinstance(config, LayerNorm) and config.bias:
            self.bias = parameter(jnp.zeros(width), (axis,), "norm")

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        """Normalized x, same shape and dtype."""
        if isinstance(self.config, NoNorm):
            return x
        wide = x.astype(jnp.float32)
        if isinstance(self.config, LayerNorm):
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.config.eps)
        out = wide.astype(x.dtype) * self.scale.astype(x.dtype)
        return out + self.bias.astype(x.dtype) if isinstance(self.config, LayerNorm) and self.config.bias else out
