"""Multi-token prediction modules (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.model import ModelConfig
from llamax.model.block import DecoderBlock
from llamax.model.execution import Execution
from llamax.model.linear import contract, weight
from llamax.model.norm import Normalize
from llamax.model.parametrize import gain_layers
from llamax.model.statistics import Statistics


class PredictionModule(nnx.Module):
    """One more block like the model's last, which carries the stream one token further.

    It reads the stream of the module (or model) before it and the embedding of the next token, each normed, side by
    side, projected back to d_model. Embedding and output head are the model's own.
    """

    def __init__(self, config: ModelConfig, *, key: Key[Array, ""]):
        keys = jax.random.split(key)
        d, init, layers = config.d_model, config.init, gain_layers(config)
        self.embed_norm = Normalize(config.norm, d)
        self.stream_norm = Normalize(config.norm, d)
        self.project = weight(keys[0], (2 * d, d), ("pair", "embed"), init)
        layer = jnp.int32(len(config.layers) - 1)
        self.block = DecoderBlock(config.layers[-1], d, init, layers, layer=layer, key=keys[1])
        self.norm = Normalize(config.norm, d)

    def __call__(
        self,
        stream: Float[Array, "batch seq d_model"],
        embedded: Float[Array, "batch seq d_model"],
        table: Float[Array, "2 seq half"] | None,
        segments: Int[Array, "batch seq"] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], Statistics]:
        """(the normed stream after this module, for the head and the next one; what the parts of its block report)."""
        both = jnp.concatenate([self.embed_norm(embedded), self.stream_norm(stream)], axis=-1)
        x = contract(both, self.project[...], 1, execution.compute)
        x, statistics = self.block(x, table, segments, execution)
        return execution.enter(self.norm(execution.place(x))), statistics
