"""Mixture of experts, dropless, as in Mixtral (arXiv:2401.04088)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.components import Init, MoeMlp
from llamax.model.execution import Execution
from llamax.model.linear import weight
from llamax.model.mlp import ACTIVATIONS, FeedForward


def route(
    logits: Float[Array, "tokens experts"], top_k: int
) -> tuple[Float[Array, "tokens top_k"], Int[Array, "tokens top_k"], Float[Array, "tokens experts"]]:
    """Mixtral's router: softmax over all experts in float32, the top k renormalized to sum to one.

    Returns (weights, expert indices, the full softmax).
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, top_k)
    return weights / weights.sum(-1, keepdims=True), chosen, probabilities


def router_statistics(
    logits: Float[Array, "tokens experts"],
    probabilities: Float[Array, "tokens experts"],
    chosen: Int[Array, "tokens top_k"],
) -> dict[str, Float[Array, ""]]:
    """Losses and health of one router.

    `balance`: E sum_e f_e P_e with f the share of picks and P the mean probability, 1 when uniform (Switch,
    arXiv:2101.03961); `z`: mean squared log-partition (ST-MoE, arXiv:2202.08906); `entropy`: of the load, as a
    fraction of uniform; `dead`: experts without a token; `dropped`: share of picks not computed (0: dropless).
    """
    experts = logits.shape[-1]
    counts = jnp.zeros(experts).at[chosen.reshape(-1)].add(1.0)
    load = counts / chosen.size
    entropy = -jnp.sum(jnp.where(load > 0, load * jnp.log(jnp.where(load > 0, load, 1.0)), 0.0))
    return {
        "balance": experts * jnp.sum(jax.lax.stop_gradient(load) * probabilities.mean(0)),
        "z": jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        "entropy": entropy / jnp.log(jnp.float32(max(experts, 2))),
        "dead": jnp.sum(counts == 0).astype(jnp.float32),
        "dropped": (chosen.size - counts.sum()) / chosen.size,
    }


class MixtureOfExperts(nnx.Module):
    """Top-k of E feed-forward experts through grouped matmuls, plus an optional shared expert."""

    def __init__(self, config: MoeMlp, d_model: int, init: Init, gain: Float[Array, ""], *, key: Key[Array, ""]):
        keys = jax.random.split(key, 5)
        e, f = config.experts, config.expert.d_ff
        self.config = config
        self.router = weight(keys[0], (d_model, e), ("embed", "router"), init, group="router")
        self.up = weight(keys[1], (e, d_model, f), ("experts", "embed", "mlp"), init)
        self.down = weight(keys[2], (e, f, d_model), ("experts", "mlp", "embed"), init, gain=gain)
        if config.expert.gated:
            self.gate = weight(keys[3], (e, d_model, f), ("experts", "embed", "mlp"), init)
        if config.shared is not None:
            self.shared = FeedForward(config.shared, d_model, init, gain, key=keys[4])

    def __call__(
        self, x: Float[Array, "batch seq d_model"], execution: Execution
    ) -> tuple[Float[Array, "batch seq d_model"], dict[str, Float[Array, ""]]]:
        """(output before it joins the residual stream, router statistics)."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = jnp.matmul(tokens.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
        weights, chosen, probabilities = route(logits, self.config.top_k)
        out = self._experts(tokens, weights, chosen, execution).reshape(x.shape)
        if self.config.shared is not None:
            out = out + self.shared(x, execution)
        return out, router_statistics(logits, probabilities, chosen)

    def _experts(self, tokens: Array, weights: Array, chosen: Array, execution: Execution) -> Array:
        """Sum of the chosen experts' outputs: picks sorted by expert, one ragged product a matrix, scattered back."""
        k, experts = self.config.top_k, self.config.experts
        picks = chosen.reshape(-1)
        order = jnp.argsort(picks, stable=True)
        sizes = jnp.bincount(picks, length=experts).astype(jnp.int32)
        dtype = jnp.dtype(execution.compute)

        def grouped(rows: Array, w: nnx.Param) -> Array:
            return jax.lax.ragged_dot(
                rows.astype(dtype), w[...].astype(dtype), sizes, preferred_element_type=jnp.float32
            )

        rows = tokens[order // k]
        hidden = grouped(rows, self.up)
        activation = ACTIVATIONS[self.config.expert.kind]
        hidden = activation(grouped(rows, self.gate)) * hidden if self.config.expert.gated else activation(hidden)
        out = grouped(hidden, self.down) * weights.reshape(-1)[order][:, None]
        return jnp.zeros(tokens.shape, jnp.float32).at[order // k].add(out).astype(tokens.dtype)
