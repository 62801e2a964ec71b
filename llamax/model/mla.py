"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.components import Init, LatentAttention, Position, Rope
from llamax.model.attention import attend, attention
from llamax.model.cache import Latents, Slot, Step, extend
from llamax.model.execution import Execution
from llamax.model.indexer import Indexer, choose, divergence, selection
from llamax.model.linear import contract, weight
from llamax.model.norm import Normalize
from llamax.model.position import logit_scale, rotate
from llamax.model.scores import Logits, Sight, visible, whole
from llamax.model.statistics import Statistics


class MultiHeadLatentAttention(nnx.Module):
    """Attention whose keys and values are all read from one normed latent a token, beside one rotary key a token.

    Training and prompts multiply keys and values out and are ordinary multi-head attention. One token after another is
    decoded in the absorbed form: scores q_nope (W_uk c) = (q_nope W_uk) c and outputs p (W_uv c) = (p c) W_uv, one
    shared key and value of the latent's width. With an indexer a query attends to `top_k` keys of its choice.
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
            self.q_up = weight(keys[1], (config.q_rank, heads, config.head_dim), ("rank", "heads", "head_dim"), init)
        self.kv_down = weight(keys[2], (d_model, rank + config.rope_dim), ("embed", "latent"), init)
        self.kv_norm = Normalize(config.norm, rank, ("latent",))
        self.kv_up = weight(keys[3], (rank, heads, up), ("rank", "heads", "head_dim"), init)
        out = (heads, config.value_dim, d_model)
        rotates = isinstance(position, Rope)
        if config.indexer is not None and config.q_rank is not None:
            self.indexer = Indexer(config.indexer, config.q_rank, d_model, rotates, init, key=keys[5])
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
        nope, rope, read = self._queries(x, table, execution)
        q = jnp.concatenate([nope, rope], -1)
        k, v = self._keys(self._latents(x, table, execution), execution)
        sight, statistics = Sight(segments=segments), {}
        if self.config.indexer is not None:
            index_keys = self.indexer.keys(x, table, execution)
            if execution.context is not None:  # what is chosen differs by query: every device has all keys, in order
                k, v, index_keys = (execution.whole(a) for a in (k, v, index_keys))
                positions = jnp.broadcast_to(execution.positions(x.shape[1]), x.shape[:2])
                ids = None if segments is None else execution.whole(segments)
                sight = Sight(positions, segments=segments, key_segments=ids)
            index = self.indexer.scores(x, read, index_keys, table, execution)
            keep, _ = visible(whole(x.shape[1], x.shape[1]), sight)
            selected = selection(index, keep, self.config.indexer.top_k)
            statistics["indexer"] = divergence(q, k, index, selected, self.logits.scale, execution.plain)
            sight = sight._replace(selected=selected)
        y = attention(q, k, v, sight, self.logits, execution)
        return contract(y, self.out[...], 2, execution.compute), statistics

    def decode(
        self,
        x: Float[Array, "batch seq d_model"],
        table: Float[Array, "2 batch seq half"] | None,
        step: Step,
        cache: Slot,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], Latents]:
        """(attention output for tokens that follow those in the cache, the stacked cache with them written)."""
        one = x.shape[1] == 1
        nope, rope, read = self._queries(x, table, execution)
        index_keys = None if self.config.indexer is None else self.indexer.keys(x, table, execution)
        written, seen, positions = extend(cache, Latents(self._latents(x, table, execution), index_keys), step)
        latents, sight = seen.latent, Sight(step.positions, positions)
        if self.config.indexer is not None and seen.index_key is not None:
            index = self.indexer.scores(x, read, seen.index_key, table, execution)
            keep, _ = visible(whole(x.shape[1], positions.shape[1]), sight)
            if one:  # fetch what is chosen and attend to nothing else
                chosen = choose(index, keep, self.config.indexer.top_k)[:, 0]
                latents = jnp.take_along_axis(latents, chosen[:, :, None], axis=1)
                sight = sight._replace(keys=jnp.take_along_axis(positions, chosen, axis=1))
            else:
                sight = sight._replace(selected=selection(index, keep, self.config.indexer.top_k))
        if one:
            y = self._absorbed(nope, rope, latents, sight, execution)
        else:
            k, v = self._keys(latents.astype(x.dtype), execution)
            y = attend(jnp.concatenate([nope, rope], -1), k, v, sight, self.logits, execution.plain)
        return contract(y, self.out[...], 2, execution.compute), written

    def _absorbed(self, nope: Array, rope: Array, latents: Array, sight: Sight, execution: Execution) -> Array:
        """Attention to `latents` [batch, keys, kv_rank + rope_dim] themselves: [batch, queries, heads, value_dim]."""
        dtype, rank = jnp.dtype(execution.plain), self.config.kv_rank
        up = self.kv_up[...].astype(dtype)
        w_uk, w_uv = up[..., : self.config.nope_dim], up[..., self.config.nope_dim :]

        def product(spec: str, a: Array, b: Array) -> Array:
            return jnp.einsum(spec, a.astype(dtype), b, preferred_element_type=jnp.float32).astype(nope.dtype)

        q = jnp.concatenate([product("bthn,rhn->bthr", nope, w_uk), rope], -1)
        shared = latents[:, :, None]
        y = attend(q, shared, shared, sight, self.logits, execution.plain)[..., :rank]  # the rotary part has no value
        return product("bthr,rhv->bthv", y, w_uv)

    def _queries(self, x: Array, table: Array | None, execution: Execution) -> tuple[Array, Array, Array]:
        """(queries without position [.., heads, nope_dim], rotated queries [.., heads, rope_dim], what they are of)."""
        if self.config.q_rank is None:
            latent, q = x, contract(x, self.query[...], 1, execution.compute)
        else:
            latent = self.q_norm(contract(x, self.q_down[...], 1, execution.compute))
            q = contract(latent, self.q_up[...], 1, execution.compute)
        nope, rope = q[..., : self.config.nope_dim], q[..., self.config.nope_dim :]
        return nope, self._rotate(rope, table), latent

    def _latents(self, x: Array, table: Array | None, execution: Execution) -> Array:
        """[normed latent | rotated key part that heads share], kv_rank + rope_dim wide: what a cache holds."""
        both = contract(x, self.kv_down[...], 1, execution.compute)
        latent, rope = both[..., : self.config.kv_rank], both[..., self.config.kv_rank :]
        return jnp.concatenate([self.kv_norm(latent), self._rotate(rope[:, :, None], table)[:, :, 0]], -1)

    def _keys(self, latents: Array, execution: Execution) -> tuple[Array, Array]:
        """(keys [.., heads, head_dim], values [.., heads, value_dim]) multiplied out of `_latents`."""
        latent, shared = latents[..., : self.config.kv_rank], latents[..., self.config.kv_rank :]
        both = contract(latent, self.kv_up[...], 1, execution.compute)
        nope, v = both[..., : self.config.nope_dim], both[..., self.config.nope_dim :]
        rope = jnp.broadcast_to(shared[:, :, None], (*nope.shape[:3], shared.shape[-1]))
        return jnp.concatenate([nope, rope], -1), v

    def _rotate(self, x: Array, table: Array | None) -> Array:
        return x if table is None or not isinstance(self.position, Rope) else rotate(x, table, self.position.layout)
