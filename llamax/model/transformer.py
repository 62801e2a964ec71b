"""The one Transformer: every family is a config over it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.components import Init, Position, Rope
from llamax.config.model import Block, ModelConfig
from llamax.errors import UserError
from llamax.model.block import DecoderBlock
from llamax.model.execution import Execution
from llamax.model.linear import contract, parameter, weight
from llamax.model.norm import Normalize
from llamax.model.position import rotary_table, sinusoids
from llamax.model.statistics import LayerStatistics, Statistics, join_statistics


class Stack(nnx.Module):
    """`repeat` copies of a unit of blocks; each block's parameters are stacked along a leading layers axis."""

    def __init__(
        self,
        unit: tuple[Block, ...],
        repeat: int,
        first: int,
        d_model: int,
        init: Init,
        layers: int,
        *,
        key: Key[Array, ""],
    ):
        self.repeat = repeat
        self.blocks: nnx.List[DecoderBlock] = nnx.List()
        for i, config in enumerate(unit):
            keys = jax.random.split(jax.random.fold_in(key, i), repeat)
            index = first + i + len(unit) * jnp.arange(repeat)

            def build(k: Array, layer: Array, config: Block = config) -> DecoderBlock:
                return DecoderBlock(config, d_model, init, layers, layer=layer, key=k)

            self.blocks.append(jax.vmap(build)(keys, index))

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        tables: dict[tuple[Position, int], Array],
        segments: Int[Array, "batch seq"] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], list[Statistics]]:
        """(x after all repeats, one dict of statistics [repeat] a member of the unit)."""

        def unit(x: Array, blocks: list[DecoderBlock]) -> tuple[Array, list[Statistics]]:
            statistics = []
            for block in blocks:
                table = tables.get((block.config.position, block.config.attention.rotary_width))
                x, s = block(x, table, segments, execution)
                x = execution.place(x)
                statistics.append(s)
            return x, statistics

        unit = execution.checkpoint(unit)
        return jax.lax.scan(
            unit, x, list(self.blocks), length=self.repeat, unroll=self.repeat if execution.unroll else 1
        )


class Transformer(nnx.Module):
    """A decoder-only language model, a pytree of parameters with a pure call.

    Under `jax.jit`, `Transformer(config, key=key)` initializes it; `model(tokens)` gives logits.
    """

    def __init__(self, config: ModelConfig, *, key: Key[Array, ""]):
        k_embed, k_head, k_position, k_stack = jax.random.split(key, 4)
        d, vocab, init = config.d_model, config.vocab_size, config.init
        self.config = config
        # A lookup has no fan-in; a tied table is also the head, whose fan-in is d_model.
        std = d**-0.5 if init.kind == "fan_in" and config.head.tied else init.std
        plain = init.model_copy(update={"kind": "normal", "std": std})
        self.embedding = weight(k_embed, (vocab, d), ("vocab", "embed"), plain, inputs=0, group="embedding")
        if config.position.kind == "learned":
            self.position = weight(
                k_position, (config.max_seq_len, d), ("position", "embed"), plain, inputs=0, group="embedding"
            )
        self.stacks: nnx.List[Stack] = nnx.List()
        first, layers = 0, len(config.layers)
        for i, (repeat, unit) in enumerate(config.blocks):
            self.stacks.append(Stack(unit, repeat, first, d, init, layers, key=jax.random.fold_in(k_stack, i)))
            first += repeat * len(unit)
        self.norm = Normalize(config.norm, d)
        if not config.head.tied:
            self.head = weight(k_head, (d, vocab), ("embed", "vocab"), init, group="head")
        if config.head.bias:
            self.head_bias = parameter(jnp.zeros(vocab), ("vocab",), "bias")

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        execution: Execution = Execution(),
    ) -> Float[Array, "batch seq vocab"]:
        """Next-token logits in float32; `segments` stops attention between different ids."""
        x, _ = self.features(tokens, segments, execution)
        return self.logits(x, execution)

    def logits(
        self, x: Float[Array, "batch seq d_model"], execution: Execution = Execution()
    ) -> Float[Array, "batch seq vocab"]:
        """Logits in float32 of the normed stream: (x head + bias) scale, then the cap."""
        head = self.config.head
        logits = contract(x.astype(jnp.float32), self.head_weight, 1, execution.compute)
        logits = logits + self.head_bias[...] if head.bias else logits
        logits = logits * head.scale if head.scale is not None else logits
        return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)

    @property
    def head_weight(self) -> Float[Array, "d_model vocab"]:
        """The output matrix, the transposed embedding where the head is tied."""
        return self.embedding[...].T if self.config.head.tied else self.head[...]

    def features(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        execution: Execution = Execution(),
    ) -> tuple[Float[Array, "batch seq d_model"], LayerStatistics]:
        """(final normed residual stream, what the layers report (see `join_statistics`), empty for a dense model).

        Raises:
            UserError: more tokens than learned positions.
        """
        config, seq = self.config, tokens.shape[1]
        if config.position.kind == "learned" and seq > config.max_seq_len:
            raise UserError(
                f"{seq} tokens exceed the learned positions, model.max_seq_len={config.max_seq_len}; shorten them"
            )
        x = self.embedding[...][tokens].astype(execution.activation_dtype)
        if config.embedding.scale == "sqrt_d_model":
            x = x * jnp.asarray(config.d_model**0.5, x.dtype)
        if config.position.kind == "learned":
            x = x + self.position[...][:seq].astype(x.dtype)
        if config.position.kind == "sinusoidal":
            x = x + jnp.asarray(sinusoids(seq, config.d_model), x.dtype)
        kinds = {
            (b.position, b.attention.rotary_width)
            for _, unit in config.blocks
            for b in unit
            if isinstance(b.position, Rope)
        }
        tables: dict[tuple[Position, int], Array] = {kind: jnp.asarray(rotary_table(*kind, seq)) for kind in kinds}
        x = execution.place(x)
        reports = []
        for stack in self.stacks:
            x, found = stack(x, tables, segments, execution)
            reports.append(found)
        return self.norm(x), join_statistics(reports)
