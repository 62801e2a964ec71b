"""How the model is run, as opposed to what it is: number formats, rematerialization, unrolling, placement."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from llamax.model.exchange import TokenAxes
from llamax.model.linear import DOT


class Context(NamedTuple):
    """Every sequence cut over the mesh axis `context` (see context.py), which has `ways` devices."""

    mesh: Mesh
    ways: int

    def order(self, places: int) -> Int[np.ndarray, " places"]:
        """The positions that a cut sequence holds, from its first place to its last: of 2 x ways equal chunks device i
        has chunk i and chunk 2 ways - 1 - i, so that all see equally many keys."""
        chunks = np.arange(places).reshape(2 * self.ways, -1)
        pairs = np.stack([np.arange(self.ways), 2 * self.ways - 1 - np.arange(self.ways)], axis=1)
        return chunks[pairs.ravel()].ravel()


class Stages(NamedTuple):
    """The layers of every segment cut over `stages` stages, through which `microbatches` parts of the batch follow each
    other (see pipeline.py); `held` is the sharding of what the stages work on, [stage, rows, seq, d_model]."""

    stages: int
    microbatches: int
    held: NamedSharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: Array, there: NamedSharding, back: NamedSharding) -> Array:
    """x placed `there`, its cotangent `back`: a gather forward is a scatter of sums backward, and the other way round.
    Autodiff alone would place a cotangent where x went."""
    return jax.lax.with_sharding_constraint(x, there)


_moved.defvjp(
    lambda x, there, back: (_moved(x, there, back), None),
    lambda there, back, _, g: (jax.lax.with_sharding_constraint(g, back),),
)


class Execution(NamedTuple):
    """Static choices that change speed and memory but not the function computed.

    `compute` is the operand type of matrix products (accumulated in float32), `activation` the type of the residual
    stream, `remat` what the backward pass recomputes, `unroll` straight code in place of the scan over layers,
    `kernels` the names of those in kernels.py that may stand in for a reference.

    `residual` is the sharding the residual stream [batch, seq, d_model] is held to; `inside` what attention and
    feed-forward blocks read, where that is another (sequence parallelism), and `head` what the head reads. `context`
    and `stages` are there where sequences or layers are cut over devices, `tokens` where tokens are: then every device
    routes its own. `replicas` is a mesh whose devices each run the whole model on their rows (train/replicas.py).
    """

    compute: Literal["float32", "bfloat16", "float8"] = "float32"
    activation: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: bool = False
    residual: NamedSharding | None = None
    kernels: tuple[str, ...] = ()
    inside: NamedSharding | None = None
    head: NamedSharding | None = None
    context: Context | None = None
    stages: Stages | None = None
    tokens: TokenAxes | None = None
    replicas: Mesh | None = None

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

    # ------------------------------------------------------------ shardings
    def place(self, x: Array) -> Array:
        """The residual stream held to its sharding, if one is asked for."""
        return x if self.residual is None else jax.lax.with_sharding_constraint(x, self.residual)

    def enter(self, x: Array) -> Array:
        """What a part of a block reads: under sequence parallelism the whole sequence, gathered over `tensor`."""
        return x if self.inside is None else _moved(x, self.inside, self.residual)

    def leave(self, x: Array) -> Array:
        """What a part of a block gives: under sequence parallelism summed over `tensor` and cut again (Megatron-LM's
        reduce-scatter, arXiv:2205.05198)."""
        return x if self.inside is None else _moved(x, self.residual, self.inside)

    def to_head(self, x: Array) -> Array:
        """The final stream as the head reads it."""
        return x if self.head is None else jax.lax.with_sharding_constraint(x, self.head)

    # ------------------------------------------------------------ the order of a sequence
    def positions(self, seq: int) -> Int[Array, " seq"]:
        """The position of every place of a sequence: 0, 1, ... unless sequences are cut."""
        return jnp.arange(seq) if self.context is None else jnp.asarray(self.context.order(seq))

    def held(self, a: Array, axis: int = 1) -> Array:
        """`a`, whose `axis` is a sequence, in the order in which this execution holds it."""
        return a if self.context is None else jnp.take(a, self.context.order(a.shape[axis]), axis=axis)

    def natural(self, a: Array, axis: int = 1) -> Array:
        """The inverse of `held`."""
        return a if self.context is None else jnp.take(a, np.argsort(self.context.order(a.shape[axis])), axis=axis)

    def table(self, weights: Array) -> Array:
        """A table [rows, d_model] that tokens are looked up in. Where sequences are cut its rows are gathered whole, as
        other weights are: looked up by parts of d_model, its gradient would need whole sequences on every device."""
        if self.context is None:
            return weights
        spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)
        return jax.lax.with_sharding_constraint(weights, NamedSharding(self.context.mesh, spec))

    def whole(self, a: Array) -> Array:
        """All of [batch, seq, ...] on every device of `context`, in natural order."""
        if self.context is None:
            return a
        free = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(free, None, *[free] * (a.ndim - 2))
        return self.natural(jax.lax.with_sharding_constraint(a, NamedSharding(self.context.mesh, spec)))
