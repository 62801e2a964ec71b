"""A model as decoding wants it: weights once in the products' number format, every layer's arrays by themselves.

A step at batch 1 reads every weight once and does little else, so bytes are time. Casting inside the step reads the
wide weights every time, and a scan over stacked layers copies each layer's slice before it is multiplied.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llamax.config.load import validate
from llamax.config.model import ModelConfig
from llamax.model.execution import Execution
from llamax.model.transformer import Transformer

MOST_LAYERS = 64  # written out; a deeper model keeps its scan, as compilation grows with every layer
# What a product casts anyway, so that the same numbers come out. Norms, biases and routers compute in float32.
CAST = ("matrix", "head")


def for_serving(model: Transformer, execution: Execution = Execution()) -> Transformer:
    """The same function of the same config family, its segments repeated once each and its matrices in the type that
    `execution` multiplies in. The embedding goes along where the stream has that type too."""
    config = _written_out(model.config) if len(model.config.layers) <= MOST_LAYERS else model.config
    groups = (*CAST, "embedding") if execution.activation == execution.plain else CAST
    template = jax.eval_shape(lambda key: Transformer(config, key=key), jax.random.key(0))
    found = dict(jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_variable)[0])
    sources = [(stack, layer) for stack, (repeat, _) in enumerate(model.config.blocks) for layer in range(repeat)]

    def fill(path: Any, variable: Any) -> Any:
        layer = None
        if config is not model.config and _name(path[0]) == "stacks":
            stack, layer = sources[_name(path[1])]
            path = (path[0], type(path[1])(stack), *path[2:])
        array = _array(found[tuple(path)])
        array = array if layer is None or array.shape[0] == 1 else array[layer : layer + 1]
        if _is_variable(variable) and variable.get_metadata().get("group") in groups:
            array = array.astype(execution.plain)
        return jax.tree.map(lambda _: array, variable)

    return jax.tree_util.tree_map_with_path(fill, template, is_leaf=_is_variable)


def turned(model: Transformer, back: bool = False) -> Transformer:
    """The model's matrices with their inputs last, as sums over the inputs of a single row read them (`linear`); or,
    with `back`, such a model as the model reads it: views, where a program does it first. Experts stay as they are."""

    def turn(variable: Any) -> Any:
        if not _is_variable(variable) or variable.get_metadata().get("group") not in CAST:
            return variable
        inputs, axes = variable.get_metadata()["inputs"], variable.get_metadata()["axes"]
        array = variable.get_value()
        lead = array.ndim - len(axes)  # of stacked layers
        if not inputs or "experts" in axes:
            return variable
        first, last = list(range(lead, lead + inputs)), list(range(array.ndim - inputs, array.ndim))
        array = jnp.moveaxis(array, last, first) if back else jnp.moveaxis(array, first, last)
        return jax.tree.map(lambda _: array, variable)

    return jax.tree.map(turn, model, is_leaf=_is_variable)


def _written_out(config: ModelConfig) -> ModelConfig:
    """The same layers, each segment repeated once: arrays by themselves, the scan a straight line."""
    data = config.as_dict()
    once = [{**segment, "repeat": 1} for segment in data["segments"] for _ in range(segment["repeat"])]
    return validate(ModelConfig, {**data, "segments": once}, "model")


def step_bytes(model: Transformer) -> int:
    """Bytes of the weights that one decoding step of a dense model reads: all but an untied table, of which it reads a
    row."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_variable)[0]
    untied = not model.config.head.tied
    kept = [_array(leaf) for path, leaf in leaves if not (untied and _name(path[0]) == "embedding")]
    return sum(a.size * jnp.dtype(a.dtype).itemsize for a in kept)


def _array(leaf: Any) -> Array:
    return leaf.get_value() if _is_variable(leaf) else leaf


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _name(key: Any) -> Any:
    return next(getattr(key, field) for field in ("name", "key", "idx") if hasattr(key, field))
