"""Normalization layers over the last axis, statistics in float32."""

from __future__ import annotations

import functools

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
        if isinstance(config, LayerNorm):  # rounded once, after the weights, as torch and Cohere do
            wide = x.astype(jnp.float32)
            wide = wide - wide.mean(-1, keepdims=True)
            wide = wide * _inverse_rms(wide, config.eps) * self.scale.astype(jnp.float32)
            return (wide + self.bias.astype(jnp.float32) if config.bias else wide).astype(x.dtype)
        if config.weight == "none":
            return rms_norm(x, None, config.eps, False)
        if config.weight == "one_plus":
            return rms_norm(x, 1.0 + self.scale.astype(jnp.float32), config.eps, False)
        return rms_norm(x, self.scale[...], config.eps, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "*lead width"], weight: Float[Array, "*own width"] | None, eps: float, rounded: bool
) -> Float[Array, "*lead width"]:
    """x / sqrt(mean(x^2) + eps) times `weight` (arXiv:1910.07467), rounded once; with `rounded` before the weight too.

    The backward rule is dx = r (d - r^2 x mean(d x)), r = 1 / sqrt(mean(x^2) + eps) and d the cotangent times the
    weight. It forms r again: if it read the forward pass's, a GPU would not write that in one kernel.
    """
    wide = x.astype(jnp.float32)
    unit = wide * _inverse_rms(wide, eps)
    if weight is None:
        return unit.astype(x.dtype)
    if rounded:
        return unit.astype(x.dtype) * weight.astype(x.dtype)
    return (unit * weight.astype(jnp.float32)).astype(x.dtype)


def _inverse_rms(x: Float[Array, "*lead width"], eps: float) -> Float[Array, "*lead 1"]:
    return jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def _rms_norm_forward(x, weight, eps, rounded):  # type: ignore[no-untyped-def]
    return rms_norm(x, weight, eps, rounded), (x, weight)


def _rms_norm_backward(eps, rounded, saved, g):  # type: ignore[no-untyped-def]
    x, weight = saved
    # Else the compiler finds that the forward pass has it, and keeps it (benchmarks/notes.md, "Norms in one kernel").
    x = jax.lax.platform_dependent(x, cuda=jax.lax.optimization_barrier, default=lambda x: x)
    wide = x.astype(jnp.float32)
    inverse = _inverse_rms(wide, eps)
    d_unit, d_weight = g.astype(jnp.float32), None
    if weight is not None:
        lead = tuple(range(g.ndim - weight.ndim))
        if rounded:
            d_weight = (g * (wide * inverse).astype(g.dtype)).astype(jnp.float32).sum(lead)
            d_unit = (g * weight.astype(g.dtype)).astype(jnp.float32)
        else:
            d_weight = (d_unit * wide * inverse).sum(lead)
            d_unit = d_unit * weight.astype(jnp.float32)
        d_weight = d_weight.astype(weight.dtype)
    mean = jnp.mean(d_unit * wide, -1, keepdims=True)  # before `inverse` is known, so that one loop sums for both
    return (inverse * (d_unit - wide * (inverse * inverse * mean))).astype(x.dtype), d_weight


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
