"""Rows to experts and back: a fixed number of slots an expert, then whatever it takes for the rest.

Batched products [experts, slots, width] are what matrix units like, but loads vary. So each expert gets a little more
than its even share of slots in a first round, which is straight code, and a loop serves what is left: one block of one
expert's picks after another where the experts are at hand (`grouped`), smaller rounds of all where they are on other
devices (`in_rounds`). No pick is ever dropped. Moving a round's rows is a gather in both directions, forward and
backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llamax.model.linear import Contracted, dot

SLACK = 1.125  # slots of the first round over the even share
LEAST = 8  # slots a round, at least


class Layout(NamedTuple):
    """Picks (token t's j-th choice is pick t k + j) sorted by expert.

    `order`: the pick at each sorted position; `rank`: each pick's place among its expert's; `starts` and `sizes`: where
    an expert's picks start and how many they are; `fullest`: the most any has. `label`: what a round has to know of
    each pick, if anything.
    """

    order: Int[Array, " picks"]
    experts: Int[Array, " picks"]
    rank: Int[Array, " picks"]
    starts: Int[Array, " experts"]
    sizes: Int[Array, " experts"]
    fullest: Int[Array, ""]
    label: Int[Array, " picks"] | None = None


def layout_of(chosen: Int[Array, "tokens top_k"], experts: int) -> Layout:
    """One stable sort and its inverse."""
    picks = chosen.reshape(-1)
    order = jnp.argsort(picks, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(picks[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    return Layout(order, picks, place - starts[picks], starts, sizes, sizes.max())


def widths(picks: int, experts: int) -> tuple[int, int]:
    """(slots an expert in the first round, and in each later one)."""
    even = -(-int(SLACK * picks) // experts)
    first = min(-(-even // LEAST) * LEAST, picks)
    return first, max(LEAST, first // 4)


class Round(NamedTuple):
    """Slots [experts x width] that hold each expert's picks from the `first` on, as indices both ways.

    `pick` of a slot, `filled` where the slot has one; `slot` of a pick, `here` where the pick is in this round; `label`
    of a slot's pick.
    """

    pick: Int[Array, " slots"]
    filled: Array
    slot: Int[Array, " picks"]
    here: Array
    label: Int[Array, " slots"] | None


def round_of(layout: Layout, first: Array | int, width: int) -> Round:
    """The round of `width` slots an expert that starts at each expert's pick number `first`."""
    place = jnp.arange(width) + first
    position = layout.starts[:, None] + place
    pick = layout.order[jnp.minimum(position, layout.order.size - 1)].reshape(-1)
    slot = layout.experts * width + layout.rank - first
    here = (layout.rank >= first) & (layout.rank < first + width)
    label = None if layout.label is None else layout.label[pick]
    return Round(pick, (place < layout.sizes[:, None]).reshape(-1), jnp.where(here, slot, 0), here, label)


@jax.custom_vjp
def spread(rows: Float[Array, "rows width"], moves: Round) -> Float[Array, "slots width"]:
    """Into every slot the row of its pick; row r has the picks r k .. r k + k - 1. Empty slots hold some other row."""
    return rows[moves.pick // (moves.slot.size // rows.shape[0])]


@jax.custom_vjp
def collect(slots: Float[Array, "slots width"], moves: Round) -> Float[Array, "picks width"]:
    """What the slot of every pick holds; 0 for picks of other rounds."""
    return jnp.where(moves.here[:, None], slots[moves.slot], 0)


def _spread_backward(saved: tuple[Round, int], g: Array) -> tuple[Array, None]:
    moves, rows = saved
    picks = jnp.where(moves.here[:, None], g[moves.slot], 0).reshape(rows, -1, g.shape[-1])
    return picks.sum(1, dtype=jnp.float32).astype(g.dtype), None


def _collect_backward(moves: Round, g: Array) -> tuple[Array, None]:
    return jnp.where(moves.filled[:, None], g[moves.pick], 0), None


spread.defvjp(lambda rows, moves: (spread(rows, moves), (moves, rows.shape[0])), _spread_backward)
collect.defvjp(lambda slots, moves: (collect(slots, moves), moves), _collect_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def batched(
    x: Float[Array, "experts slots inputs"], w: Float[Array, "experts inputs outputs"], compute: str
) -> Float[Array, "experts slots outputs"]:
    """x w by expert in x's dtype, operands in `compute` and sums in float32, backward too (see `linear.contract`)."""
    return _product(x, w, ((2,), (1,)), compute, x.dtype)


def _product(a: Array, b: Array, contracted: Contracted, compute: str, out: jnp.dtype) -> Array:
    return dot(a.astype(compute), b.astype(compute), (contracted, ((0,), (0,))), out)


def _batched_backward(compute: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    return _product(g, w, ((2,), (2,)), compute, x.dtype), _product(x, g, ((1,), (1,)), compute, w.dtype)


batched.defvjp(lambda x, w, compute: (batched(x, w, compute), (x, w)), _batched_backward)


# ---------------------------------------------------------------- one round
Weigh = Literal["input", "output"] | None  # where a pick's weight comes in, if it has one


def sent(weigh: Weigh, rows: Array, weights: Float[Array, "rows top_k"] | None, moves: Round) -> Array:
    """The row of every slot, as its expert reads it."""
    found = spread(rows, moves)
    if weigh != "input":
        return found
    assert weights is not None
    return (found * spread(weights.reshape(-1, 1), moves)).astype(rows.dtype)


def joined(
    weigh: Weigh, slots: Array, weights: Float[Array, "rows top_k"] | None, moves: Round, rows: int
) -> Float[Array, "rows width"]:
    """The sum over a row's picks of what their slots hold, weighed, in float32."""
    picked = collect(slots, moves).reshape(rows, -1, slots.shape[-1])
    if weigh == "output":
        assert weights is not None
        picked = picked * weights[..., None]
    return jnp.sum(picked, axis=1, dtype=jnp.float32)


# ---------------------------------------------------------------- experts at hand
Experts = Callable[[Array, Any], Array]  # (rows [experts x slots, width], matrices [experts, ...]) -> the same of each
Operands = tuple[Array, Array | None, Any]  # rows [rows, width], weights of their picks [rows, top_k], matrices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped(experts: Experts, weigh: Weigh, operands: Operands, layout: Layout) -> Float[Array, "rows width"]:
    """What the experts of every row's picks give, weighed and summed, in float32. `experts` closes over no array."""
    first, _ = widths(layout.order.size, layout.sizes.size)
    return _add_blocks(experts, weigh, operands, layout, _first(experts, weigh, operands, round_of(layout, 0, first)))


def _first(experts: Experts, weigh: Weigh, operands: Operands, moves: Round) -> Array:
    rows, weights, matrices = operands
    return joined(weigh, experts(sent(weigh, rows, weights, moves), matrices), weights, moves, rows.shape[0])


class Block(NamedTuple):
    """Some picks of one expert: which, the rows they are of (past the last one where there is no pick any more)."""

    expert: Int[Array, ""]
    pick: Int[Array, " slots"]
    row: Int[Array, " slots"]
    filled: Array


def _in_blocks(step: Callable[[Any, Block], Any], carry: Any, layout: Layout, rows: int) -> Any:
    """`carry` after a `step` for every block of picks that the first round has no slots for."""
    picks, top_k = layout.order.size, layout.order.size // rows
    first, width = widths(picks, layout.sizes.size)
    if first >= picks:
        return carry
    blocks = -(-jnp.maximum(layout.sizes - first, 0) // width)
    ends = jnp.cumsum(blocks)

    def body(state: tuple[Array, Any]) -> tuple[Array, Any]:
        i, carry = state
        expert = jnp.sum(i >= ends, dtype=jnp.int32)
        place = first + (i - ends[expert] + blocks[expert]) * width + jnp.arange(width, dtype=jnp.int32)
        filled = place < layout.sizes[expert]
        pick = layout.order[jnp.minimum(layout.starts[expert] + place, picks - 1)]
        beyond = rows + jnp.arange(width, dtype=jnp.int32)
        return i + 1, step(carry, Block(expert, pick, jnp.where(filled, pick // top_k, beyond), filled))

    return jax.lax.while_loop(lambda state: state[0] < ends[-1], body, (jnp.int32(0), carry))[1]


def _of_block(operands: Operands, block: Block) -> Operands:
    """(the rows of a block [slots, width], their weights [slots], the matrices of its expert [1, ...])."""
    rows, weights, matrices = operands
    own = None if weights is None else weights.reshape(-1)[block.pick]
    one = jax.tree.map(lambda m: jax.lax.dynamic_slice_in_dim(m, block.expert, 1), matrices)
    return rows[jnp.minimum(block.row, rows.shape[0] - 1)], own, one


def _block(experts: Experts, weigh: Weigh, rows: Array, weights: Array | None, matrices: Any) -> Array:
    """What one expert gives for its rows [slots, width], in float32."""
    if weigh == "input":
        assert weights is not None
        rows = (rows * weights[:, None]).astype(rows.dtype)
    out = experts(rows, matrices).astype(jnp.float32)
    return out * weights[:, None] if weigh == "output" and weights is not None else out


def _put(total: Array, where: Array, new: Array) -> Array:
    """`total` with `new` added at the rows `where`, all different; those past its end are left out."""
    return total.at[where].add(new.astype(total.dtype), mode="drop", unique_indices=True)


def _add_blocks(experts: Experts, weigh: Weigh, operands: Operands, layout: Layout, total: Array) -> Array:
    def step(total: Array, block: Block) -> Array:
        return _put(total, block.row, _block(experts, weigh, *_of_block(operands, block)))

    return _in_blocks(step, total, layout, operands[0].shape[0])


def _grouped_forward(experts: Experts, weigh: Weigh, operands: Operands, layout: Layout) -> tuple[Array, Any]:
    first, _ = widths(layout.order.size, layout.sizes.size)
    moves = round_of(layout, 0, first)
    total, pull = jax.vjp(lambda operands: _first(experts, weigh, operands, moves), operands)
    return _add_blocks(experts, weigh, operands, layout, total), (pull, operands, layout)


def _grouped_backward(experts: Experts, weigh: Weigh, saved: Any, g: Array) -> tuple[Operands, None]:
    """Blocks are computed again: reverse mode cannot go through a loop whose length is data."""
    pull, operands, layout = saved

    def step(total: Operands, block: Block) -> Operands:
        rows, weights, matrices = total
        own = functools.partial(_block, experts, weigh)
        theirs = jnp.where(block.filled[:, None], g[jnp.minimum(block.row, g.shape[0] - 1)], 0)
        d_rows, d_weights, d_one = jax.vjp(own, *_of_block(operands, block))[1](theirs)
        if weights is not None:
            past = weights.size + jnp.arange(block.pick.size, dtype=jnp.int32)
            flat = _put(weights.reshape(-1), jnp.where(block.filled, block.pick, past), d_weights)
            weights = flat.reshape(weights.shape)

        def add(m: Array, new: Array) -> Array:
            sum_ = jax.lax.dynamic_slice_in_dim(m, block.expert, 1) + new
            return jax.lax.dynamic_update_slice_in_dim(m, sum_, block.expert, 0)

        return _put(rows, block.row, d_rows), weights, jax.tree.map(add, matrices, d_one)

    return _in_blocks(step, pull(g)[0], layout, operands[0].shape[0]), None


grouped.defvjp(_grouped_forward, _grouped_backward)


# ---------------------------------------------------------------- experts at hand, whatever their loads
def sorted_rows(
    experts: Callable[[Array, Any, Int[Array, " experts"]], Array], weigh: Weigh, operands: Operands, layout: Layout
) -> Float[Array, "rows width"]:
    """The same as `grouped` of experts that take rows [picks, width] sorted by expert, and how many each has."""
    rows, weights, matrices = operands
    every = jnp.ones(layout.order.size, bool)
    moves = Round(layout.order, every, layout.starts[layout.experts] + layout.rank, every, None)
    out = experts(sent(weigh, rows, weights, moves), matrices, layout.sizes)
    return joined(weigh, out, weights, moves, rows.shape[0])


# ---------------------------------------------------------------- experts elsewhere
OneRound = Callable[[Any, Round], Array]  # (operands, moves) -> its part of the sum


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(one: OneRound, operands: Any, layout: Layout) -> Array:
    """The sum of one(operands, round) over the rounds that serve every pick of `layout`.

    `one` closes over no array. The loop's later rounds are computed again in the backward pass, as reverse mode cannot
    go through a loop whose length is data.
    """
    first, _ = widths(layout.order.size, layout.sizes.size)
    return _rest(lambda moves: one(operands, moves), one(operands, round_of(layout, 0, first)), layout)


def _rest(part: Callable[[Round], Any], total: Any, layout: Layout) -> Any:
    first, width = widths(layout.order.size, layout.sizes.size)
    if first >= layout.order.size:
        return total

    def step(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        start, total = carry
        return start + width, jax.tree.map(jnp.add, total, part(round_of(layout, start, width)))

    return jax.lax.while_loop(lambda carry: carry[0] < layout.fullest, step, (jnp.int32(first), total))[1]


def _rounds_forward(one: OneRound, operands: Any, layout: Layout) -> tuple[Array, Any]:
    first, _ = widths(layout.order.size, layout.sizes.size)
    moves = round_of(layout, 0, first)
    total, pull = jax.vjp(lambda operands: one(operands, moves), operands)
    return _rest(lambda moves: one(operands, moves), total, layout), (pull, operands, layout)


def _rounds_backward(one: OneRound, saved: Any, g: Array) -> tuple[Any, None]:
    pull, operands, layout = saved

    def part(moves: Round) -> Any:
        return jax.vjp(lambda operands: one(operands, moves), operands)[1](g)[0]

    return _rest(part, pull(g)[0], layout), None


in_rounds.defvjp(_rounds_forward, _rounds_backward)
