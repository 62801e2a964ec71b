"""One decoder block.

pre, sequential                             pre, parallel             sandwich (a sublayer)       post (a sublayer)
x ──┬─ norm ─ attn ─ + ─┬─ norm ─ mlp ─ +   x ─┬─ norm ─┬─ attn ─ +   x ─┬─ norm ─ f ─ norm ─ +   x ─┬─ f ─ + ─ norm
    └────────────────┘  └───────────────┘      │        └─ mlp ── +      └────────────────────┘      └──────┘
                                               └───────────────── ┘
with a branch (Snowflake Arctic)
x ─┬┬─ norm ─ attn ─ + ─┬─ norm ─ mlp ─ + ─ +
   │└────────────────┘  └───────────────┘   │
   └─ norm ─ moe ───────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.components import Init, MoeMlp
from llamax.config.model import Block
from llamax.model.attention import SelfAttention
from llamax.model.cache import LayerCache, Slot, Step
from llamax.model.execution import Execution
from llamax.model.linear import residual_gain
from llamax.model.mla import MultiHeadLatentAttention
from llamax.model.mlp import FeedForward
from llamax.model.moe import MixtureOfExperts
from llamax.model.norm import Normalize
from llamax.model.statistics import Statistics

Aside = TypeVar("Aside")


ATTENTIONS: dict[str, Any] = {"gqa": SelfAttention, "mla": MultiHeadLatentAttention}  # by the config's kind


class DecoderBlock(nnx.Module):
    """Attention and a feed-forward block around the residual stream, placed as `config` says."""

    def __init__(
        self, config: Block, d_model: int, init: Init, layers: int, *, layer: Int[Array, ""], key: Key[Array, ""]
    ):
        keys = jax.random.split(key)
        gain = residual_gain(init, layer, layers)
        self.config = config
        self.attention: SelfAttention | MultiHeadLatentAttention = ATTENTIONS[config.attention.kind](
            config.attention, config.position, d_model, init, gain, key=keys[0]
        )
        if isinstance(config.mlp, MoeMlp):
            self.mlp: MixtureOfExperts | FeedForward = MixtureOfExperts(config.mlp, d_model, init, gain, key=keys[1])
        else:
            self.mlp = FeedForward(config.mlp, d_model, init, gain, key=keys[1])
        self.attention_norm = Normalize(config.norm, d_model)
        if config.residual == "sequential":
            self.mlp_norm = Normalize(config.norm, d_model)
        if config.placement == "sandwich":
            self.attention_out_norm = Normalize(config.norm, d_model)
            self.mlp_out_norm = Normalize(config.norm, d_model)
        if config.branch is not None:
            # A key of its own, so that a block with a branch otherwise starts as one without.
            self.branch = MixtureOfExperts(config.branch, d_model, init, gain, key=jax.random.fold_in(keys[1], 1))
            self.branch_norm = Normalize(config.norm, d_model)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        table: Float[Array, "2 seq half"] | None,
        segments: Int[Array, "batch seq"] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], Statistics]:
        """(the residual stream after this block, what its parts report by part: attention, mlp, branch)."""
        out, statistics, parts = self._around(x, lambda y: self.attention(y, table, segments, execution), execution)
        return out, {"attention": statistics, **parts} if statistics else parts

    def decode(
        self,
        x: Float[Array, "batch seq d_model"],
        table: Float[Array, "2 batch seq half"] | None,
        step: Step,
        cache: Slot,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache]:
        """(the residual stream after this block, the stacked cache with this layer's part written)."""

        def attention(y: Array) -> tuple[Array, LayerCache]:
            return self.attention.decode(y, table, step, cache, execution)

        out, written, _ = self._around(x, attention, execution)
        return out, written

    def _around(
        self, x: Array, attention: Callable[[Array], tuple[Array, Aside]], execution: Execution
    ) -> tuple[Array, Aside, Statistics]:
        """(the stream after this block, what `attention` gave besides its output, statistics of the other parts)."""
        found: Statistics = {}

        def attend(y: Array) -> tuple[Array, Aside]:
            out, aside = attention(execution.enter(y))
            return execution.leave(out), aside

        def mlp(y: Array) -> Array:
            return execution.leave(_feed("mlp", self.mlp, execution.enter(y), execution, found))

        if self.config.residual == "parallel":
            y = self.attention_norm(x)
            a, aside = attend(y)
            return x + self._branch(a) + self._branch(mlp(y)), aside, found
        if self.config.placement == "post":
            a, aside = attend(x)
            y = self.attention_norm(x + a)
            return self.mlp_norm(y + mlp(y)), aside, found
        sandwich = self.config.placement == "sandwich"
        a, aside = attend(self.attention_norm(x))
        y = x + self._branch(self.attention_out_norm(a) if sandwich else a)
        m = mlp(self.mlp_norm(y))
        out = y + self._branch(self.mlp_out_norm(m) if sandwich else m)
        if self.config.branch is not None:
            y = execution.enter(self.branch_norm(x))
            out = out + self._branch(execution.leave(_feed("branch", self.branch, y, execution, found)))
        return out, aside, found

    def _branch(self, y: Array) -> Array:
        """What joins the stream, times the parametrization's factor."""
        factor = self.config.residual_factor
        return y if factor == 1.0 else y * jnp.asarray(factor, y.dtype)


def _feed(name: str, part: FeedForward | MixtureOfExperts, x: Array, execution: Execution, found: Statistics) -> Array:
    """The output of a feed-forward part; what a mixture reports goes into `found` under `name`."""
    if isinstance(part, FeedForward):
        return part(x, execution)
    out, found[name] = part(x, execution)
    return out
