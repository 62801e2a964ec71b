"""Rows between the devices of a mesh axis: to those that hold their experts, and back.

A device sends each peer a fixed number of slots, of which some are filled. `reference` sends all slots; where the
backend has a ragged all-to-all only the filled ones travel, and land in the same places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

Matrices = dict[str, Float[Array, "own _ _"]]  # of the experts here: up, down, and gate if there is one
Slots = Float[Array, "peers width d_model"]


class TokenAxes(NamedTuple):
    """How the tokens [batch, seq, ...] that a mixture reads are cut, and which of the mesh axes that do so also cut
    the experts and the two sides of their matrices."""

    held: NamedSharding
    experts: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All axes that cut tokens."""
        parts = [part if isinstance(part, tuple) else (part,) for part in self.held.spec if part is not None]
        return tuple(axis for part in parts for axis in part)


def token_axes(rules: Mapping[str, tuple[str, ...]], held: NamedSharding | None) -> TokenAxes | None:
    """The axes by a mesh's rules; None where tokens are whole. Axes that cut no tokens are left to the compiler."""
    if held is None:
        return None
    axes = TokenAxes(held)
    cutting = [axis for axis in axes.names if held.mesh.shape[axis] > 1]
    others = (tuple(axis for axis in rules[logical] if axis in cutting) for logical in TokenAxes._fields[1:])
    return TokenAxes(held, *others) if cutting else None


def on_own_tokens(
    function: Callable[[Array, Array, Array | None, Matrices], Any],
    x: Float[Array, "batch seq d_model"],
    logits: Float[Array, "batch seq experts"],
    bias: Float[Array, " experts"] | None,
    matrices: Matrices,
    axes: TokenAxes,
) -> Any:
    """`function(x, logits, bias, matrices)` on every device with its own tokens and the matrices of its own experts,
    whole. There and in the result, arrays are [tokens, ...], all tokens in a row."""
    embed, mlp = axes.embed or None, axes.mlp or None
    sides = {name: (mlp, embed) if name == "down" else (embed, mlp) for name in matrices}

    def local(x: Array, logits: Array, bias: Array | None, matrices: Matrices) -> Any:
        whole = {name: _whole(matrix, sides[name]) for name, matrix in matrices.items()}
        found = function(x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1]), bias, whole)
        return jax.tree.map(lambda a: a.reshape(*x.shape[:2], *a.shape[1:]), found)

    places = {name: PartitionSpec(axes.experts or None, *sides[name]) for name in matrices}
    found = jax.shard_map(
        local,
        mesh=axes.held.mesh,
        in_specs=(axes.held.spec, axes.held.spec, PartitionSpec(), places),
        out_specs=axes.held.spec,
        axis_names=set(axes.names),
        check_vma=False,
    )(x, logits, bias, matrices)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)


def _whole(matrix: Array, sides: tuple[tuple[str, ...] | None, ...]) -> Array:
    for side, axes in enumerate(sides, start=1):
        if axes:
            matrix = jax.lax.all_gather(matrix, axes, axis=side, tiled=True)
    return matrix


# ---------------------------------------------------------------- one exchange
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(rows: Slots, send: Int[Array, " peers"], receive: Int[Array, " peers"], axis: tuple[str, ...]) -> Slots:
    """Part p of `rows` goes to device p of mesh axis `axis`; part p of the result came from there.

    The first send[p] rows of a part are filled, the first receive[p] of the result; the others mean nothing, and have
    no gradient.
    """
    ragged = functools.partial(_ragged, axis=axis)
    dense = functools.partial(reference, axis=axis)
    return jax.lax.platform_dependent(rows, send, receive, cpu=dense, default=ragged)


def reference(rows: Slots, send: Int[Array, " peers"], receive: Int[Array, " peers"], axis: tuple[str, ...]) -> Slots:
    """`exchange` with every slot on its way, filled or not."""
    return jax.lax.all_to_all(rows, axis, 0, 0)


def _ragged(rows: Slots, send: Int[Array, " peers"], receive: Int[Array, " peers"], axis: tuple[str, ...]) -> Slots:
    peers, width, _ = rows.shape
    flat = rows.reshape(peers * width, -1)
    none = 0 * send  # under vmap the operation wants a batch of every argument (jax 0.10.2)
    starts = jnp.arange(peers, dtype=jnp.int32) * width + none
    here = jax.lax.axis_index(axis) * width + none  # a sender's place at each of its peers
    arrived = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), starts, send, here, receive, axis_name=axis)
    return arrived.reshape(rows.shape)


def _exchange_backward(axis: tuple[str, ...], saved: tuple[Array, Array], g: Slots) -> tuple[Slots, None, None]:
    send, receive = saved
    return exchange(g, receive, send, axis), None, None


exchange.defvjp(
    lambda rows, send, receive, axis: (exchange(rows, send, receive, axis), (send, receive)), _exchange_backward
)
