"""Modules with random weights, without compiling their initialization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llamax.config.model import ModelConfig
from llamax.model.transformer import Transformer

Module = TypeVar("Module", bound=nnx.Module)


def randomized(build: Callable[[jax.Array], Module], scale: float = 0.3, seed: int = 0) -> Module:
    """build(key) with every parameter drawn by numpy: N(0, scale^2), norm scales near one."""
    module = jax.eval_shape(build, jax.random.key(0))
    rng = np.random.default_rng(seed)
    for leaf in jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        value = scale * rng.standard_normal(leaf.get_value().shape)
        near = 1.0 if leaf.get_metadata()["group"] == "norm" else 0.0
        leaf.set_value(jnp.asarray(near + value, jnp.float32))
    return module


def small_config(**fields: Any) -> ModelConfig:
    """A Llama of two layers and width 16, with `fields` in place of its own."""
    return ModelConfig.model_validate(
        {
            "vocab_size": 32,
            "d_model": 16,
            "max_seq_len": 32,
            "segments": [{"repeat": 2}],
            "attention": {"kind": "gqa", "heads": 4, "kv_heads": 2},
            "position": {"kind": "rope"},
            "mlp": {"kind": "swiglu", "d_ff": 24},
            **fields,
        }
    )


def small_model(scale: float = 0.3, seed: int = 0, **fields: Any) -> Transformer:
    """A transformer of `small_config` with random weights."""
    return randomized(lambda key: Transformer(small_config(**fields), key=key), scale, seed)


def tokens_of(batch: int, seq: int, vocab: int = 32, seed: int = 0) -> jax.Array:
    """Uniform random token ids [batch, seq]."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, seq)), jnp.int32)
