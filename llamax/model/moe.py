"""Mixture of experts, dropless, as in Mixtral (arXiv:2401.04088); the routers are in router.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from llamax.config.components import Init, MoeMlp
from llamax.model.dispatch import Round, batched, collect, in_rounds, layout_of, spread
from llamax.model.execution import Execution
from llamax.model.linear import DOT, contract, parameter, weight
from llamax.model.mlp import FeedForward, activate
from llamax.model.router import Choice, load, route, router_statistics
from llamax.model.statistics import LOAD, Statistics


class MixtureOfExperts(nnx.Module):
    """Top-k of E feed-forward experts through batched products (dispatch.py), plus an optional shared expert."""

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
        return jax.nn.sigmoid(contract(x, self.shared_gate[...], 1, execution.plain)) * out

    def _experts(self, tokens: Array, choice: Choice, execution: Execution) -> Array:
        """Sum of the chosen experts' outputs, each times its weight."""
        names = ("up", "down", "gate") if self.config.expert.gated else ("up", "down")
        matrices = {name: getattr(self, name)[...] for name in names}
        layout = layout_of(choice.experts, self.config.experts)
        one = functools.partial(_one_round, self.config, execution.plain)
        return in_rounds(one, (tokens, choice.weights, matrices), layout).astype(tokens.dtype)


def _one_round(config: MoeMlp, compute: str, operands: tuple[Array, Array, dict[str, Array]], moves: Round) -> Array:
    """What the picks of one round add to the output [tokens, d_model], in float32."""
    tokens, weights, matrices = operands

    def product(rows: Array, name: str) -> Array:
        return checkpoint_name(batched(rows, matrices[name], compute), DOT)

    rows = spread(tokens, moves)
    if config.router.weigh == "input":
        rows = (rows * spread(weights.reshape(-1, 1), moves)).astype(tokens.dtype)
    rows = rows.reshape(config.experts, -1, tokens.shape[-1])
    gate = product(rows, "gate") if config.expert.gated else None
    out = product(activate(config.expert, product(rows, "up"), gate), "down")
    picked = collect(out.reshape(-1, tokens.shape[-1]), moves).reshape(*weights.shape, -1)
    scales = weights if config.router.weigh == "output" else jnp.ones_like(weights)
    return jnp.sum(picked * scales[..., None], axis=1, dtype=jnp.float32)
