"""How the model is run, as opposed to what it is: number formats, rematerialization, unrolling, placement."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llamax.model.exchange import TokenAxes
from llamax.model.linear import DOT


class Execution(NamedTuple):
    """Static choices that change speed and memory but not the function computed.

    `compute` is the operand type of matrix products (accumulated in float32), `activation` the type of the residual
    stream, `remat` what the backward pass recomputes, `unroll` straight code in place of the scan over layers,
    `residual` the sharding the residual stream [batch, seq, d_model] is held to, `kernels` the names of those in
    kernels.py that may stand in for a reference, `tokens` the mesh axes that cut tokens: a
    mixture then routes every device's own.
    """

    compute: Literal["float32", "bfloat16", "float8"] = "float32"
    activation: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: bool = False
    residual: NamedSharding | None = None
    kernels: tuple[str, ...] = ()
    tokens: TokenAxes | None = None

    @property
    def plain(self) -> Literal["float32", "bfloat16"]:
        """The operand type of the products that `compute=float8` leaves in bfloat16: attention, head, experts."""
        return "bfloat16" if self.compute == "float8" else self.compute

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of the residual stream."""
        return jnp.dtype(self.activation)

    def checkpoint(self, function):  # type: ignore[no-untyped-def]
        """`function` rematerialized as `remat` asks."""
        if self.remat == "none":
            return function
        policy = jax.checkpoint_policies.save_only_these_names(DOT) if self.remat == "dots" else None
        return jax.checkpoint(function, policy=policy)

    def place(self, x: jax.Array) -> jax.Array:
        """The residual stream held to its sharding, if one is asked for."""
        return x if self.residual is None else jax.lax.with_sharding_constraint(x, self.residual)
