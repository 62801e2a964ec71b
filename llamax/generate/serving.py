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
from llamax.model.kernels import host_of
from llamax.model.transformer import Transformer

MOST_LAYERS = 64  # written out; a deeper model keeps its scan, as compilation grows with every layer
# What a product casts anyway, so that the same numbers come out. Norms, biases and routers compute in float32.
CAST = ("matrix", "head")
# Of decoding on a CUDA device, where training leaves products to cuBLAS (mesh/flags.py): for the few queries of a token
# that pads them, and turns the keys and values in every layer.
STEP_OPTIONS = {"xla_gpu_enable_triton_gemm": True}


def for_serving(model: Transformer, execution: Execution = Execution(), inputs_last: bool = False) -> Transformer:
    """The same function of the same config family, its segments repeated once each and its matrices in the type that
    `execution` multiplies in. The embedding goes along where the stream has that type too.

    With `inputs_last` matrices are kept as sums over the inputs of a single row read them (`linear`); the model is then
    what `upright` makes of it. Experts stay as they are.
    """
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
        array = _turn(variable, array, back=False) if inputs_last else array
        return jax.tree.map(lambda _: array, variable)

    return jax.tree_util.tree_map_with_path(fill, template, is_leaf=_is_variable)


def upright(model: Transformer) -> Transformer:
    """A model kept with its inputs last as it computes: views, where a program does this first."""

    def turn(leaf: Any) -> Any:
        array = _turn(leaf, _array(leaf), back=True)
        return jax.tree.map(lambda _: array, leaf)

    return jax.tree.map(turn, model, is_leaf=_is_variable)


def _turn(variable: Any, array: Array, back: bool) -> Array:
    """A matrix with the axes of its inputs, which lead but for stacked layers, as its last ones; or back."""
    known = variable.get_metadata() if _is_variable(variable) else {}
    if known.get("group") not in CAST or not known["inputs"] or "experts" in known["axes"]:
        return array
    lead, inputs = array.ndim - len(known["axes"]), known["inputs"]
    first, last = list(range(lead, lead + inputs)), list(range(array.ndim - inputs, array.ndim))
    return jnp.moveaxis(array, last, first) if back else jnp.moveaxis(array, first, last)


def _written_out(config: ModelConfig) -> ModelConfig:
    """The same layers, each segment repeated once: arrays by themselves, the scan a straight line."""
    data = config.as_dict()
    once = [{**segment, "repeat": 1} for segment in data["segments"] for _ in range(segment["repeat"])]
    return validate(ModelConfig, {**data, "segments": once}, "model")


def reads_rows(config: ModelConfig) -> bool:
    """Whether matrices are kept with their inputs last: on a CUDA device, where `linear` sums over them for one row,
    and for layers that are arrays by themselves, as turning a stack in a scan might copy it."""
    return on_cuda() and len(config.layers) <= MOST_LAYERS


def on_cuda() -> bool:
    """Whether the first device is a CUDA device."""
    return host_of(jax.devices()[:1]).platform == "cuda"


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
