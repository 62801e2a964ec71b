"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.components import Init, LatentAttention, Position, Rope
from llamax.model.attention import Logits, Sight, attend
from llamax.model.execution import Execution
from llamax.model.linear import contract, weight
from llamax.model.norm import Normalize
from llamax.model.position import logit_scale, rotate
from llamax.model.statistics import Statistics


class MultiHeadLatentAttention(nnx.Module):
    """Attention whose keys and values are all read from one normed latent a token, beside one rotary key a token.

    Training multiplies keys and values out and is ordinary multi-head attention.
    """

    def __init__(
        self,
        config: LatentAttention,
        position: Position,
        d_model: int,
        init: Init,
        gain: Float[Array, ""],
        *,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, 6)
        heads, rank, up = config.heads, config.kv_rank, config.nope_dim + config.value_dim
        self.config, self.position = config, position
        if config.q_rank is None:
            self.query = weight(keys[0], (d_model, heads, config.head_dim), ("embed", "heads", "head_dim"), init)
        else:
            self.q_down = weight(keys[0], (d_model, config.q_rank), ("embed", "latent"), init)
            self.q_norm = Normalize(config.norm, config.q_rank, ("latent",))
            self.q_up = weight(keys[1], (config.q_rank, heads, config.head_dim), ("latent", "heads", "head_dim"), init)
        self.kv_down = weight(keys[2], (d_model, rank + config.rope_dim), ("embed", "latent"), init)
        self.kv_norm = Normalize(config.norm, rank, ("latent",))
        self.kv_up = weight(keys[3], (rank, heads, up), ("latent", "heads", "head_dim"), init)
        out = (heads, config.value_dim, d_model)
        self.out = weight(keys[4], out, ("heads", "head_dim", "embed"), init, inputs=2, gain=gain)

    @property
    def logits(self) -> Logits:
        """How this layer forms its logits; the scale is of the whole head width, absorbed or not."""
        scale = self.config.scale
        return Logits(scale if scale is not None else logit_scale(self.position, self.config.head_dim))

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        table: Float[Array, "2 seq half"] | None,
        segments: Int[Array, "batch seq"] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], Statistics]:
        """(attention output before it joins the residual stream, statistics); `table`: the rotary table or None."""
        nope, rope, _ = self._queries(x, table, execution)
        latent, shared = self._latents(x, table, execution)
        k, v = self._keys(latent, shared, execution)
        y = attend(jnp.concatenate([nope, rope], -1), k, v, Sight(segments=segments), self.logits, execution.compute)
        return contract(y, self.out[...], 2, execution.compute), {}

    def _queries(self, x: Array, table: Array | None, execution: Execution) -> tuple[Array, Array, Array]:
        """(queries without position [.., heads, nope_dim], rotated queries [.., heads, rope_dim], what they are of)."""
        if self.config.q_rank is None:
            latent, q = x, contract(x, self.query[...], 1, execution.compute)
        else:
            latent = self.q_norm(contract(x, self.q_down[...], 1, execution.compute))
            q = contract(latent, self.q_up[...], 1, execution.compute)
        nope, rope = q[..., : self.config.nope_dim], q[..., self.config.nope_dim :]
        return nope, self._rotate(rope, table), latent

    def _latents(self, x: Array, table: Array | None, execution: Execution) -> tuple[Array, Array]:
        """(the normed latent [.., kv_rank], the rotated key part heads share [.., rope_dim]): what a cache holds."""
        both = contract(x, self.kv_down[...], 1, execution.compute)
        latent, rope = both[..., : self.config.kv_rank], both[..., self.config.kv_rank :]
        return self.kv_norm(latent), self._rotate(rope[:, :, None], table)[:, :, 0]

    def _keys(self, latent: Array, shared: Array, execution: Execution) -> tuple[Array, Array]:
        """(keys [.., heads, head_dim], values [.., heads, value_dim]) multiplied out of latents."""
        both = contract(latent, self.kv_up[...], 1, execution.compute)
        nope, v = both[..., : self.config.nope_dim], both[..., self.config.nope_dim :]
        rope = jnp.broadcast_to(shared[:, :, None], (*nope.shape[:3], shared.shape[-1]))
        return jnp.concatenate([nope, rope.astype(nope.dtype)], -1), v

    def _rotate(self, x: Array, table: Array | None) -> Array:
        return x if table is None or not isinstance(self.position, Rope) else rotate(x, table, self.position.layout)
