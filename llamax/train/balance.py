"""Balance without a loss: router biases moved by load (arXiv:2408.15664, DeepSeek-V3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llamax.model.statistics import LOAD
from llamax.train.param_info import is_variable

BIAS = "router_bias"
Loads = dict[str, Float[Array, "..."]]


def split_loads(reports: dict[str, Array]) -> tuple[Loads, dict[str, Array]]:
    """(expert loads, everything else) of what `join_statistics` gives, names as they are."""
    loads = {name: value for name, value in reports.items() if name.startswith(f"{LOAD}.")}
    return loads, {name: value for name, value in reports.items() if name not in loads}


def move_biases(model: Any, loads: Loads, rate: Float[Array, ""]) -> Any:
    """Every router bias moved by `rate` towards the mean load: b_i += rate sign(mean load - load_i), layer by layer.

    `loads` counts the picks of the whole step, every microbatch on every device: `load.<path of a mixture>` ->
    [..., experts], shaped as its bias. A bias whose mixture is not in `loads` stays.
    """

    def one(path: Any, leaf: Any) -> Any:
        module, _, name = jax.tree_util.keystr(path, simple=True, separator=".").rpartition(".")
        if not isinstance(leaf, nnx.Variable) or name != BIAS or f"{LOAD}.{module}" not in loads:
            return leaf
        counts = loads[f"{LOAD}.{module}"]
        towards = jnp.sign(counts.sum(-1, keepdims=True) - counts.shape[-1] * counts)  # whole numbers: exact
        return jax.tree.map(lambda bias: bias + (rate * towards).astype(bias.dtype), leaf)

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=is_variable)
