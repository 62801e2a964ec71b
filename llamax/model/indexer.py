"""The lightning indexer of DeepSeek sparse attention: which keys a query attends to (DeepSeek-V3.2, 2025).

It scores keys with a few small heads and is trained by a loss of its own, towards the attention it chooses for: the
model's gradient neither enters it nor comes out of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llamax.config import components
from llamax.config.components import Init
from llamax.model.execution import Execution
from llamax.model.linear import contract, weight
from llamax.model.norm import Normalize
from llamax.model.position import rotate


class Indexer(nnx.Module):
    """index[t, s] = sum over heads h of w[t, h] relu(q[t, h] . k[s] / sqrt(head_dim)), w divided by sqrt(heads).

    q comes from the attention's normed query latent, k (one for all heads, layer-normed) and w from the stream. A head
    is [rotary | rest], the rotary part as wide as the attention's. The published code rotates both by a Hadamard
    matrix before it rounds them to 8 bits; without the rounding that changes nothing and is left out.
    """

    def __init__(
        self, config: components.Indexer, q_rank: int, d_model: int, rotates: bool, init: Init, *, key: Key[Array, ""]
    ):
        keys = jax.random.split(key, 3)
        heads, dim = config.heads, config.head_dim
        self.config, self.rotates = config, rotates
        self.query = weight(keys[0], (q_rank, heads, dim), ("rank", "index_heads", "head_dim"), init)
        self.key = weight(keys[1], (d_model, dim), ("embed", "head_dim"), init)
        self.key_norm = Normalize(config.norm, dim, ("head_dim",))
        self.weights = weight(keys[2], (d_model, heads), ("embed", "index_heads"), init)

    def keys(
        self, x: Float[Array, "batch seq d_model"], table: Float[Array, "2 *where half"] | None, execution: Execution
    ) -> Float[Array, "batch seq head_dim"]:
        """What later queries compare with: the part of this layer that a cache holds."""
        k = self.key_norm(contract(jax.lax.stop_gradient(x), self.key[...], 1, execution.compute))
        return self._rotate(k[:, :, None], table)[:, :, 0]

    def scores(
        self,
        x: Float[Array, "batch queries d_model"],
        latent: Float[Array, "batch queries q_rank"],
        keys: Float[Array, "batch keys head_dim"],
        table: Float[Array, "2 *where half"] | None,
        execution: Execution,
    ) -> Float[Array, "batch queries keys"]:
        """The index of every key for every query, in float32, without a mask."""
        x, latent = jax.lax.stop_gradient((x, latent))
        q = self._rotate(contract(latent, self.query[...], 1, execution.compute), table)
        w = contract(x.astype(jnp.float32), self.weights[...], 1, execution.compute) * self.config.heads**-0.5
        dtype = jnp.dtype(execution.plain)
        products = jnp.einsum("bthd,bsd->bths", q.astype(dtype), keys.astype(dtype), preferred_element_type=jnp.float32)
        return jnp.einsum("bths,bth->bts", jax.nn.relu(products * self.config.head_dim**-0.5), w)

    def _rotate(self, x: Array, table: Array | None) -> Array:
        return rotate(x, table, self.config.layout) if self.rotates and table is not None else x


def choose(
    index: Float[Array, "batch queries keys"], keep: Bool[Array, "#batch queries keys"], top_k: int
) -> Int[Array, "batch queries chosen"]:
    """The `top_k` keys (all, if there are fewer) of the highest index among those to `keep`.

    A query with fewer keys to keep chooses others too: whoever attends still has to mask them.
    """
    index = jnp.where(keep, jax.lax.stop_gradient(index), -jnp.inf)
    return jax.lax.top_k(index, min(top_k, index.shape[-1]))[1]


def selection(
    index: Float[Array, "batch queries keys"], keep: Bool[Array, "#batch queries keys"], top_k: int
) -> Bool[Array, "batch queries keys"]:
    """`choose` as a mask of the keys to attend to, none of them outside `keep`."""
    if top_k >= index.shape[-1]:
        return jnp.broadcast_to(keep, index.shape)
    chosen = choose(index, keep, top_k)
    rows, queries = jnp.ogrid[: index.shape[0], : index.shape[1]]
    return keep & jnp.zeros(index.shape, bool).at[rows[:, :, None], queries[:, :, None], chosen].set(True)


def divergence(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    index: Float[Array, "batch queries keys"],
    seen: Bool[Array, "batch queries keys"],
    scale: float,
    compute: str,
) -> Float[Array, ""]:
    """KL(attention averaged over heads || softmax of the index), over the keys that are seen, a mean over tokens.

    The indexer's training signal: the attention's side is a constant (DeepSeek-V3.2, the sparse training stage).
    """
    q, k = jax.lax.stop_gradient((q, k))
    dtype = jnp.dtype(compute)
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(dtype), k.astype(dtype), preferred_element_type=jnp.float32)
    p = jax.nn.softmax(jnp.where(seen[:, None], scores * scale, -1e30), axis=-1).mean(1)
    log_ratio = jnp.log(jnp.where(p > 0, p, 1.0)) - jax.nn.log_softmax(jnp.where(seen, index, -1e30), axis=-1)
    return jnp.sum(jnp.where(p > 0, p * log_ratio, 0.0)) / (p.shape[0] * p.shape[1])
