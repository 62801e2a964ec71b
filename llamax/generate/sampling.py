"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, combined, each row its own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from llamax.errors import UserError


class Sampling(NamedTuple):
    """How one row draws. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep every token.

    The order is that of transformers: temperature, then the k most likely, then the most likely ones that hold `top_p`
    of what is left (arXiv:1904.09751), then those with at least `min_p` of the likeliest one's probability
    (arXiv:2407.01082).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def check(self) -> Sampling:
        """Itself.

        Raises:
            UserError: a number out of its range.
        """
        limits = {
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (every token) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1 (every token)"),
            "min_p": (0 <= self.min_p <= 1, "0 (every token) to 1"),
        }
        for name, (good, allowed) in limits.items():
            if not good:
                raise UserError(f"{name}={getattr(self, name)}: give {allowed}")
        return self


GREEDY = Sampling(temperature=0.0)


class Rows(NamedTuple):
    """`Sampling` of every row of a batch, as arrays."""

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]


def rows_of(samplings: list[Sampling]) -> Rows:
    """The rows of a batch as arrays.

    Raises:
        UserError: a number out of its range.
    """
    columns = zip(*(sampling.check() for sampling in samplings), strict=True)
    types = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    return Rows(*(jnp.asarray(column, dtype) for column, dtype in zip(columns, types, strict=True)))


def kept(logits: Float[Array, "batch vocab"], rows: Rows) -> Float[Array, "batch vocab"]:
    """The logits of what a row draws from, divided by its temperature, -inf for what is cut off.

    At least one token stays. Of equally likely tokens at a cut the one with the smaller id counts first. A row of
    temperature 0 keeps the likeliest alone.
    """
    greedy = rows.temperature[:, None] == 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, rows.temperature[:, None])

    def cut() -> Array:
        order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        keep = _within(ranked, rows) & (~greedy | (jnp.arange(logits.shape[-1]) == 0))
        return jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), scaled, -jnp.inf)

    # Sorting a vocabulary costs more than a step of a small model: only where somebody asks for it.
    asked = greedy[:, 0] | (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    return jax.lax.cond(jnp.any(asked), cut, lambda: scaled)


def _within(ranked: Float[Array, "batch vocab"], rows: Rows) -> Bool[Array, "batch vocab"]:
    """What three cuts leave of logits sorted downwards."""
    rank = jnp.arange(ranked.shape[-1])
    keep = (rank < rows.top_k[:, None]) | (rows.top_k[:, None] == 0)
    p = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    # A token stays as long as the likelier ones do not hold top_p already.
    before = jnp.cumsum(p, axis=-1) - p
    keep &= (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    keep &= p >= rows.min_p[:, None] * p[:, :1]
    return keep | (rank == 0)


def sample(
    logits: Float[Array, "batch vocab"], rows: Rows, keys: Key[Array, " batch"], positions: Int[Array, " batch"]
) -> Int[Array, " batch"]:
    """The next token of every row, [batch].

    Row b draws with fold_in(keys[b], positions[b]): what a row draws depends on its own key and position alone, not on
    its batch or on how many steps a dispatch runs.
    """

    def draw(key: Array, position: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(key, position), row)

    likeliest = jnp.argmax(logits, axis=-1)
    greedy = rows.temperature == 0
    # Greedy rows need no cut: they would ask for the sort that a batch of them can do without.
    warm = rows._replace(temperature=jnp.where(greedy, 1.0, rows.temperature))
    drawn = jax.vmap(draw)(keys, positions, kept(logits, warm))
    return jnp.where(greedy, likeliest, drawn).astype(jnp.int32)
