"""Mixture of experts, dropless, as in Mixtral (arXiv:2401.04088); the routers are in router.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from llamax.config.components import Init, MoeMlp
from llamax.model.execution import Execution
from llamax.model.linear import contract, parameter, weight
from llamax.model.mlp import FeedForward, activate
from llamax.model.router import Choice, load, route, router_statistics
from llamax.model.statistics import LOAD, Statistics


class MixtureOfExperts(nnx.Module):
    """Top-k of E feed-forward experts through grouped matmuls, plus an optional shared expert."""

    def __init__(self, config: MoeMlp, d_model: int, init: Init, gain: Float[Array, ""], *, key: Key[Array, ""]):
        keys = jax.random.split(key, 5)
        e, f = config.experts, config.expert.d_ff
        self.config = config
        self.router = weight(keys[0], (d_model, e), ("embed", "router"), init, group="router")
        if config.router.bias:
            self.router_bias = parameter(jnp.zeros(e), ("router",), "buffer")
        self.up = weight(keys[1], (e, d_model, f), ("experts", "embed", "mlp"), init)
        self.down = weight(keys[2], (e, f, d_model), ("experts", "mlp", "embed"), init, gain=gain)
        if config.expert.gated:
            self.gate = weight(keys[3], (e, d_model, f), ("experts", "embed", "mlp"), init)
        if config.shared is not None:
            self.shared = FeedForward(config.shared, d_model, init, gain, key=keys[4])
        if config.shared_gate:
            gate = jax.random.fold_in(keys[4], 1)
            self.shared_gate = weight(gate, (d_model, 1), ("embed", "router"), init, group="router")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], execution: Execution
    ) -> tuple[Float[Array, "batch seq d_model"], Statistics]:
        """(output before it joins the residual stream, router statistics).

        Where the router has a bias the statistics have its `load` [experts] too, which the balancing rule reads.
        """
        tokens = x.reshape(-1, x.shape[-1])
        # float32 at full precision whatever `compute` says: near ties decide which experts run.
        router = self.router[...].astype(jnp.float32)
        logits = jnp.matmul(tokens.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
        bias = self.router_bias[...].astype(jnp.float32) if self.config.router.bias else None
        choice = route(logits, self.config.router, self.config.top_k, bias)
        out = self._experts(tokens, choice, execution).reshape(x.shape)
        if self.config.shared is not None:
            out = out + self._shared(x, execution)
        statistics = router_statistics(logits, choice, sequences=x.shape[0])
        if self.config.router.bias:
            statistics[LOAD] = load(choice.experts, self.config.experts)
        return out, statistics

    def _shared(self, x: Array, execution: Execution) -> Array:
        out = self.shared(x, execution)
        if not self.config.shared_gate:
            return out
        return jax.nn.sigmoid(contract(x, self.shared_gate[...], 1, execution.compute)) * out

    def _experts(self, tokens: Array, choice: Choice, execution: Execution) -> Array:
        """Sum of the chosen experts' outputs: picks sorted by expert, one ragged product a matrix, scattered back."""
        k, experts = self.config.top_k, self.config.experts
        picks = choice.experts.reshape(-1)
        order = jnp.argsort(picks, stable=True)
        sizes = jnp.bincount(picks, length=experts).astype(jnp.int32)
        weights = choice.weights.reshape(-1)[order][:, None]
        dtype = jnp.dtype(execution.compute)

        def grouped(rows: Array, w: nnx.Param) -> Array:
            return jax.lax.ragged_dot(
                rows.astype(dtype), w[...].astype(dtype), sizes, preferred_element_type=jnp.float32
            )

        rows = tokens[order // k]
        if self.config.router.weigh == "input":
            rows = (rows * weights).astype(tokens.dtype)
        gate = grouped(rows, self.gate) if self.config.expert.gated else None
        out = grouped(activate(self.config.expert, grouped(rows, self.up), gate), self.down)
        if self.config.router.weigh == "output":
            out = out * weights
        return jnp.zeros(tokens.shape, jnp.float32).at[order // k].add(out).astype(tokens.dtype)
