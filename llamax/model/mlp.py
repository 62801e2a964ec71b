"""Dense feed-forward blocks."""

from __future__ import annotations

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
    "reglu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) for the kinds without a gate."""

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
        activation = ACTIVATIONS[self.config.kind]
        hidden = contract(x, self.up[...], 1, execution.compute)
        if self.config.bias:
            hidden = hidden + self.up_bias.astype(hidden.dtype)
        if self.config.gated:
            gate = contract(x, self.gate[...], 1, execution.compute)
            if self.config.bias:
                gate = gate + self.gate_bias.astype(gate.dtype)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        out = contract(hidden, self.down[...], 1, execution.compute)
        return out + self.down_bias.astype(out.dtype) if self.config.bias else out
