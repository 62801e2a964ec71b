"""Mixture of experts, dropless, as in Mixtral (arXiv:2401.04088); the routers are in router.py."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from llamax.config.components import Init, MoeMlp
from llamax.model import ragged
from llamax.model.dispatch import Operands, Round, batched, grouped, in_rounds, joined, layout_of, sent, sorted_rows
from llamax.model.exchange import Matrices, TokenAxes, exchange, on_own_tokens
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
        # float32 at full precision whatever `compute` says: near ties decide which experts run.
        router = self.router[...].astype(jnp.float32)
        logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
        out, choice = self._experts(x, logits, execution)
        logits = logits.reshape(-1, self.config.experts)
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

    def _experts(self, x: Array, logits: Array, execution: Execution) -> tuple[Array, Choice]:
        """(the sum of the chosen experts' outputs, each times its weight, the choice)."""
        names = ("up", "down", "gate") if self.config.expert.gated else ("up", "down")
        matrices = {name: getattr(self, name)[...] for name in names}
        bias = self.router_bias[...].astype(jnp.float32) if self.config.router.bias else None
        kernel = ragged.KERNEL in execution.kernels
        routed = functools.partial(_routed, self.config, execution.plain, execution.tokens, kernel)
        if execution.tokens is None:
            tokens, logits = (a.reshape(-1, a.shape[-1]) for a in (x, logits))
            out, choice = routed(tokens, logits, bias, matrices)
        else:
            out, choice = on_own_tokens(routed, x, logits, bias, matrices, execution.tokens)
        return out.reshape(x.shape), choice


def _routed(
    config: MoeMlp,
    compute: str,
    axes: TokenAxes | None,
    kernel: bool,
    tokens: Float[Array, "tokens d_model"],
    logits: Float[Array, "tokens experts"],
    bias: Float[Array, " experts"] | None,
    matrices: Matrices,
) -> tuple[Float[Array, "tokens d_model"], Choice]:
    choice = route(logits, config.router, config.top_k, bias)
    here = functools.partial(_here, kernel)
    experts = here if axes is None or not axes.experts else functools.partial(_there, axes)
    return experts(config, compute, tokens, choice.weights, choice.experts, matrices), choice


def _here(
    kernel: bool, config: MoeMlp, compute: str, tokens: Array, weights: Array, chosen: Array, matrices: Matrices
) -> Array:
    """All experts on this device, by the kernel for sorted rows where there is one that covers them."""
    layout, operands = layout_of(chosen, config.experts), (tokens, weights, matrices)
    if kernel and ragged.covers(chosen.size, config.experts, matrices["up"].shape[1:], compute):
        out = sorted_rows(functools.partial(_sorted, config, compute), config.router.weigh, operands, layout)
    else:
        out = grouped(functools.partial(_through, config, compute), config.router.weigh, operands, layout)
    return out.astype(tokens.dtype)


def _there(
    axes: TokenAxes, config: MoeMlp, compute: str, tokens: Array, weights: Array, chosen: Array, matrices: Matrices
) -> Array:
    """Picks go to the devices that hold their experts, a device's experts side by side, and results come back.

    A device takes the place that an expert has in `_here`: it has its even share of slots and a little more, and what
    does not fit goes in further rounds. All devices do as many as the one that needs most.
    """
    local = matrices["up"].shape[0]
    layout = layout_of(chosen // local, config.experts // local)
    layout = layout._replace(fullest=jax.lax.pmax(layout.fullest, axes.names), label=chosen.reshape(-1) % local)
    one = functools.partial(_one_exchange, config, compute, axes.experts)
    return in_rounds(one, (tokens, weights, matrices), layout).astype(tokens.dtype)


def _one_exchange(config: MoeMlp, compute: str, axis: tuple[str, ...], operands: Operands, moves: Round) -> Array:
    """What the picks of one round add to the output [tokens, d_model], in float32; their experts are on the devices of
    `axis`, whose slots `moves` has."""
    tokens, weights, matrices = operands
    weigh = config.router.weigh
    local = matrices["up"].shape[0]
    parts = config.experts // local, -1
    assert moves.label is not None
    experts = jnp.where(moves.filled, moves.label, local).reshape(parts)  # `local`: an empty slot
    theirs = jax.lax.all_to_all(experts, axis, 0, 0)
    send, receive = ((e < local).sum(1, dtype=jnp.int32) for e in (experts, theirs))
    arrived = exchange(sent(weigh, tokens, weights, moves).reshape(*parts, tokens.shape[-1]), send, receive, axis)
    layout = layout_of(theirs.reshape(-1, 1), local)
    layout = layout._replace(rank=jnp.where(layout.experts < local, layout.rank, 2 * layout.rank.size))  # in no round
    rows = arrived.reshape(-1, tokens.shape[-1])
    out = grouped(functools.partial(_through, config, compute), None, (rows, None, matrices), layout)
    back = exchange(out.astype(rows.dtype).reshape(arrived.shape), receive, send, axis)
    return joined(weigh, back.reshape(-1, tokens.shape[-1]), weights, moves, tokens.shape[0])


def _through(config: MoeMlp, compute: str, rows: Array, matrices: Matrices) -> Array:
    """Rows [experts x slots, d_model] through their experts."""
    slots = rows.reshape(matrices["up"].shape[0], -1, rows.shape[-1])
    return _fed(config, lambda x, w: batched(x, w, compute), slots, matrices).reshape(rows.shape)


def _sorted(config: MoeMlp, compute: str, rows: Array, matrices: Matrices, sizes: Array) -> Array:
    """Rows [picks, d_model] sorted by expert through their experts, `sizes` rows each."""
    return _fed(config, lambda x, w: ragged.ragged(x, w, sizes, compute, True), rows, matrices)


def _fed(config: MoeMlp, product: Callable[[Array, Array], Array], x: Array, matrices: Matrices) -> Array:
    """Every expert's feed-forward block of its rows."""

    def named(x: Array, name: str) -> Array:
        return checkpoint_name(product(x, matrices[name]), DOT)

    gate = named(x, "gate") if config.expert.gated else None
    return named(activate(config.expert, named(x, "up"), gate), "down")
