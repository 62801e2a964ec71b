"""The one Transformer: every family is a config over it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llamax.config.components import Init, Rope
from llamax.config.model import Block, ModelConfig
from llamax.config.parametrization import Standard
from llamax.errors import UserError
from llamax.model.block import DecoderBlock
from llamax.model.cache import Cache, LayerCache, Slot, Step
from llamax.model.execution import Execution
from llamax.model.linear import contract, parameter, weight
from llamax.model.mtp import PredictionModule
from llamax.model.norm import Normalize
from llamax.model.parametrize import gain_layers, parametrize
from llamax.model.pipeline import through_stages
from llamax.model.position import PositionTables, position_tables, rotary_kinds, rotary_table
from llamax.model.statistics import LayerStatistics, Statistics, join_statistics

RotaryTables = dict[tuple[Any, int], Array]  # by kind, see `rotary_kinds`


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
        tables: RotaryTables,
        segments: Int[Array, "batch seq"] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], list[Statistics]]:
        """(x after all repeats, one dict of statistics [repeat] a member of the unit; [microbatch, repeat] where the
        layers are cut into stages)."""

        def layers(x: Array, blocks: list[DecoderBlock], segments: Array | None) -> tuple[Array, list[Statistics]]:
            def unit(x: Array, blocks: list[DecoderBlock]) -> tuple[Array, list[Statistics]]:
                statistics = []
                for block in blocks:
                    table = tables.get((block.config.position, block.config.attention.rotary_width))
                    x, s = block(x, table, segments, execution)
                    x = execution.place(x)
                    statistics.append(s)
                return x, statistics

            return jax.lax.scan(execution.checkpoint(unit), x, blocks, unroll=execution.unroll)

        if execution.stages is not None:
            return through_stages(layers, x, list(self.blocks), segments, execution.stages)
        return layers(x, list(self.blocks), segments)

    def decode(
        self,
        x: Float[Array, "batch seq d_model"],
        tables: RotaryTables,
        step: Step,
        caches: tuple[LayerCache, ...],
        execution: Execution,
    ) -> tuple[Float[Array, "batch seq d_model"], tuple[LayerCache, ...]]:
        """(x after all repeats, the caches of the unit's members with this call's tokens).

        The caches are carried rather than scanned over, so that a layer writes its few tokens in place.
        """

        def unit(carry: Any, layer: tuple[list[DecoderBlock], Array]) -> tuple[Any, None]:
            x, caches = carry
            blocks, i = layer
            new = []
            for block, cache in zip(blocks, caches, strict=True):
                table = tables.get((block.config.position, block.config.attention.rotary_width))
                x, written = block.decode(x, table, step, Slot(cache, i), execution)
                x = execution.place(x)
                new.append(written)
            return (x, tuple(new)), None

        layers = (list(self.blocks), jnp.arange(self.repeat))
        unroll = self.repeat if execution.unroll else 1
        return jax.lax.scan(unit, (x, caches), layers, length=self.repeat, unroll=unroll)[0]


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
        first, layers = 0, gain_layers(config)
        for i, (repeat, unit) in enumerate(config.blocks):
            self.stacks.append(Stack(unit, repeat, first, d, init, layers, key=jax.random.fold_in(k_stack, i)))
            first += repeat * len(unit)
        self.norm = Normalize(config.norm, d)
        if config.mtp:
            modules = [
                PredictionModule(config, key=jax.random.fold_in(k_stack, len(config.blocks) + i))
                for i in range(config.mtp)
            ]
            self.mtp: nnx.List[PredictionModule] = nnx.List(modules)
        if not config.head.tied:
            self.head = weight(k_head, (d, vocab), ("embed", "vocab"), init, group="head")
        if config.head.bias:
            self.head_bias = parameter(jnp.zeros(vocab), ("vocab",), "bias")
        parametrize(self, config)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        execution: Execution = Execution(),
    ) -> Float[Array, "batch seq vocab"]:
        """Next-token logits in float32; `segments` stops attention between different ids."""
        segments = None if segments is None else execution.held(segments)
        x, _ = self.features(execution.held(tokens), segments, execution)
        return self.logits(execution.natural(x), execution)

    def logits(
        self, x: Float[Array, "batch seq d_model"], execution: Execution = Execution()
    ) -> Float[Array, "batch seq vocab"]:
        """Logits in float32 of the normed stream: (x head + bias) scale, then the cap."""
        head = self.config.head
        logits = contract(x.astype(jnp.float32), self.head_weight, 1, execution.plain)
        logits = logits + self.head_bias[...] if head.bias else logits
        logits = logits * head.scale if head.scale is not None else logits
        return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)

    @property
    def head_weight(self) -> Float[Array, "d_model vocab"]:
        """The output matrix with its parametrization's factor, the transposed embedding where the head is tied."""
        head = self.embedding[...].T if self.config.head.tied else self.head[...]
        rule = self.config.parametrization
        factor = 1.0 if isinstance(rule, Standard) else rule.output_factor(self.config.d_model)
        return head if factor == 1.0 else head * factor

    def features(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        execution: Execution = Execution(),
    ) -> tuple[Float[Array, "batch seq d_model"], LayerStatistics]:
        """(final normed residual stream, what the layers report (see `join_statistics`), empty for a dense model).

        Tokens, segments and the stream are in the order in which `execution` holds a sequence (`Execution.held`).

        Raises:
            UserError: more tokens than learned positions.
        """
        config, seq = self.config, tokens.shape[1]
        if config.position.kind == "learned" and seq > config.max_seq_len:
            raise UserError(
                f"{seq} tokens exceed the learned positions, model.max_seq_len={config.max_seq_len}; shorten them"
            )
        places = position_tables(config, seq)
        rotary = (execution.held(table) for table in places.rotary)
        tables: RotaryTables = dict(zip(rotary_kinds(config), rotary, strict=True))
        x = execution.place(self._placed(self.embed(tokens, execution), execution.positions(seq), places))
        reports = []
        for stack in self.stacks:
            x, found = stack(x, tables, segments, execution)
            reports.append(found)
        return execution.enter(self.norm(x)), join_statistics(reports)

    def embed(
        self, tokens: Int[Array, "batch seq"], execution: Execution = Execution()
    ) -> Float[Array, "batch seq d_model"]:
        """Token embeddings, scaled where the config says so, without a position."""
        x = execution.table(self.embedding[...])[tokens].astype(execution.activation_dtype)
        scale = self.config.embedding.scale
        if scale == "none":
            return x
        return x * jnp.asarray(self.config.d_model**0.5 if scale == "sqrt_d_model" else scale, x.dtype)

    def _placed(self, x: Array, positions: Array, tables: PositionTables) -> Array:
        """x with the vectors of its positions ([seq] or [batch, seq]) added, for the kinds that have some."""
        if self.config.position.kind == "learned":
            return x + self.position[...][positions].astype(x.dtype)
        return x if tables.added is None else x + tables.added[positions].astype(x.dtype)

    def further(
        self,
        k: int,
        stream: Float[Array, "batch seq d_model"],
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        execution: Execution = Execution(),
    ) -> tuple[Float[Array, "batch seq d_model"], Statistics]:
        """(the normed stream of prediction module k, what its block's parts report).

        `stream` is `features` for k = 0, then what this gave for k - 1; `tokens` at t are those at t + 1 + k of the
        text. `logits` of the result at t are of the token at t + 2 + k.
        """
        module = self.mtp[k]
        block = module.block.config
        table = None
        if isinstance(block.position, Rope):
            table = jnp.asarray(rotary_table(block.position, block.attention.rotary_width, tokens.shape[1]))
            table = execution.held(table)
        return module(stream, self.embed(tokens, execution), table, segments, execution)

    def decode(
        self,
        tokens: Int[Array, "batch seq"],
        cache: Cache,
        counts: Int[Array, " batch"] | None = None,
        execution: Execution = Execution(),
        last: bool = False,
    ) -> tuple[Float[Array, "batch columns vocab"], Cache]:
        """(next-token logits in float32, the cache with these tokens): reads a prompt, or one token after another.

        Row b reads its first counts[b] columns (default: all) after the tokens its cache has; the logits of the
        other columns mean nothing. With `last` there is one column of logits, of each row's last token read. A row
        that outgrows the capacity of the cache has NaN for logits.
        """
        batch, seq = tokens.shape
        counts = jnp.full(batch, seq, jnp.int32) if counts is None else counts
        positions = cache.lengths[:, None] + jnp.arange(seq)
        step = Step(cache.lengths, counts, positions, cache.capacity)
        kinds = rotary_kinds(self.config)
        tables: RotaryTables = {
            kind: table[:, positions] for kind, table in zip(kinds, cache.tables.rotary, strict=True)
        }
        x = execution.place(self._placed(self.embed(tokens, execution), positions, cache.tables))
        layers = []
        for stack, found in zip(self.stacks, cache.layers, strict=True):
            x, written = stack.decode(x, tables, step, found, execution)
            layers.append(written)
        if last:
            x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
        lengths = cache.lengths + counts
        fits = (lengths <= cache.capacity)[:, None, None]
        logits = jnp.where(fits, self.logits(self.norm(x), execution), jnp.nan)
        return logits, Cache(lengths, cache.tables, tuple(layers), cache.capacity)
