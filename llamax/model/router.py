"""Routers: which experts a token goes to and with what weights. All in float32."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llamax.config.components import ExpertGroups, Router
from llamax.model.statistics import Statistics

Logits = Float[Array, "tokens experts"]


class Choice(NamedTuple):
    """`experts` [tokens, top_k] with their `weights`, and the `affinities` [tokens, experts], which sum to one a token,
    with the experts that have the `largest`: both for balance losses."""

    weights: Float[Array, "tokens top_k"]
    experts: Int[Array, "tokens top_k"]
    affinities: Float[Array, "tokens experts"]
    largest: Int[Array, "tokens top_k"]


def route(logits: Logits, router: Router, top_k: int, bias: Float[Array, " experts"] | None = None) -> Choice:
    """`top_k` experts for every token, as `router` says; `bias` moves the choice, never a weight, and has no gradient.

    Groups drop out at -inf. DeepSeek-V2 sets them to 0 instead, which chooses the same experts: its scores, a softmax,
    are positive. Without bias and groups the logits are compared, not the scores, so that scores that round to one
    value (a saturated sigmoid) do not tie.
    """
    logits = logits.astype(jnp.float32)
    if router.score == "sparsemixer":
        return _sparsemixer(logits, router.jitter)
    scores = jax.nn.softmax(logits, axis=-1) if router.score == "softmax" else jax.nn.sigmoid(logits)
    affinities = scores if router.score == "softmax" else _shares(scores)
    ranked = logits if bias is None and router.groups is None else scores
    ranked = jax.lax.stop_gradient(ranked if bias is None else scores + bias)
    if router.groups is not None:
        ranked = jnp.where(_kept(ranked, router.groups), ranked, -jnp.inf)
    _, experts = jax.lax.top_k(ranked, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if router.normalize:
        weights = weights / weights.sum(-1, keepdims=True) if router.score == "softmax" else _shares(weights)
    return Choice(weights * router.scale, experts, affinities, _largest(affinities, top_k))


def _largest(affinities: Array, top_k: int) -> Array:
    return jax.lax.top_k(jax.lax.stop_gradient(affinities), top_k)[1]


def _shares(scores: Array) -> Array:
    """Scores over their sum, which is kept from zero as in DeepSeek-V3: sigmoids may all underflow."""
    return scores / (scores.sum(-1, keepdims=True) + 1e-20)


def _kept(ranked: Array, groups: ExpertGroups) -> Array:
    """Whether each expert is in one of the groups a token may use (DeepSeek-V2, arXiv:2405.04434, section 2.2.2)."""
    tokens, experts = ranked.shape
    inside = ranked.reshape(tokens, groups.count, experts // groups.count)
    best, _ = jax.lax.top_k(inside, min({"max": 1, "top2": 2}[groups.by], inside.shape[-1]))
    _, chosen = jax.lax.top_k(best.sum(-1), groups.keep)
    kept = jnp.any(jax.nn.one_hot(chosen, groups.count, dtype=jnp.bool_), axis=1)
    return jnp.repeat(kept, experts // groups.count, axis=-1)


def _sparsemixer(logits: Array, jitter: float) -> Choice:
    """SparseMixer's choice of two (arXiv:2310.00811), without its sampling, as Phi-3.5-MoE runs.

    Twice: the winner is weighed by the softmax over the experts j with (max - s_j) / max(|s_j|, max) <= 2 jitter. The
    second round leaves out the first winner. The two weights are not normalized. Where the winner stands alone its
    weight is 1 without a gradient, so that the router learns mostly from a balance loss.
    """
    left, weights, chosen = logits, [], []
    for _ in range(2):
        top = jax.lax.stop_gradient(left.max(-1, keepdims=True))
        near = (top - logits) / jnp.maximum(jnp.abs(logits), top) <= 2 * jitter
        # The winner is always in, also where it is 0 and the quotient is 0 / 0.
        near = (near | (left == top)) & jnp.isfinite(left)
        winner = left.argmax(-1, keepdims=True)
        shares = jax.nn.softmax(jnp.where(near, left, -jnp.inf), axis=-1)
        weights.append(jnp.take_along_axis(shares, winner, axis=-1))
        chosen.append(winner)
        left = jnp.where(jnp.arange(logits.shape[-1]) == winner, -jnp.inf, left)
    affinities = jax.nn.softmax(logits, axis=-1)
    return Choice(jnp.concatenate(weights, -1), jnp.concatenate(chosen, -1), affinities, _largest(affinities, 2))


# ---------------------------------------------------------------- statistics
def router_statistics(logits: Logits, choice: Choice, sequences: int = 1) -> Statistics:
    """Losses and health of one router; the tokens are `sequences` equal parts.

    `balance`: E sum_e f_e P_e with f the share of picks and P the mean affinity, 1 when uniform (Switch,
    arXiv:2101.03961); `sequence_balance`: the same within each sequence, averaged (`sequence_balance`); `z`: mean
    squared log-partition (ST-MoE, arXiv:2202.08906); `entropy`: of the load, as a fraction of uniform; `dead`: experts
    without a token; `dropped`: share of picks not computed (0: dropless).
    """
    experts = logits.shape[-1]
    counts = load(choice.experts, experts)
    share = counts / choice.experts.size
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return {
        "balance": experts * jnp.sum(jax.lax.stop_gradient(share) * choice.affinities.mean(0)),
        "sequence_balance": sequence_balance(choice.affinities, choice.largest, sequences),
        "z": jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        "entropy": entropy / jnp.log(jnp.float32(max(experts, 2))),
        "dead": jnp.sum(counts == 0).astype(jnp.float32),
        "dropped": (choice.experts.size - counts.sum()) / choice.experts.size,
    }


def load(chosen: Int[Array, "tokens top_k"], experts: int) -> Float[Array, " experts"]:
    """How many picks each expert got. By comparison: a scatter's additions to so few places wait for each other, which
    took 72 ms for 65,536 picks of eight experts on an H200."""
    return jnp.sum(chosen.reshape(-1, 1) == jnp.arange(experts), axis=0, dtype=jnp.int32).astype(jnp.float32)


def sequence_balance(
    affinities: Float[Array, "tokens experts"], largest: Int[Array, "tokens top_k"], sequences: int
) -> Float[Array, ""]:
    """DeepSeek-V3's complementary balance loss without its factor (arXiv:2412.19437, eq. 17-20): 1 when uniform.

    In each of the `sequences` equal parts of the tokens, sum_e f_e P_e with P the mean affinity and f = E / (K T) times
    the tokens that have e among their K `largest` affinities, bias and groups left aside as the paper's eq. 18 does.
    """
    experts, top_k = affinities.shape[-1], largest.shape[-1]
    inside = affinities.reshape(sequences, -1, experts)
    picks = jax.nn.one_hot(largest.reshape(sequences, -1, top_k), experts).sum(2)
    return jnp.mean(jnp.sum(experts / top_k * picks.mean(1) * inside.mean(1), axis=-1))
