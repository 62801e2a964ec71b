"""Normalization layers over the last axis, statistics in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llamax.config.components import LayerNorm, NoNorm, RMSNorm
from llamax.model.linear import parameter


class Normalize(nnx.Module):
    """RMSNorm (arXiv:1910.07467), LayerNorm (arXiv:1607.06450) or the identity over the last axis of `shape`.

    `shape` is the weights': a width, or (heads, width) for weights that differ by head (Command R+).
    """

    def __init__(
        self,
        config: RMSNorm | LayerNorm | NoNorm,
        shape: int | tuple[int, ...],
        axes: tuple[str, ...] = ("embed",),
    ):
        self.config = config
        if isinstance(config, LayerNorm) or (isinstance(config, RMSNorm) and config.weight == "one"):
            self.scale = parameter(jnp.ones(shape), axes, "norm")
        elif isinstance(config, RMSNorm) and config.weight == "one_plus":
            self.scale = parameter(jnp.zeros(shape), axes, "norm")
        if isinstance(config, LayerNorm) and config.bias:
            self.bias = parameter(jnp.zeros(shape), axes, "norm")

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        """Normalized x, same shape and dtype."""
        config = self.config
        if isinstance(config, NoNorm):
            return x
        wide = x.astype(jnp.float32)
        if isinstance(config, LayerNorm):
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + config.eps)
        if isinstance(config, LayerNorm):  # rounded once, after the weights, as torch and Cohere do
            wide = wide * self.scale.astype(jnp.float32)
            return (wide + self.bias.astype(jnp.float32) if config.bias else wide).astype(x.dtype)
        if config.weight == "one_plus":
            wide = wide * (1.0 + self.scale.astype(jnp.float32))
        out = wide.astype(x.dtype)
        return out * self.scale.astype(x.dtype) if config.weight == "one" else out
