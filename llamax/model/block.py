"""One decoder block.

pre, sequential                             pre, parallel             sandwich (a sublayer)       post (a sublayer)
x ──┬─ norm ─ attn ─ + ─┬─ norm ─ mlp ─ +   x ─┬─ norm ─┬─ attn ─ +   x ─┬─ norm ─ f ─ norm ─ +   x ─┬─ f ─ + ─ norm
    └────────────────┘  └───────────────┘      │        └─ mlp ── +      └────────────────────┘      └──────┘
                                               └───────────────── ┘
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.components import Init, MoeMlp
from llamax.config.model import Block
from llamax.model.attention import SelfAttention
from llamax.model.execution import Execution
from llamax.model.linear import residual_gain
from llamax.model.mlp import FeedForward
from llamax.model.moe import MixtureOfExperts
from llamax.model.norm import Normalize

Statistics = dict[str, Float[Array, ""]]


class DecoderBlock(nnx.Module):
    """Attention and a feed-forward block around the residual stream, placed as `config` says."""

    def __init__(
        self, config: Block, d_model: int, init: Init, layers: int, *, layer: Int[Array, ""], key: Key[Array, ""]
    ):
        keys = jax.random.split(key)
        gain = residual_gain(init, layer, layers)
        self.config = config
        self.attention = SelfAttention(config.attention, config.position, d_model, init, gain, key=keys[0])
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

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        table: Float[Array, "2 seq half"] | None,
        segments: Int[Array, "batch seq"] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], Statistics]:
        """(the residual stream after this block, router statistics or an empty dict)."""

        def attention(y: Array) -> tuple[Array, Statistics]:
            return self.attention(y, table, segments, execution), {}

        def mlp(y: Array) -> tuple[Array, Statistics]:
            return self.mlp(y, execution) if isinstance(self.mlp, MixtureOfExperts) else (self.mlp(y, execution), {})

        if self.config.residual == "parallel":
            y = self.attention_norm(x)
            a, m = attention(y)[0], mlp(y)
            return x + a + m[0], m[1]
        x, _ = self._sublayer(x, attention, self.attention_norm, getattr(self, "attention_out_norm", None))
        return self._sublayer(x, mlp, self.mlp_norm, getattr(self, "mlp_out_norm", None))

    def _sublayer(
        self, x: Array, f: Callable[[Array], tuple[Array, Statistics]], norm: Normalize, out_norm: Normalize | None
    ) -> tuple[Array, Statistics]:
        if self.config.placement == "post":
            y, statistics = f(x)
            return norm(x + y), statistics
        y, statistics = f(norm(x))
        return x + (y if out_norm is None else out_norm(y)), statistics
