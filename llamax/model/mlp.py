"""Dense feed-forward blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from llamax.config.components import DenseMlp, Init
from llamax.model.execution import Execution
from llamax.model.linear import contract, parameter, weight

# The nonlinearity of each kind; for the *glu kinds it acts on the gate (arXiv:2002.05202). GELU is the tanh form.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_geglu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # arXiv:1606.08415, section 2
    "reglu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def activate(
    config: DenseMlp, up: Float[Array, "*where"], gate: Float[Array, "*where"] | None
) -> Float[Array, "*where"]:
    """What `down` reads: act(up) without a gate, else act(gate) times up or, with `linear=one_plus`, times 1 + up; both
    clamped before where the config has a limit."""
    activation = ACTIVATIONS[config.kind]
    if gate is None:
        return activation(up)
    if config.limit is not None:
        gate, up = jnp.minimum(gate, config.limit), jnp.clip(up, -config.limit, config.limit)
    return gated(gate, up + 1 if config.linear == "one_plus" else up, config.kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: Float[Array, "*where"], up: Float[Array, "*where"], kind: str) -> Float[Array, "*where"]:
    """act(gate) up. The backward pass forms act(gate) again rather than read what the forward wrote: an exponential
    costs less than its array's way through memory, and the forward is one loop."""
    return ACTIVATIONS[kind](gate) * up


def _gated_forward(gate: Array, up: Array, kind: str) -> tuple[Array, tuple[Array, Array]]:
    return gated(gate, up, kind), (gate, up)


def _gated_backward(kind: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up = saved
    gate = jax.lax.optimization_barrier(gate)  # else the compiler finds that act(gate) has been computed, and keeps it
    act, derivative = jax.vjp(ACTIVATIONS[kind], gate)
    return derivative(g * up)[0], g * act


gated.defvjp(_gated_forward, _gated_backward)


class FeedForward(nnx.Module):
    """down(activate(up(x), gate(x))), the gate for the kinds that have one."""

    def __init__(self, config: DenseMlp, d_model: int, init: Init, gain: Float[Array, ""], *, key: Key[Array, ""]):
        keys = jax.random.split(key, 3)
        self.config = config
        self.up = weight(keys[0], (d_model, config.d_ff), ("embed", "mlp"), init)
        self.down = weight(keys[1], (config.d_ff, d_model), ("mlp", "embed"), init, gain=gain)
        if config.gated:
            self.gate = weight(keys[2], (d_model, config.d_ff), ("embed", "mlp"), init)
        if config.bias:
            self.up_bias = parameter(jnp.zeros(config.d_ff), ("mlp",), "bias")
            self.down_bias = parameter(jnp.zeros(d_model), ("embed",), "bias")
            if config.gated:
                self.gate_bias = parameter(jnp.zeros(config.d_ff), ("mlp",), "bias")

    def __call__(self, x: Float[Array, "batch seq d_model"], execution: Execution) -> Float[Array, "batch seq d_model"]:
        """The block's output before it joins the residual stream."""
        up = contract(x, self.up[...], 1, execution.compute)
        if self.config.bias:
            up = up + self.up_bias.astype(up.dtype)
        gate = None
        if self.config.gated:
            gate = contract(x, self.gate[...], 1, execution.compute)
            if self.config.bias:
                gate = gate + self.gate_bias.astype(gate.dtype)
        out = contract(activate(self.config, up, gate), self.down[...], 1, execution.compute)
        return out + self.down_bias.astype(out.dtype) if self.config.bias else out
